"""Pruning metrics scored per second (masks and perplexity), beside PyTorch one by one.

    python experiments/prune/throughput.py            8 windows, then one: about 2 minutes each on
                                                      2 idle cores
    python experiments/prune/throughput.py --windows 8
    python experiments/prune/throughput.py --smoke    a minute, nothing written

Needs `JAXSYS_DATA` and the extra `parity` (torch, transformers). The model is stories260K, the
expressions are random ones of Pruner-Zero's space whose masks all differ, so that nothing is looked
up; both sides remove half of every row of all 35 matrices and compute the mean loss of the same
tokens. PyTorch evaluates one tree after another as the released code does: recursion over the tree
on each layer, a stable sort of each row, a scattered mask, the model of `transformers` in
evaluation mode, windows one at a time; a second row gives it all windows at once. We are measured
on one device, and with the individuals spread over as many CPU devices as there are cores. All
sides alternate in one run on the same machine, and the ratio is the median over rounds with a
bootstrap interval. The floor is the time of our forward passes alone.

The last table takes the children of a search's seventh generation as they come: those whose masks
were met before are looked up, and PyTorch, one by one, scores them again.

Expected: see results/throughput.md; both sides give the same losses to three digits.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.cluster.join import join
from jaxsys.core.measure import Timing, interleaved, machine, ratio
from jaxsys.core.mesh import replica_mesh
from jaxsys.core.report import atomic_write, markdown_table
from jaxsys.data import read_text
from jaxsys.evaluate.open import open_model
from jaxsys.models import lm
from jaxsys.prune.genetic import EVOLVE, GeneticConfig, first_state, step
from jaxsys.prune.population import Known, Scoring, evaluate, none_known, stack_layers
from jaxsys.prune.search_model import LmLoss, draw_texts, lm_statistics
from jaxsys.search import evolve
from jaxsys.search.interpret import run_many
from jaxsys.search.programs import decode, random_programs, to_string
from jaxsys.search.shard import over_individuals, replicate

RESULTS = Path(__file__).parent / "results"


def torch_tree(torch: Any, tree: Any, inputs: dict[str, Any]) -> Any:
    """Evaluate a tree on one layer by recursion."""
    symbol, *children = tree
    if not children:
        return inputs[symbol]
    x, *rest = (torch_tree(torch, child, inputs) for child in children)
    unary: dict[str, Callable[[Any], Any]] = {
        "sqr": lambda x: x * x,
        "pow": lambda x: torch.pow(x, 2),
        "neg": lambda x: -x,
        "abs": torch.abs,
        "log": lambda x: torch.log(torch.abs(x) + 0.001),
        "sqrt": lambda x: torch.sqrt(torch.abs(x)),
        "tanh": torch.tanh,
        "skp": lambda x: x,
        "mms": lambda x: (x - x.min()) / (x.max() - x.min()),
        "zsn": lambda x: (x - x.mean()) / x.std(),
        "exp": lambda x: torch.exp(torch.minimum(x, torch.tensor(100.0))),
    }
    if symbol in unary:
        return unary[symbol](x)
    (y,) = rest
    if symbol == "div":
        return x / torch.norm(y)
    return {"add": torch.add, "sub": torch.sub, "mul": torch.mul}[symbol](x, y)


def torch_side(params: Any, config: Any, stats: Any, tokens: np.ndarray) -> Any:
    """Make (trees, windows at a time) -> losses."""
    import torch
    import transformers

    folder = Path(tempfile.mkdtemp())
    lm.save(folder, params, config)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    weights = dict(model.named_parameters())
    dense = {name: weights[f"{name}.weight"].detach().clone() for name in stats}
    held = {
        name: {
            "W": dense[name].abs(),
            "G": torch.from_numpy(np.array(s.G)),
            "X": torch.from_numpy(np.array(s.X))[None],
        }
        for name, s in stats.items()
    }
    ids = torch.from_numpy(tokens.astype(np.int64))

    def loss(at_once: int) -> float:
        total = 0.0
        for begin in range(0, len(ids), at_once):
            part = ids[begin : begin + at_once]
            logits = model(part, use_cache=False).logits[:, :-1]
            nats = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), part[:, 1:].reshape(-1)
            )
            total += nats.item() * len(part)
        return total / len(ids)

    def score(trees: list[Any], at_once: int) -> list[float]:
        found = []
        with torch.no_grad():
            for tree in trees:
                for name, inputs in held.items():
                    weight = weights[f"{name}.weight"]
                    scores = torch_tree(torch, tree, inputs).expand_as(weight)
                    order = torch.sort(scores, dim=-1, stable=True)[1]
                    removed = torch.zeros_like(weight, dtype=torch.bool)
                    removed.scatter_(1, order[:, : weight.shape[1] // 2], True)
                    weight.copy_(dense[name])
                    weight[removed] = 0
                found.append(loss(at_once))
        return found

    return torch, score


def different(scoring: Scoring, layers: Any, params: Any, tokens: Any, n: int) -> np.ndarray:
    """Draw programs of finite loss whose masks all differ."""
    kept: list[np.ndarray] = []
    prints: set[tuple[int, ...]] = set()
    for seed in range(50):
        drawn = random_programs(scoring.grammar, n, seed=seed)
        found = evaluate(jnp.asarray(drawn), layers, params, tokens, none_known(), scoring)
        fine = np.isfinite(np.asarray(found.fitness))
        for program, mark, good in zip(drawn, np.asarray(found.fingerprints), fine, strict=True):
            if good and tuple(mark) not in prints:
                prints.add(tuple(mark))
                kept.append(program)
        if len(kept) >= n:
            return np.stack(kept[:n])
    raise RuntimeError(f"only {len(kept)} of {n} programs found")


def batching_row(grammar: Any, size: int, programs: Any, rounds: int) -> dict[str, Any]:
    """Compare the interpreter's two ways on matrices of one size."""
    rng = np.random.default_rng(0)
    x = {n: jnp.asarray(rng.normal(size=(size, size)), jnp.float32) for n in ("W", "G")}
    x["X"] = jnp.asarray(rng.normal(size=(1, size)), jnp.float32)
    both = {
        b: partial(jax.jit(partial(run_many, grammar, batching=b)), programs, x)
        for b in ("map", "vmap")
    }
    times = interleaved(both, runs=rounds, warmup=1)
    return {
        "matrix": f"{size} × {size}",
        "map, expressions/s": f"{len(programs) / times['map'].median_s:.0f}",
        "vmap, expressions/s": f"{len(programs) / times['vmap'].median_s:.0f}",
        "vmap / map, time": f"{ratio(times['vmap'], times['map']):.2f}",
    }


def children_of_a_search(
    scoring: Scoring, layers: Any, params: Any, tokens: Any, n: int, generations: int
) -> tuple[Any, Known]:
    """Search for some generations and give the next children and what is known by then."""
    config = GeneticConfig(replace(EVOLVE, population=n))
    state = first_state(scoring.grammar, config)
    for _ in range(generations):
        arrays = (state.population.programs, layers, params, tokens)
        state, _ = step(state, *arrays, config=config.evolve, scoring=scoring)
    _, children = evolve.offspring(scoring.grammar, config.evolve, state.population)
    return children, Known(state.archive.fingerprints, state.archive.fitness)


def forward_passes(loss_fn: Any, n: int, mesh: Any) -> Any:
    """Make n forward passes, on weights that differ so that none is hoisted."""

    def all_(factors: Any, params: Any, tokens: Any) -> Any:
        def one(factor: Any) -> Any:
            return loss_fn(jax.tree.map(lambda w: w * factor, params), tokens)

        return jax.lax.map(one, factors)

    factors = 1 + 1e-6 * jnp.arange(n, dtype=jnp.float32)
    return partial(jax.jit(over_individuals(all_, mesh)), factors)


def measure(n: int, n_torch: int, rounds: int, windows: int, length: int) -> str:
    opened = open_model("stories260k")
    params, config = opened.model.params, opened.config
    text = read_text(Path(os.environ["JAXSYS_DATA"]) / "text" / "tinystories_sample.txt")[:300_000]
    ids = np.concatenate([opened.tokenizer.encode(s.strip()) for s in text.split("<|endoftext|>")])
    parts = draw_texts(ids, (8, windows, 1), length)
    scoring = Scoring(LmLoss(config))
    stats = lm_statistics(params, config, parts.statistics, ("G",))
    layers, tokens = stack_layers(params, stats, scoring), jnp.asarray(parts.fitness)
    programs = jnp.asarray(different(scoring, layers, params, tokens, n))
    children, known = children_of_a_search(scoring, layers, params, tokens, n, 6)
    torch, score = torch_side(params, config, stats, parts.fitness)
    mesh = replica_mesh()
    own = {"one": ((layers, params, tokens), None)}
    own["spread"] = (replicate((layers, params, tokens), mesh), mesh)

    def ours(where: str, programs: Any, known: Known) -> Any:
        arrays, mesh = own[where]
        return evaluate(programs, *arrays, known, scoring, mesh)

    few = {k: np.asarray(p)[:: n // n_torch] for k, p in (("all", programs), ("met", children))}
    trees = {k: [decode(scoring.grammar, p) for p in found] for k, found in few.items()}
    losses = np.asarray(ours("one", programs, none_known()).fitness)[:: n // n_torch]
    gap = np.abs(np.array(score(trees["all"], windows)) - losses)
    worst = to_string(scoring.grammar, few["all"][int(gap.argmax())])
    fresh = int(jnp.sum(ours("one", children, known).fresh))
    jobs: dict[str, Any] = {}
    for where, (arrays, mesh) in own.items():
        jobs[f"{where} all"] = partial(ours, where, programs, none_known())
        jobs[f"{where} met"] = partial(ours, where, children, known)
        forwards = forward_passes(scoring.loss_fn, n, mesh)
        jobs[f"{where} floor"] = partial(forwards, *arrays[1:])
    for k, found in trees.items():
        jobs |= {f"torch 1 {k}": partial(score, found, 1)}
        jobs |= {f"torch {windows} {k}": partial(score, found, windows)}
    times = interleaved(jobs, warmup=1, runs=rounds)

    def each(name: str) -> Timing:
        t, count = times[name], n_torch if name.startswith("torch") else n
        return Timing(name, tuple(s / count for s in t.seconds), t.median_s / count, t.ci_s)

    def table(kind: str) -> str:
        rows = [
            {
                "ours": f"{len(jax.devices())} devices" if where == "spread" else "1 device",
                "PyTorch": f"{at_once} of {windows} windows at a time",
                "ours, expressions/s": f"{1 / each(f'{where} {kind}').median_s:.1f}",
                "PyTorch, expressions/s": f"{1 / each(f'torch {at_once} {kind}').median_s:.1f}",
                "ratio": f"{ratio(each(f'torch {at_once} {kind}'), each(f'{where} {kind}')):.2f}",
            }
            for where in own
            for at_once in dict.fromkeys((1, windows))
        ]
        return markdown_table(rows)

    shares = [ratio(each(f"{w} floor"), each(f"{w} all")) for w in own]
    floors = [f"{100 * s.median:.0f} % [{100 * s.ci[0]:.0f}, {100 * s.ci[1]:.0f}]" for s in shares]
    return (
        f"{machine()}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads.\n\n"
        f"{n} expressions of different masks a call for us, {n_torch} of them for PyTorch, loss of "
        f"{windows} windows of {length} tokens, {rounds} interleaved rounds; medians, ratios with "
        f"95 % bootstrap intervals.\n\n{table('all')}\n"
        f"Our forward passes alone take {floors[0]} of our time on one device and {floors[1]} of "
        "it on several. The largest difference of a loss between the two sides is "
        f"{gap.max():.2g} nats (`{worst}`).\n\nThe {n} children of a search's seventh generation "
        f"({fresh} of them with finite scores and masks that were not met before):\n\n"
        f"{table('met')}\n"
    )


def batching_table(rounds: int) -> str:
    grammar = Scoring(lambda params, tokens: 0.0).grammar
    programs = random_programs(grammar, 16)
    rows = [batching_row(grammar, size, programs, rounds) for size in (64, 256)]
    return (
        "The interpreter alone, 16 expressions, mapped over programs (a true branch for each "
        f"instruction) or vectorised (all operators computed):\n\n{markdown_table(rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--windows", type=int, choices=(8, 1), help="one of the parts alone")
    given = parser.parse_args()
    join(local_devices=os.cpu_count() or 1)
    if not os.environ.get("JAXSYS_DATA"):
        print("JAXSYS_DATA is not set, so there is no model to prune")
        return
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        print("PyTorch or transformers is missing: pip install 'jaxsys[parity]'")
        return
    if given.smoke:
        print(measure(8, 2, 1, 2, 64))
        return
    for windows in (8, 1) if given.windows is None else (given.windows,):
        text = measure(64, 16, 5, windows, 128) + (batching_table(3) if windows == 8 else "")
        atomic_write(RESULTS / f"throughput_{windows}.md", text)
        print(text)
    parts = [RESULTS / f"throughput_{windows}.md" for windows in (8, 1)]
    text = "# Scoring expressions on stories260K, beside PyTorch\n\n"
    text += "\n\n".join(part.read_text() for part in parts if part.exists())
    atomic_write(RESULTS / "throughput.md", text)


if __name__ == "__main__":
    main()
