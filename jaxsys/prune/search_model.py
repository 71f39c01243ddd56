"""Search a metric for a language model: texts, statistics, what is compared, and the report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32

from jaxsys.core import report
from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.data.stream import shuffled
from jaxsys.models import lm
from jaxsys.prune.blocks import block_gradients, dense_stats, lm_blocks
from jaxsys.prune.expression import FORMULAS
from jaxsys.prune.genetic import Found, GeneticConfig, search
from jaxsys.prune.methods import Method
from jaxsys.prune.plan import check_model
from jaxsys.prune.population import Scoring, evaluate, none_known, stack_layers
from jaxsys.prune.stats import Stats
from jaxsys.search.programs import Grammar, decode, from_string


class Texts(NamedTuple):
    """Hold windows of three stretches of a text that do not overlap, [N, T] each.

    Attributes:
      statistics: from which X and G are gathered.
      fitness: whose loss the search minimises.
      held_out: that only finalists see.

    >>> Texts._fields
    ('statistics', 'fitness', 'held_out')
    """

    statistics: Int32[np.ndarray, "N T"]
    fitness: Int32[np.ndarray, "N T"]
    held_out: Int32[np.ndarray, "N T"]


def draw_texts(
    ids: Sequence[int] | np.ndarray, windows: tuple[int, int, int], length: int, *, seed: int = 0
) -> Texts:
    """Cut a text into three stretches and draw windows of each.

    Args:
      ids: tokens of the whole text.
      windows: how many of each stretch; the stretches are as long as these numbers say.
      length: T, in tokens.
      seed: of the draw.

    Raises:
      UserError: if the text is too short.

    >>> texts = draw_texts(np.arange(40), (2, 1, 1), 5)
    >>> [(int(part.min()) // 10, int(part.max()) // 10) for part in texts]
    [(0, 1), (2, 2), (3, 3)]
    """
    ids, asked = np.asarray(ids, np.int32), sum(windows)
    if min(windows) < 1 or length < 2:
        raise UserError(
            f"{windows} windows of {length} tokens are asked for; expected at least one of each "
            "and two tokens"
        )
    n = ids.size // length
    if n < asked:
        raise UserError(
            f"the text has {ids.size} tokens, which is {n} windows of {length}, and {asked} are "
            "asked for; give a longer text, or ask for fewer or shorter windows"
        )
    rows, parts, begin, taken = ids[: n * length].reshape(n, length), [], 0, 0
    for count in windows:
        taken += count
        end = n * taken // asked
        parts.append(rows[begin + shuffled(end - begin, 0, count, seed)])
        begin = end
    return Texts(*parts)


@dataclass(frozen=True)
class LmLoss:
    """Compute the mean loss of a model of `jaxsys.models.lm`; equal for equal configurations.

    Attributes:
      config: the model.

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> LmLoss(config) == LmLoss(config)
    True
    """

    config: lm.LMConfig

    def __call__(self, params: Any, tokens: Int[Array, "B T"]) -> Float[Array, ""]:
        """Average over all tokens but the first of each row, in nats."""
        # The loss is computed thousands of times: on a CPU, scores that are not needed cost more
        # than their compilation. Accelerators do better with few large operations.
        attention = "blocks" if jax.default_backend() == "cpu" else "plain"
        return lm.loss(params, self.config, tokens, execution=lm.Execution(attention))


def lm_statistics(
    params: Any, config: lm.LMConfig, tokens: Int32[np.ndarray, "N T"], names: Sequence[str]
) -> dict[str, Stats]:
    """Gather the dense model's statistics that an expression's terminals need.

    Args:
      params: the model.
      config: of the model.
      tokens: calibration sequences.
      names: terminals.

    >>> import jax
    >>> config = lm.LMConfig("llama", 9, 4, 1, 1, 1, 4, 4, 8)
    >>> params = lm.init(jax.random.key(0), config)
    >>> found = lm_statistics(params, config, np.zeros((1, 4), np.int32), ("W", "G"))
    >>> found["model.layers.0.mlp.up_proj"].G.shape
    (4, 4)
    """
    blocks, flat = lm_blocks(config), flatten(params)
    stats = {k: s for part in dense_stats(blocks, flat, tokens) for k, s in part.items()}
    if not {"G", "G1"} & set(names):
        return stats
    pairs = block_gradients(blocks, flat, tokens)
    # Each is as large as the model: only what is asked for is kept.
    places = [(i, field) for i, field in enumerate(("G", "G1")) if field in names]
    return {
        k: s._replace(**{field: jnp.asarray(pairs[k][i]) for i, field in places})
        for k, s in stats.items()
    }


def search_lm(
    params: Any,
    config: lm.LMConfig,
    texts: Texts,
    scoring: Scoring,
    genetic: GeneticConfig,
    *,
    out: Path | None = None,
    mesh: Mesh | None = None,
    top: int = 10,
    stats: Mapping[str, Stats] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Found, list[dict[str, Any]]]:
    """Search a metric for a language model and compare it with those that people use.

    Args:
      params: the dense model.
      config: of the model.
      texts: see `Texts`; the search sees the first two only.
      scoring: with `LmLoss`; its orientation is set by the model.
      genetic: the search.
      out: folder of the search's state.
      mesh: spread individuals over its devices.
      top: how many of the best are compared.
      stats: of ``texts.statistics``; gathered here if left out.
      progress: called with (generations done, in all).

    Returns:
      What was found, and rows: expression, loss of the fitness text and of the held-out text.

    Raises:
      UserError: for a pattern that does not divide a layer; else see `genetic.search`.

    >>> import jax
    >>> from jaxsys.prune.patterns import Pattern
    >>> config = lm.LMConfig("llama", 9, 4, 1, 1, 1, 4, 4, 8)
    >>> texts, scoring = draw_texts(np.arange(48) % 9, (1, 1, 1), 8), Scoring(LmLoss(config))
    >>> thirds = replace(scoring, pattern=Pattern(nm=(1, 3)))
    >>> search_lm(lm.init(jax.random.key(0), config), config, texts, thirds, GeneticConfig())
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: pattern 1:3 does not divide the 4 inputs of model.layers.0...
    """
    blocks = lm_blocks(config)
    check_model(blocks, lm.shapes(config), Method(), scoring.pattern)
    scoring = replace(scoring, in_out=blocks.in_out)
    if stats is None:
        stats = lm_statistics(params, config, texts.statistics, scoring.grammar.terminals)
    fitness, held_out = jnp.asarray(texts.fitness), jnp.asarray(texts.held_out)
    found = search(params, stats, fitness, scoring, genetic, out=out, mesh=mesh, progress=progress)
    known = _formulas(scoring.grammar)
    named = known | {f"found {i + 1}": row["expression"] for i, row in enumerate(found.best(top))}
    programs = [from_string(scoring.grammar, text) for text in named.values()]
    full = replace(scoring, promote=1.0)
    losses = [
        score_expressions(programs, params, stats, tokens, full, genetic.evolve.population)
        for tokens in (fitness, held_out)
    ]
    dense = [float(scoring.loss_fn(params, tokens)) for tokens in (fitness, held_out)]
    rows = [("dense", "", *dense), *zip(named, named.values(), *losses, strict=True)]
    return found, [
        {"metric": name, "expression": text, "loss": float(a), "held-out loss": float(b)}
        for name, text, a, b in rows
    ]


def _formulas(grammar: Grammar) -> dict[str, str]:
    """List the metrics that people use and that the grammar can write."""
    found = {}
    for name, (text, operators) in FORMULAS.items():
        try:
            from_string(grammar, text)
        except UserError:
            continue
        # The two sets of operators divide differently.
        if "/" not in text or operators == "protected":
            found[name] = text
    return found


def score_expressions(
    programs: Sequence[Int32[np.ndarray, "L"]],
    params: Any,
    stats: Mapping[str, Stats],
    tokens: Any,
    scoring: Scoring,
    batch: int,
) -> Float[np.ndarray, "P"]:
    """Score programs in batches of one size, so that what was compiled for a search serves.

    >>> params = {"a": {"weight": jnp.array([[1.0, 2.0]])}}
    >>> scoring = Scoring(lambda p, t: jnp.sum(p["a"]["weight"]), Grammar(("W",)))
    >>> program = np.zeros(31, np.int32)
    >>> program[0] = 1
    >>> score_expressions([program] * 3, params, {"a": Stats()}, None, scoring, 2).tolist()
    [2.0, 2.0, 2.0]
    """
    layers, found = stack_layers(params, stats, scoring), []
    for begin in range(0, len(programs), batch):
        part = list(programs[begin : begin + batch])
        filled = jnp.asarray(np.stack(part + part[-1:] * (batch - len(part))))
        got = evaluate(filled, layers, params, tokens, none_known(), scoring)
        found.append(np.asarray(got.fitness)[: len(part)])
    return np.concatenate(found)


def recurring(
    grammar: Grammar, programs: Int[np.ndarray, "P L"] | Int[Array, "P L"]
) -> dict[str, float]:
    """Measure in what share of programs each symbol occurs.

    >>> g = Grammar(("W", "X"))
    >>> shares = recurring(g, np.stack([from_string(g, t) for t in ("W*sqrt(X)", "W")]))
    >>> shares["W"], shares["sqrt"], shares["exp"]
    (1.0, 0.5, 0.0)
    """
    codes = np.asarray(programs)
    return {
        symbol: float((codes == i).any(1).mean())
        for i, symbol in enumerate(grammar.symbols)
        if symbol
    }


def write_search(
    out: Path, found: Found, rows: Sequence[Mapping[str, Any]], title: str
) -> list[Path]:
    """Write search.json, search.md and curve.png.

    Args:
      out: folder.
      found: what was found.
      rows: from `search_lm`.
      title: of the page and the figure.

    Returns:
      The files.

    >>> write_search.__name__
    'write_search'
    """
    archive = found.state.archive
    held = np.isfinite(np.asarray(archive.fitness))
    document = {
        "rows": list(rows),
        "history": found.history,
        "trees": [decode(found.grammar, p) for p in np.asarray(archive.programs)[held][:20]],
        "recurring": recurring(found.grammar, np.asarray(archive.programs)[held][:50]),
    }
    report.atomic_write(out / "search.json", report.to_json(document) + "\n")
    last = found.history[-1]
    text = (
        f"# {title}\n\nMean loss in nats per token of the pruned model, of the text that the "
        f"search minimised and of held-out text. {last['evaluations']} expressions, of which "
        f"{last['fresh']} had masks of their own.\n\n"
    )
    report.atomic_write(out / "search.md", text + report.markdown_table(list(rows)))
    fig, axes = report.figure(1, 1)
    axis = axes[0, 0]
    evaluations = [entry["evaluations"] for entry in found.history]
    axis.plot(evaluations, [entry["best"] for entry in found.history], label="best so far")
    for row in rows:
        if row["metric"] in ("wanda", "pruner_zero", "magnitude"):
            [line] = axis.plot([0, evaluations[-1]], [row["loss"]] * 2, linestyle=":", linewidth=1)
            axis.annotate(row["metric"], (0, row["loss"]), fontsize=7, color=line.get_color())
    axis.set(xlabel="expressions scored", ylabel="loss of the pruned model, nats", title=title)
    report.save_figure(fig, out / "curve.png")
    return [out / name for name in ("search.json", "search.md", "curve.png")]
