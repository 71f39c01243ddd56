"""DA4LG, its ablations and the baselines on real furniture: which of two objects is meant?

    apt-get download sweethome3d-furniture sweethome3d
    jaxsys ground prepare --libraries *.deb --out FOLDER --activations
    python experiments/ground/furniture.py --prepared FOLDER         (results/furniture.jsonl, .md)
    python experiments/ground/furniture.py --smoke                   (procedural toys, a minute)

814 household models of Debian's Sweet Home 3D libraries; a description is an object's catalogue
name and tags; the two candidates share a category and differ in name. Five splits by object (70 %
to learn from, 30 % to be asked about) and one by library (learn Scopia and default, ask BlendSwap).
Methods see the same groups of objects in the same order (`jaxsys.ground.groups`); settings
were looked at on object-100 alone, and rates were not tuned. ridge is a regression in closed form
(`jaxsys.ground.ridge`); sums add its scores to another's. Encoders are EfficientNet-Lite0 and
MiniLM, whose spaces share nothing: CLIP's weights are in no package, so zero-shot is not asked, and
figures do not compare to the paper's. DA4LG's low-rank adapters are on Lite0's last pointwise
convolutions; its captioner is a small one trained along, for GPT-2's weights are in no package.

Cells are written as they are done and are not computed again; their scores lie in FOLDER/scores,
from where sums read them. What is not in the table was not run. Minutes on two shared cores: 1 to 3
a cell with an adapted encoder, seconds for MATCH.
"""

import argparse
import base64
import io
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.measure import machine
from jaxsys.core.report import append_jsonl, atomic_write, figure, markdown_table, save_figure
from jaxsys.ground import ridge
from jaxsys.ground.caption import Captioner, gpt2_captioner
from jaxsys.ground.catalogue import Catalogue, Object
from jaxsys.ground.contract import Grounder
from jaxsys.ground.da4lg import Da4lgConfig, da4lg
from jaxsys.ground.evaluation import difference, score
from jaxsys.ground.features import (
    LITE0_CUT,
    caption_tokens,
    encoder_slug,
    lite0,
    mean_colour,
    vocabulary_of,
)
from jaxsys.ground.game import (
    Game,
    Prepared,
    Split,
    TextVectors,
    make_game,
    split_by_library,
    split_by_object,
)
from jaxsys.ground.groups import gather_group, groups
from jaxsys.ground.magic import MagicConfig, magic
from jaxsys.ground.match import MatchConfig, match
from jaxsys.ground.metrics import strictly_best
from jaxsys.ground.prepared import cached_text_vectors, read_prepared
from jaxsys.ground.program import TrainConfig, program
from jaxsys.ground.ridge import RidgeConfig
from jaxsys.ground.spread import row_mesh
from jaxsys.ground.tables import Rows, Tables, from_games
from jaxsys.models import lora
from jaxsys.models.efficientnet import run_blocks
from jaxsys.models.gpt2 import GPT2Config

RESULTS = Path(__file__).parent / "results"
BASE = "MATCH, mean of 8 views"
# A captioner as small as the texts are short: seven words on average.
CAPTIONER = GPT2Config(vocab_size=512, n_positions=24, n_embd=64, n_layer=2, n_head=4)
TOKENS = 12


@dataclass(frozen=True)
class Method:
    """Say what is trained, and on what.

    Attributes:
        grounder: match, magic or da4lg; ridge (closed form); or sum, of another's and the ridge's
            scores.
        options: of its configuration.
        train_views: shown of each object in a step.
        views: of each object that are there at all.
        blind: texts are zeros.
        caption: λ_g.
    """

    grounder: str
    options: tuple[tuple[str, Any], ...] = ()
    train_views: int = 2
    views: int = 8
    blind: bool = False
    caption: float = 0.1


def da(**options: Any) -> Method:
    """Describe DA4LG with some options of its own."""
    own = {
        name: options.pop(name) for name in ("views", "train_views", "caption") if name in options
    }
    return Method("da4lg", tuple(options.items()), **own)


METHODS = {
    "no text": Method("match", (("pooling", "mean"),), 8, blind=True),
    "MATCH, 1 view": Method("match", (("pooling", "one"),), 8),
    BASE: Method("match", (("pooling", "mean"),), 8),
    "MATCH, max of 8 views": Method("match", (("pooling", "max"),), 8),
    "DA4LG": da(),
    "DA4LG − DSE": da(domain="none"),
    "DA4LG, frozen DSE": da(domain="frozen"),
    "DA4LG, full fine-tune": da(domain="full"),
    "DA4LG − RW": da(weighting="none"),
    "DA4LG − VLC": da(contrast=0.0),
    "DA4LG − VGC": da(caption=0.0),
    "DA4LG, rank 1": da(rank=1),
    "DA4LG, rank 4": da(rank=4),
    "DA4LG, rank 16": da(rank=16),
    "DA4LG, 1 view": da(views=1, train_views=1, weighting="sigmoid"),
    "DA4LG, 2 views": da(views=2),
    "DA4LG, 4 views": da(views=4),
    "MAGiC": Method("magic", (), 2),
    "ridge": Method("ridge"),
    "MATCH + ridge": Method("sum", (("of", BASE),)),
    "DA4LG + ridge": Method("sum", (("of", "DA4LG"),)),
}
RIDGE = RidgeConfig()
# The ridge's share against one share of the other's, scores standardised: of 0.5, 1, 2, 3, 4 and 6
# the least at which more than 75 % of object-100's same-noun rows were right.
SHARE = 4.0


class Settings:
    """Hold sizes of a run; smaller ones with --smoke."""

    objects, batch, steps, adapter_lr, lr = 24, 128, 250, 1e-3, 1e-3
    hidden: tuple[int, ...] = (512, 256)
    rank = 8


class Task:
    """Hold a prepared folder and its games."""

    def __init__(self, prepared: Prepared, encoder: Any, text: Any, category: np.ndarray):
        self.prepared, self.encoder, self.text, self.category = prepared, encoder, text, category

    @lru_cache(maxsize=8)  # noqa: B019 - one task lives as long as the program
    def games(self, split: str) -> tuple[Tables, Rows, Rows, Game]:
        """Make the tables, the rows of both parts and the tested game."""
        catalogue = self.prepared.catalogue
        parts = part_of(catalogue, split)
        train = make_game(catalogue, parts.train)
        test = make_game(catalogue, parts.test, seen=parts.train)
        vectors = [self.text(game.texts) for game in (train, test)]
        known = vocabulary_of(train.texts)
        told = [
            one._replace(tokens=tokens, token_mask=mask)
            for one, game in zip(vectors, (train, test), strict=True)
            for tokens, mask in [caption_tokens(game.texts, known, TOKENS)]
        ]
        tables, (learn, ask) = from_games(self.prepared, [train, test], told)
        return tables, learn, ask, test


def part_of(catalogue: Catalogue, split: str) -> Split:
    """Make the split of a name: ``object-SEED`` or ``library``."""
    kind, _, seed = split.partition("-")
    return (
        split_by_library(catalogue) if kind == "library" else split_by_object(catalogue, int(seed))
    )


@lru_cache(maxsize=64)
def grounder_of(
    method: Method, width: int, text_width: int, encode: Any
) -> tuple[Grounder, Da4lgConfig | None, Captioner | None]:
    """Make a grounder, one for all splits, so that its programs are compiled once."""
    options = dict(method.options)
    if method.grounder == "match":
        config = MatchConfig(width, text_width, hidden=Settings.hidden, **options)
        return match(config), None, None
    if method.grounder == "magic":
        return magic(MagicConfig(width, text_width, **options)), None, None
    captioner = gpt2_captioner(CAPTIONER, length=4, frozen=False) if method.caption else None
    config = Da4lgConfig(
        width,
        text_width,
        **{
            "pooling": "mean",
            "hidden": Settings.hidden,
            "shared": 128,
            "rank": Settings.rank,
            "alpha": 2.0 * options.get("rank", Settings.rank),
            "patterns": PATTERNS[0],
            "caption": method.caption,
        }
        | options,
    )
    return da4lg(config, encode, captioner), config, captioner


PATTERNS: list[tuple[str, ...]] = [()]


def run_cell(task: Task, method: Method, split: str, seed: int) -> dict[str, Any]:
    """Train a method on a split and ask it."""
    tables, learn, ask, test = task.games(split)
    if method.blind:
        tables = tables._replace(text=np.zeros_like(tables.text))
    if method.views < tables.mask.shape[1]:
        step = tables.mask.shape[1] // method.views
        kept = slice(0, step * method.views, step)
        parts = {n: getattr(tables, n)[:, kept] for n in ("mask", "views", "pixels")}
        tables = tables._replace(**parts)
    begin_s = time.perf_counter()
    losses: list[float] = []
    if method.grounder == "sum":
        found = added(task, method, split)[None]
    elif method.grounder == "ridge":
        fitted = ridge.fit(RIDGE, tables._replace(pixels=None), learn)
        closed = Grounder(lambda key, frozen: {}, partial(ridge.scores, RIDGE), no_loss)
        found = score(closed, fitted, {}, tables._replace(pixels=None), ask)
    else:
        found, losses = run_trained(task, method, tables, learn, ask, seed)
    keep_scores(task, method, split, found[0])
    right = np.stack([strictly_best(one, ask.answer) for one in found])
    return {
        "all": float(right.mean()),
        "same_noun": float(right[:, test.same_noun].mean()) if test.same_noun.any() else None,
        "unseen_name": float(right[:, test.unseen_name].mean()) if test.unseen_name.any() else None,
        "asked": len(test.answer),
        "asked_same_noun": int(test.same_noun.sum()),
        "loss": [float(x) for x in losses[:: max(len(losses) // 8, 1)]],
        "took_s": time.perf_counter() - begin_s,
        "right": base64.b64encode(np.packbits(right[0])).decode(),
    }


def run_trained(
    task: Task, method: Method, tables: Tables, learn: Rows, ask: Rows, seed: int
) -> tuple[np.ndarray, list[float]]:
    """Train a method by its gradient and score the asked rows."""
    width, text_width = tables.views.shape[-1], tables.text.shape[-1]
    grounder, config, captioner = grounder_of(method, width, text_width, task.encoder.encode)
    adapts = config is not None and config.domain in ("lora", "full")
    frozen = {"vision": task.encoder.params} if adapts else {}
    params, losses = train(grounder, frozen, tables, learn, task.category, method, adapts, seed)
    return ask_all(grounder, config, captioner, task, params, frozen, tables, ask, seed), losses


def no_loss(*_: Any, **__: Any) -> Any:
    """Stand where a grounder in closed form has no loss."""
    raise NotImplementedError


def added(task: Task, method: Method, split: str) -> np.ndarray:
    """Add another method's scores and the ridge's, each over the deviation of its differences."""
    parts = []
    for name in (dict(method.options)["of"], "ridge"):
        file = scores_file(task, METHODS[name], split)
        if not file.is_file():
            sys.exit(f"{file} is not there; run the cells of {name} on {split} first")
        one = np.load(file)
        parts.append(one / np.std(one[:, 0] - one[:, 1]))
    return parts[0] + SHARE * parts[1]


def scores_file(task: Task, method: Method, split: str) -> Path:
    """Say where a cell's scores are kept, for ensembles."""
    name = next(name for name, one in METHODS.items() if one == method)
    return task.prepared.folder / "scores" / f"{encoder_slug(name)}-{split}.npy"


def keep_scores(task: Task, method: Method, split: str, scores: np.ndarray) -> None:
    """Keep a cell's scores [R, 2] in the prepared folder."""
    packed = io.BytesIO()
    np.save(packed, np.asarray(scores, np.float32))
    atomic_write(scores_file(task, method, split), packed.getvalue())


def train(
    grounder: Grounder,
    frozen: Any,
    tables: Tables,
    rows: Rows,
    category: np.ndarray,
    method: Method,
    adapts: bool,
    seed: int,
) -> tuple[Any, list[float]]:
    """Train on groups drawn by the seed, the same for every method."""
    # A whole copy is trained at a tenth of the adapters' rate.
    full = dict(method.options).get("domain") == "full"
    rate = Settings.adapter_lr / 10 if full else Settings.adapter_lr
    how = TrainConfig(
        epochs=1,
        batch=Settings.batch,
        lr=Settings.lr,
        adapter_lr=rate,
        clip_norm=1.0,
    )
    run = program(grounder, how, row_mesh(Settings.batch, jax.devices()[:1]), 0, False)
    state = run.init(np.int32(seed), frozen, None)
    carry = (state["params"], state["memory"])
    tables = tables if adapts else tables._replace(pixels=None)
    drawn = groups(
        rows,
        category,
        tables.mask.shape[1],
        objects=Settings.objects,
        views=min(method.train_views, tables.mask.shape[1]),
        batch=Settings.batch,
        seed=seed,
    )
    values = []
    for number, group in zip(range(Settings.steps), drawn, strict=False):
        batch = gather_group(tables, group)
        carry, (value, _) = run.step(carry, frozen, batch, np.int32(seed), np.int32(number))
        values.append(value)
    losses = [float(x) for x in values]
    assert np.isfinite(losses).all(), f"a loss is not finite: {losses}"
    return carry[0], losses


def ask_all(
    grounder: Grounder,
    config: Da4lgConfig | None,
    captioner: Captioner | None,
    task: Task,
    params: Any,
    frozen: Any,
    tables: Tables,
    rows: Rows,
    seed: int,
) -> np.ndarray:
    """Score all rows, each object encoded once: f_d stands in for the pixels it is made of."""
    if config is None:
        passes = 8 if grounder in SINGLE else 1
        return score(
            grounder, params, {}, tables._replace(pixels=None), rows, passes=passes, seed=seed
        )
    if config.domain not in ("lora", "full"):
        return score(grounder, params, {}, tables._replace(pixels=None), rows, seed=seed)
    adapted = (
        lora.apply(frozen["vision"], params["domain"])
        if config.domain == "lora"
        else params["domain"]
    )
    seen = np.unique(rows.objects)
    domain = np.zeros_like(tables.views)
    shape = tables.pixels.shape[2:]
    for i in range(0, len(seen), 32):
        at = np.resize(seen[i : i + 32], 32)  # one shape, so that one program is compiled
        kept = np.asarray(tables.pixels[at], np.float32).reshape(-1, *shape)
        domain[at] = np.asarray(task.encoder.encode(adapted, kept)).reshape(32, *domain.shape[1:])
    plain, identity = asker(config, captioner), {**params, "domain": {}}
    return score(plain, identity, {"vision": {}}, tables._replace(pixels=domain), rows, seed=seed)


SINGLE: set[Any] = set()


@lru_cache(maxsize=64)
def asker(config: Da4lgConfig, captioner: Captioner | None) -> Grounder:
    """Make the same grounder whose encoder has run already."""
    return da4lg(replace(config, domain="full"), lambda params, x: x, captioner)


def furniture(folder: Path, cut: int) -> Task:
    """Open a prepared folder; activations are taken on to the block that is adapted from."""
    prepared = read_prepared(folder, activations=True)
    encoder = lite0(cut=cut)
    if cut > LITE0_CUT:
        whole = lite0().params
        go = jax.jit(lambda x: run_blocks(whole, x.astype(jnp.float32), LITE0_CUT, cut))
        kept = np.stack([np.asarray(go(x), np.float16) for x in prepared.pixels])
        prepared = prepared._replace(pixels=kept)
    text = partial(cached_text_vectors, folder)
    return Task(prepared, encoder, text, categories(prepared.catalogue))


def toys() -> Task:
    """Draw the procedural toys; a text's vector says which of its words it has."""
    from jaxsys.ground.scene import NOUNS, TOYS, render_views, stack, toy

    names = TOYS
    pictures = np.asarray(render_views(stack([toy(name) for name in names]), n_views=8, size=16))
    objects = tuple(
        Object(f"toy-{i}", name, (), name.split()[-1] if i % 2 else NOUNS[0], "toys", "jaxsys",
               "Apache-2.0", (1.0, 1.0, 1.0))
        for i, name in enumerate(names)
    )  # fmt: skip
    encoder = mean_colour()
    kept = np.asarray(
        encoder.keep((pictures * 255).astype(np.uint8).reshape(-1, 16, 16, 3))
    ).reshape(len(names), 8, 3)
    words = sorted({word for name in names for word in name.split()})

    def text(texts: tuple[str, ...]) -> TextVectors:
        each = np.array([[w in t.lower().split() for w in words] for t in texts], np.float32)
        said = [t.lower().split()[:4] for t in texts]
        single = np.array([[[w == one for w in words] for one in t] for t in said], np.float32)
        return TextVectors(each, single, np.ones(single.shape[:2], bool))

    catalogue = Catalogue(objects)
    prepared = Prepared(
        catalogue, Path(tempfile.mkdtemp()), kept, np.ones(kept.shape[:2], bool), kept
    )
    return Task(prepared, encoder, text, categories(catalogue))


def categories(catalogue: Catalogue) -> np.ndarray:
    """Number the objects' categories."""
    return np.unique([one.category for one in catalogue.objects], return_inverse=True)[1]


def read_cells(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Read the cells that are done."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return {(row["method"], row["split"]): row for row in map(json.loads, lines)}


def write_table(file: Path, cells: dict[tuple[str, str], Any], games: Any) -> None:
    """Write means over the object splits, paired differences to the base, and the other library."""
    rows, drawn = [], []
    for name in METHODS:
        mine = {s: c for (m, s), c in cells.items() if m == name and s.startswith("object")}
        row: dict[str, Any] = {"method": name, "splits": len(mine)}
        for what in ("all", "same_noun", "unseen_name"):
            values = [100 * c[what] for c in mine.values() if c[what] is not None]
            if values:
                spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
                row[what.replace("_", " ")] = f"{np.mean(values):.1f}{spread}"
        both = [s for s in mine if (BASE, s) in cells and name != BASE]
        if both:
            gap, (low, high) = paired(cells, name, both, games)
            row["to MATCH"] = f"{100 * gap:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            drawn.append((name, gap, low, high))
        library = cells.get((name, "library"))
        if library:
            row["other library"] = f"{100 * library['all']:.1f}"
            row["its same noun"] = f"{100 * library['same_noun']:.1f}"
        if len(row) > 2:
            rows.append(row)
    splits = sorted({split for _, split in cells})
    note = (
        "\nPercent right, mean ± deviation over splits by object. To MATCH: difference to "
        f'"{BASE}" on the same questions, with a 95 % interval over the objects that are meant. '
        "Methods that are not listed, and splits beyond those counted, were not run; zero-shot is "
        f"not defined for encoders without a common space. {bound_line(games, splits)}"
        f"\n\n{machine_line()}\n"
    )
    atomic_write(file.with_suffix(".md"), markdown_table(rows) + note)
    if drawn:
        draw(file.with_suffix(".png"), drawn)


def bound_line(games: Any, splits: Iterable[str]) -> str:
    """Say how many same-noun rows a reader could not tell by the words alone."""
    rows, silent = 0, 0
    for split in splits:
        if not split.startswith("object"):
            continue
        _, _, ask, test = games(split)
        told = {}
        for place, answer, text in zip(ask.objects, ask.answer, test.text_of, strict=True):
            told[place[answer]] = frozenset(re.findall(r"[a-z]+", test.texts[text].lower()))
        for (first, second), answer, same in zip(
            ask.objects, ask.answer, test.same_noun, strict=True
        ):
            meant, other = (first, second) if answer == 0 else (second, first)
            rows += bool(same)
            silent += bool(same) and told[meant] <= told[other]
    return (
        f"Of {rows} same-noun rows {silent} say nothing that the other object's own text does not "
        f"say, too; were these guessed, at most {100 - 50 * silent / max(rows, 1):.1f} % could be "
        "right."
    )


def machine_line() -> str:
    """Say where this ran."""
    here = machine()
    return f"{here.cpu}, {here.cores} cores, jax {here.jax}, Python {here.python}."


def paired(
    cells: dict[tuple[str, str], Any], name: str, splits: Iterable[str], games: Any
) -> tuple[float, tuple[float, float]]:
    """Compare a method with the base over all rows of some splits, drawing whole objects."""
    first, second, clusters = [], [], []
    for split in splits:
        _, _, ask, test = games(split)
        n = len(test.answer)
        for into, method in ((first, BASE), (second, name)):
            packed = np.frombuffer(base64.b64decode(cells[method, split]["right"]), np.uint8)
            into.append(np.unpackbits(packed)[:n].astype(bool))
        meant = np.take_along_axis(ask.objects, ask.answer[:, None], 1)[:, 0]
        clusters.append(np.array([f"{split}/{one}" for one in meant]))
    one, two = (np.concatenate(x)[None] for x in (first, second))
    return difference(one, two, np.concatenate(clusters))


def draw(file: Path, drawn: list[tuple[str, float, float, float]]) -> None:
    """Draw the differences with their intervals."""
    fig, axes = figure(1, 1, width=6.0, height=0.28 * len(drawn) + 0.9)
    axis = np.ravel(axes)[0]
    for i, (_, gap, low, high) in enumerate(drawn[::-1]):
        axis.plot([100 * low, 100 * high], [i, i], color="#0072B2")
        axis.plot([100 * gap], [i], "o", color="#0072B2", markersize=4)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(drawn)), [name for name, *_ in drawn[::-1]])
    axis.set_xlabel(f"points above {BASE}")
    save_figure(fig, file)


def main() -> None:
    """Run the cells that are asked for and not done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepared", type=Path, help="folder of `jaxsys ground prepare`")
    parser.add_argument("--smoke", action="store_true", help="procedural toys, few steps")
    parser.add_argument(
        "--splits", nargs="*", default=[f"object-{i}" for i in range(5)] + ["library"]
    )
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument(
        "--cut", type=int, default=LITE0_CUT, help="first block of Lite0 that is adapted"
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--adapter-lr", type=float)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after so many")
    parser.add_argument("--out", type=Path, default=RESULTS / "furniture.jsonl")
    options = parser.parse_args()
    if options.smoke:
        task = toys()
        Settings.objects, Settings.batch, Settings.steps, Settings.hidden = 8, 16, 3, (16,)
        Settings.rank = 1
        options.splits = ["object-0"]
        options.methods = ["no text", BASE, "DA4LG", "DA4LG, full fine-tune", "DA4LG, 1 view"]
        options.methods += ["ridge", "DA4LG + ridge"]
        options.out = Path(tempfile.mkdtemp(), "furniture.jsonl")
    elif options.prepared is None:
        sys.exit("name a folder that `jaxsys ground prepare` wrote: --prepared FOLDER, or --smoke")
    else:
        task = furniture(options.prepared, options.cut)
    for name in ("steps", "lr", "adapter_lr"):
        if getattr(options, name) is not None:
            setattr(Settings, name, getattr(options, name))
    PATTERNS[0] = task.encoder.patterns
    begin_s = time.perf_counter()
    # A method's splits follow each other, so that its programs are compiled once.
    for name in options.methods:
        for split in options.splits:
            if (name, split) in read_cells(options.out):
                continue
            if time.perf_counter() - begin_s > 60 * options.minutes:
                break
            method = METHODS[name]
            if dict(method.options).get("pooling") == "one":
                views, texts = task.prepared.features.shape[-1], task.games(split)[0].text.shape[-1]
                SINGLE.add(grounder_of(method, views, texts, task.encoder.encode)[0])
            found = run_cell(task, method, split, seed_of(split))
            told = {"method": name, "split": split, "cut": options.cut, "steps": Settings.steps}
            append_jsonl(options.out, told | found)
            shown = {k: round(found[k], 4) for k in ("all", "same_noun", "took_s") if found[k]}
            print(name, split, shown, flush=True)
    write_table(options.out, read_cells(options.out), task.games)
    print(options.out.with_suffix(".md").read_text())


def seed_of(split: str) -> int:
    """Give the seed of a split's training."""
    return int(split.partition("-")[2] or 0)


if __name__ == "__main__":
    main()
