"""Show questions and answers as pictures: candidates' views, their scores, what the views weigh.

Axes: ``B`` rows, ``K`` candidates, ``V`` views, ``Y`` and ``X`` pixels.
"""

import base64
import html
import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError
from jaxsys.core.report import COLOURS, atomic_write, figure, save_figure
from jaxsys.ground.contract import Batch, Grounder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_SIDE = 96  # pixels of a view on the page
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #222; }
h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
.right { color: #009e73; } .wrong { color: #d55e00; }
table { border-collapse: collapse; } td { padding: .15rem .35rem; text-align: center; }
td.name { text-align: left; width: 13rem; } img { display: block; border: 1px solid #ddd; }
tr.meant td.name { border-left: .3rem solid #0072b2; } tr.chosen td.name { font-weight: 600; }
.bar { height: .35rem; background: #0072b2; } .small { color: #666; font-size: .8rem; }
"""


class Example(NamedTuple):
    """Hold one question with its pictures and its answer.

    Attributes:
        text: the description.
        names: K.
        pictures: [K][V] uint8 images [Y, X, 3], or None where a view is missing.
        scores: [K].
        weights: [K, V] of the views, or None.
        answer: the place of the candidate that is meant; None where it is not known.

    >>> Example("a chair", ("a", "b"), [[None], [None]], [1.0, 0.0], None, 0).right
    True
    """

    text: str
    names: Sequence[str]
    pictures: Sequence[Sequence[Any]]
    scores: Any
    weights: Any = None
    answer: int | None = None

    @property
    def chosen(self) -> int:
        """Give the place of the highest score."""
        return int(np.argmax(self.scores))

    @property
    def right(self) -> bool | None:
        """Say whether the meant candidate has strictly the highest score; None if not known."""
        if self.answer is None:
            return None
        others = np.delete(np.asarray(self.scores, float), self.answer)
        return bool(np.asarray(self.scores)[self.answer] > others.max())


def view_scores(
    grounder: Grounder, trainable: Any, frozen: Any, batch: Batch, *, key: Any = None
) -> Float[np.ndarray, "B K V"]:
    """Score each candidate by each of its views alone, the others left whole.

    It works for every grounder, and says which side of an object speaks for it.

    Args:
        grounder: any.
        trainable: its parameters.
        frozen: its frozen parameters.
        batch: B rows.
        key: where views are drawn.

    Returns:
        Scores; NaN for a view that is missing.

    >>> from jaxsys.ground.match import zero_shot
    >>> views = np.eye(2)[None, :, None].repeat(2, 2)
    >>> batch = Batch(np.eye(2)[:1], np.ones((1, 2, 2), bool), views)
    >>> view_scores(zero_shot(scale=1.0), {}, {}, batch).tolist()
    [[[1.0, 1.0], [0.0, 0.0]]]
    """
    mask = np.asarray(batch.mask)
    found = np.full(mask.shape, np.nan)
    run = jax.jit(
        lambda mask: grounder.scores(trainable, frozen, batch._replace(mask=mask), key=key)
    )
    for k in range(mask.shape[1]):
        for v in range(mask.shape[2]):
            alone = mask.copy()
            alone[:, k] = np.arange(mask.shape[2]) == v
            there = mask[:, k, v]
            alone[~there] = mask[~there]
            found[:, k, v] = np.where(there, np.asarray(run(alone))[:, k], np.nan)
    return found


def draw(example: Example) -> "Figure":
    """Draw one question: a line for each candidate, its views, their weights, its score.

    Raises:
        UserError: for parts that do not fit.

    >>> picture = np.zeros((4, 4, 3), np.uint8)
    >>> draw(Example("a $5 chair", ("a", "b"), [[picture], [None]], [1.0, 0.0])).axes[0].get_title()
    ''
    """
    n_candidates, n_views = _check(example)
    fig, axes = figure(n_candidates, n_views + 1, width=1.1, height=1.3)
    scale = _largest(example)
    for k in range(n_candidates):
        for v in range(n_views):
            axis, picture = axes[k, v], example.pictures[k][v]
            axis.set_axis_off()
            if picture is not None:
                axis.imshow(picture)
            if example.weights is not None and np.isfinite(example.weights[k][v]):
                shown = f"{example.weights[k][v]:.2f}"
                axis.set_title(shown, fontsize=7, color=COLOURS[0], alpha=_share(example, k, v))
        axis = axes[k, n_views]
        axis.barh([0], [example.scores[k]], color=COLOURS[0 if k == example.chosen else 5])
        axis.set_xlim(-scale, scale)
        axis.set_yticks([])
        axis.tick_params(labelsize=6)
        meant = "\nmeant" if k == example.answer else ""
        name = textwrap.fill(textwrap.shorten(str(example.names[k]), 60), 20)
        title = f"{name}{meant}\n{example.scores[k]:.2f}"
        axis.set_title(title, fontsize=7, parse_math=False)
    fig.suptitle(f"“{example.text}”", fontsize=9, parse_math=False)
    return fig


def _check(example: Example) -> tuple[int, int]:
    counts = {len(views) for views in example.pictures}
    n = len(example.names)
    if len(counts) != 1 or len(example.pictures) != n or len(example.scores) != n or n < 2:
        raise UserError(
            f"an example has {n} names, {len(example.scores)} scores and views {sorted(counts)}; "
            "expected one of each for every candidate, and as many views; mend it"
        )
    n_views = counts.pop()
    if example.weights is not None and np.shape(example.weights) != (n, n_views):
        raise UserError(
            f"weights have shape {np.shape(example.weights)}; expected [{n}, {n_views}]; mend them"
        )
    return n, n_views


def _largest(example: Example) -> float:
    return float(max(np.abs(np.asarray(example.scores, float)).max(), 1e-6))


def _share(example: Example, k: int, v: int) -> float:
    """Scale a weight to 0.25..1 among its candidate's, to be drawn as opacity or length."""
    own = np.asarray(example.weights[k], float)
    low, high = np.nanmin(own), np.nanmax(own)
    return 0.25 + 0.75 * float((own[v] - low) / (high - low)) if high > low else 1.0


def page(examples: Sequence[Example], title: str, note: str = "") -> str:
    """Make one HTML page that needs nothing else: pictures inside, all text escaped.

    Args:
        examples: the questions.
        title: of the page.
        note: below the title, such as what the numbers over the views are.

    Raises:
        UserError: for an example whose parts do not fit.

    >>> picture = np.zeros((4, 4, 3), np.uint8)
    >>> one = Example("<b>", ("a", "b"), [[picture], [None]], [1.0, 0.0], answer=0)
    >>> "<b>" in page([one], "questions"), "&lt;b&gt;" in page([one], "questions")
    (False, True)
    """
    for one in examples:
        _check(one)
    known = [one.right for one in examples if one.right is not None]
    summary = f"{sum(known)} of {len(known)} right. " if known else ""
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
        f'<p class="small">{summary}{html.escape(note)} The bar on the left marks the object that '
        "is meant; the chosen one is bold.</p>",
        *(_section(one) for one in examples),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _section(example: Example) -> str:
    n_candidates, n_views = _check(example)
    said = {True: ("right", "right"), False: ("wrong", "wrong"), None: ("", "answer not known")}
    kind, word = said[example.right]
    lines = [f'<h2>“{html.escape(example.text)}” <span class="{kind}">{word}</span></h2><table>']
    for k in range(n_candidates):
        kinds = ["meant"] * (k == example.answer) + ["chosen"] * (k == example.chosen)
        lines.append(f'<tr class="{" ".join(kinds)}"><td class="name">')
        lines.append(f"{html.escape(str(example.names[k]))}<br>score {example.scores[k]:.3f}</td>")
        for v in range(n_views):
            lines.append(f"<td>{_view(example, k, v)}</td>")
        lines.append("</tr>")
    return "".join([*lines, "</table>"])


def _view(example: Example, k: int, v: int) -> str:
    picture = example.pictures[k][v]
    if picture is None:
        return '<span class="small">no view</span>'
    data = base64.b64encode(_png(picture)).decode()
    shown = f'<img alt="view {v + 1}" src="data:image/png;base64,{data}">'
    if example.weights is None or not np.isfinite(example.weights[k][v]):
        return shown
    wide = round(100 * _share(example, k, v))
    weight = f"{example.weights[k][v]:.2f}"
    return (
        f'{shown}<div class="bar" style="width:{wide}%"></div><span class="small">{weight}</span>'
    )


def _png(picture: Any) -> bytes:
    """Pack a picture, smaller where it is large."""
    from matplotlib.image import imsave

    step = -(-max(np.shape(picture)[:2]) // _MOST_SIDE)
    packed = io.BytesIO()
    imsave(packed, np.ascontiguousarray(np.asarray(picture)[::step, ::step]), format="png")
    return packed.getvalue()


def write_report(
    folder: str | Path,
    examples: Sequence[Example],
    title: str,
    note: str = "",
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write ``report.html``, and each question as ``question-<i>.png``.

    Args:
        folder: made if need be.
        examples: at least one.
        title: of the page.
        note: see `page`.
        progress: called with pictures drawn and their number.

    Returns:
        The page.

    Raises:
        UserError: without an example.

    >>> import tempfile
    >>> picture = np.zeros((4, 4, 3), np.uint8)
    >>> one = Example("a chair", ("a", "b"), [[picture], [picture]], [1.0, 0.0])
    >>> write_report(tempfile.mkdtemp(), [one], "questions").name
    'report.html'
    """
    if not examples:
        raise UserError("there are zero examples to show; expected at least one; choose rows")
    folder = Path(folder)
    for i, one in enumerate(examples):
        save_figure(draw(one), folder / f"question-{i}.png")
        progress(i + 1, len(examples))
    atomic_write(folder / "report.html", page(examples, title, note))
    return folder / "report.html"
