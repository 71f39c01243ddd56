"""The merges that Mediator is compared with, settings chosen on the validation split."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from family import Batch, stream
from scoring import Bench, Score, mean, summed

from jaxsys.core.tree import flatten
from jaxsys.merge import merge_tree
from jaxsys.merge.adamerging import AdaConfig, adamerge, mean_entropy
from jaxsys.merge.emr import emr
from jaxsys.merge.fisher import diagonal_fisher, fisher_merge
from jaxsys.merge.linear import TaskArithmetic
from jaxsys.merge.pcb import pcb
from jaxsys.merge.regmean import collect_grams, lm_inputs, regmean_merge
from jaxsys.merge.routed import Routed, cost, materialise
from jaxsys.merge.tall import consensus, tall
from jaxsys.merge.ties import Dare, Della, Ties
from jaxsys.merge.twin import twin
from jaxsys.merge.wemoe import (
    GateConfig,
    even_weights,
    gate_weights,
    init_gates,
    train_gates,
    wemoe,
)
from jaxsys.models import lm

BF16 = jnp.dtype(jnp.bfloat16)
LAMBDAS = (0.15, 0.3, 0.5, 0.8)


class Entry(NamedTuple):
    """One line of the table: scores, stored bytes over one model's, and what was chosen."""

    tasks: dict[str, Score]
    ratio: float
    chosen: dict[str, Any]


def select(
    bench: Bench, make: Callable[..., Any], grid: Iterable[dict[str, Any]]
) -> tuple[Any, dict[str, Any]]:
    """Take the settings whose merge has the highest mean accuracy on the validation split."""
    best: tuple[float, Any, dict[str, Any]] | None = None
    grid = list(grid)
    for settings in grid:
        merged = make(**settings)
        right = mean(bench.scores(merged, "valid")).accuracy if len(grid) > 1 else 0.0
        if best is None or right > best[0]:
            best = (right, merged, settings)
    assert best is not None
    return best[1], best[2]


def plain(bench: Bench, small: bool) -> Iterator[tuple[str, Callable[[], Entry]]]:
    """List the merges that give one model; `small` tries fewer settings."""
    base, models = bench.base, bench.experts
    lambdas = (0.3, 0.5) if small else LAMBDAS
    key = jax.random.key(bench.seed)

    def entry(make: Callable[..., Any], grid: Iterable[dict[str, Any]]) -> Entry:
        merged, chosen = select(bench, make, grid)
        return Entry(bench.scores(merged), 1.0, chosen)

    def merge(name: str, config: Any) -> Any:
        return merge_tree(name, models, base=base, config=config, key=key, weights=[1.0] * bench.n)

    yield "base", lambda: Entry(bench.scores(base), 1.0, {})
    for i, task in enumerate(bench.tasks):
        yield f"expert {task}", lambda i=i: Entry(bench.scores(models[i]), 1.0, {})
    yield "average", lambda: Entry(bench.scores(merge_tree("linear", models)), 1.0, {})
    yield (
        "task arithmetic",
        lambda: entry(
            lambda lam: merge("task_arithmetic", TaskArithmetic(lambda_=lam)),
            [{"lam": lam} for lam in lambdas],
        ),
    )
    yield (
        "TIES",
        lambda: entry(
            lambda lam, density: merge("ties", Ties(density=density, lambda_=lam)),
            [{"lam": lam, "density": d} for lam in (0.8, 1.2) for d in (0.2, 0.5)],
        ),
    )
    yield (
        "DARE",
        lambda: entry(
            lambda lam, density: merge(
                "dare_linear", Dare(density=density, lambda_=lam, rescale="expected")
            ),
            [{"lam": lam, "density": 0.5} for lam in lambdas],
        ),
    )
    yield (
        "DELLA",
        lambda: entry(
            lambda lam, density: merge("della", Della(density=density, lambda_=lam)),
            [{"lam": lam, "density": 0.5} for lam in (0.8, 1.2)],
        ),
    )
    if not small:
        yield (
            "PCB",
            lambda: entry(
                lambda ratio, scale: pcb(base, models, ratio=ratio, scale=scale),
                [{"ratio": r, "scale": s} for r in (0.1, 0.3) for s in (1.0, 1.5)],
            ),
        )
        yield (
            "Consensus",
            lambda: entry(
                lambda strictness, amount: consensus(
                    base, models, strictness=strictness, scale=0.3, amount=amount
                ),
                [{"strictness": s, "amount": a} for s in (0.2, 0.6) for a in (1.0, 2.0)],
            ),
        )
    yield "Fisher", lambda: Entry(bench.scores(fisher(bench, 6 if small else 48)), 1.0, {})
    yield "RegMean", lambda: regmean(bench, (0.9,) if small else (0.5, 0.9, 0.99))
    yield "AdaMerging", lambda: ada(bench, 6 if small else 60)


def examples(bench: Bench, task: str, count: int) -> list[Batch]:
    """Give training examples of a task, in batches of one step."""
    rows, found, i = stream(bench.family, task, 1000 + bench.seed), [], 0
    while sum(len(b.tokens) for b in found) < count:
        found.append(rows(i))
        i += 1
    return found


def read_mask(batch: Batch) -> np.ndarray:
    """Mark the tokens up to the last that is scored: all that are no padding."""
    return np.flip(np.cumsum(np.flip(batch.mask, 1), axis=1), 1) > 0


def fisher(bench: Bench, count: int) -> Any:
    """Merge by diagonal Fisher information, of the training labels."""
    config = bench.config

    def loss(params: Any, example: Batch) -> jax.Array:
        return lm.loss(params, config, example.tokens[None], example.mask[None])

    found = []
    for task, model in zip(bench.tasks, bench.experts, strict=True):
        rows = [x for b in examples(bench, task, count) for x in _pieces(b, 8)][: -(-count // 8)]
        rows = rows if bench.family.name == "stories" else [x for b in rows for x in _pieces(b, 1)]
        found.append(diagonal_fisher(loss, model, rows[:count]))
    return fisher_merge(bench.experts, found)


def _pieces(batch: Batch, size: int) -> list[Batch]:
    n = len(batch.tokens) // size * size or len(batch.tokens)
    return [Batch(*(x[i : i + size] for x in batch)) for i in range(0, n, size)]


def regmean(bench: Bench, alphas: tuple[float, ...]) -> Entry:
    """Merge by RegMean over all matrices of the blocks."""
    paths = [p for p, x in flatten(bench.base).items() if ".layers." in p and x.ndim == 2]
    inputs = lm_inputs(bench.config, paths)
    grams = [
        collect_grams(inputs, model, [(b.tokens, read_mask(b)) for b in examples(bench, task, 24)])
        for task, model in zip(bench.tasks, bench.experts, strict=True)
    ]
    merged, chosen = select(
        bench,
        lambda alpha: regmean_merge(bench.experts, grams, alpha=alpha),
        [{"alpha": a} for a in alphas],
    )
    return Entry(bench.scores(merged), 1.0, chosen)


def entropy_fn(bench: Bench) -> Callable[[Any, Batch], jax.Array]:
    """Make (params, batch) to the mean entropy of the predictions that are scored."""

    def entropy(params: Any, batch: Batch) -> jax.Array:
        logits = lm.apply(params, bench.config, batch.tokens[:, :-1]).logits
        return mean_entropy(logits, batch.mask[:, 1:])

    return entropy


def unlabelled(bench: Bench, task: str, i: int, rows: int) -> Batch:
    """Give some rows of the validation split, in turn."""
    batch = bench.batch(task, "valid")
    rows = min(rows, len(batch.tokens))
    at = (np.arange(rows) + i * rows) % len(batch.tokens)
    return Batch(batch.tokens[at], batch.mask[at])


def ada(bench: Bench, steps: int) -> Entry:
    """Merge by layer-wise AdaMerging, on unlabelled rows of all tasks at once."""
    one = entropy_fn(bench)

    def entropy(params: Any, batches: list[Batch]) -> jax.Array:
        return sum((one(params, batch) for batch in batches), jnp.zeros(())) / len(batches)

    def batch_at(i: int) -> list[Batch]:
        return [unlabelled(bench, task, i, 4) for task in bench.tasks]

    def make(lr: float) -> Any:
        config = AdaConfig("layer", 0.3, steps, lr)
        return adamerge(entropy, bench.base, bench.experts, batch_at, config).params

    # The entropy can fall to nothing with all that was learned: validation chooses how far to go.
    merged, chosen = select(bench, make, [{"lr": lr} for lr in (1e-3, 1e-2)])
    return Entry(bench.scores(merged), 1.0, chosen | {"steps": steps})


def routed(bench: Bench, small: bool) -> Iterator[tuple[str, Callable[[], Entry]]]:
    """List the routed relatives; EMR, TALL and Twin are told the task, WEMoE finds it."""
    base, models = bench.base, bench.experts

    def told(made: Routed, chosen: dict[str, Any]) -> Entry:
        served = [materialise(made, w, dtype=jnp.dtype("float32")) for w in jnp.eye(bench.n)]
        return Entry(bench.scores(served), cost(made).ratio, chosen)

    yield "EMR", lambda: told(emr(base, models, dtype=BF16), {})
    yield "TALL masks", lambda: told(tall(base, models, strictness=0.4, scale=0.3, dtype=BF16), {})

    def twins(density: float, bits: Any) -> Entry:
        shared = merge_tree("linear", models)
        made = twin(shared, models, density=density, bits=bits, dtype=BF16)
        return told(made, {"density": density, "bits": bits})

    yield "Twin, 10 %", lambda: twins(0.1, 16)
    yield "Twin, 20 %", lambda: twins(0.2, 16)
    if not small:
        yield "WEMoE", lambda: experts_of_weights(bench)
    yield "ideal routing", lambda: Entry(bench.scores(list(models)), float(bench.n), {})


def experts_of_weights(bench: Bench, steps: int = 80) -> Entry:
    """Train WEMoE's gates and serve every row by its own weights."""
    config, n = bench.config, bench.n
    made = wemoe(bench.base, bench.experts, dtype=BF16)
    layers = [lm.layer_prefix(config, i) for i in range(config.layers)]
    taps = tuple(f"{layer}.mlp:in" for layer in layers)

    def hidden_fn(params: Any, batch: Batch) -> Any:
        tokens, mask = batch.tokens, jnp.asarray(batch.mask)
        before = jnp.cumsum(mask, axis=1) == 0
        found = lm.apply(params, config, tokens, taps=taps).taps
        return {layer: found[tap] for layer, tap in zip(layers, taps, strict=True)}, before

    wide = Routed({p: x.astype(jnp.float32) for p, x in made.shared.items()}, made.parts)
    gates = init_gates(jax.random.key(bench.seed), layers, config.width, n)
    gates, losses = train_gates(
        gates,
        wide,
        hidden_fn,
        entropy_fn(bench),
        lambda i: unlabelled(bench, bench.tasks[i % n], i // n, 8),
        GateConfig(steps, 3e-3),
    )
    reference = materialise(wide, even_weights(wide, 0.3))
    paths = tuple(wide.parts)

    @jax.jit
    def serve(tokens: Any, mask: Any) -> Any:
        def one(row: Any, counts: Any) -> Any:
            hidden, before = hidden_fn(reference, Batch(row[None], counts[None]))
            params = materialise(wide, gate_weights(gates, hidden, before, paths))
            return tuple(x[0] for x in bench.score_rows(params, row[None], counts[None]))

        return jax.lax.map(lambda pair: one(*pair), (tokens, mask))

    found = {task: summed(*serve(*bench.batch(task, "test"))) for task in bench.tasks}
    gate_bytes = 2 * sum(x.size for x in jax.tree.leaves(gates))
    spent = cost(made)
    ratio = (spent.stored_bytes + gate_bytes) / spent.model_bytes
    return Entry(found, ratio, {"steps": steps, "entropy": losses[-1]})
