"""Pruning metrics scored per second (masks and perplexity), beside PyTorch one by one.

    python experiments/prune/throughput.py            about 4 minutes on 2 idle cores
    python experiments/prune/throughput.py --smoke    half a minute, nothing written

Needs `JAXSYS_DATA` and the extra `parity` (torch, transformers). The model is stories260K, the
expressions are random ones of Pruner-Zero's space whose masks all differ, so that nothing is looked
up; both sides remove half of every row of all 35 matrices and compute the mean loss of the same
tokens. PyTorch evaluates one tree after another as the released code does: recursion over the tree
on each layer, a stable sort of each row, a scattered mask, the model of `transformers` in
evaluation mode, windows one at a time; a second row gives it all windows at once. All sides
alternate in one run on the same machine, and the ratio is the median over rounds with a bootstrap
interval. The floor is the time of our forward passes alone.

Expected: see results/throughput.md; both sides give the same losses to three digits.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.measure import Timing, interleaved, machine, ratio
from jaxsys.core.report import atomic_write, markdown_table
from jaxsys.data import read_text
from jaxsys.evaluate.open import open_model
from jaxsys.models import lm
from jaxsys.prune.population import Scoring, evaluate, none_known, stack_layers
from jaxsys.prune.search_model import LmLoss, draw_texts, lm_statistics
from jaxsys.search.interpret import run_many
from jaxsys.search.programs import decode, random_programs, to_string

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


def measure(n: int, n_torch: int, rounds: int, windows: int, length: int) -> str:
    opened = open_model("stories260k")
    params, config = opened.model.params, opened.config
    text = read_text(Path(os.environ["JAXSYS_DATA"]) / "text" / "tinystories_sample.txt")[:300_000]
    ids = np.concatenate([opened.tokenizer.encode(s.strip()) for s in text.split("<|endoftext|>")])
    parts = draw_texts(ids, (8, windows, 1), length)
    scoring = Scoring(LmLoss(config))
    stats = lm_statistics(params, config, parts.statistics, ("G",))
    layers, tokens = stack_layers(params, stats, scoring), jnp.asarray(parts.fitness)
    programs = different(scoring, layers, params, tokens, n)
    arrays = (jnp.asarray(programs), layers, params, tokens, none_known(), scoring)
    ours = np.asarray(evaluate(*arrays).fitness)
    torch, score = torch_side(params, config, stats, parts.fitness)
    few = programs[:: n // n_torch][:n_torch]
    trees = [decode(scoring.grammar, p) for p in few]
    theirs = np.array(score(trees, windows))
    gap = np.abs(theirs - ours[:: n // n_torch][:n_torch])
    worst = to_string(scoring.grammar, few[int(gap.argmax())])

    @jax.jit
    def forwards(params: Any, tokens: Any) -> Any:
        """Run as many forward passes, on weights that differ so that none is hoisted."""

        def one(i: Any) -> Any:
            return scoring.loss_fn(jax.tree.map(lambda w: w * (1 + 1e-6 * i), params), tokens)

        return jax.lax.map(one, jnp.arange(n, dtype=jnp.float32))

    times = interleaved(
        {
            "ours": lambda: evaluate(*arrays).fitness,
            "floor": lambda: forwards(params, tokens),
            "one": lambda: score(trees, 1),
            "all": lambda: score(trees, windows),
        },
        warmup=1,
        runs=rounds,
    )

    def each(name: str, count: int) -> Timing:
        t = times[name]
        return Timing(name, tuple(s / count for s in t.seconds), t.median_s / count, t.ci_s)

    a, floor = each("ours", n), each("floor", n)
    rows = [
        {
            "PyTorch": name,
            "ours, expressions/s": f"{1 / a.median_s:.1f}",
            "PyTorch, expressions/s": f"{1 / each(key, n_torch).median_s:.1f}",
            "ratio": f"{ratio(each(key, n_torch), a):.2f}",
        }
        for key, name in (("one", "windows one at a time"), ("all", "all windows at once"))
    ]
    share = ratio(floor, a)
    batching = [batching_row(scoring.grammar, size, programs[:16], 3) for size in (64, 256)]
    return (
        f"{machine()}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads.\n\n"
        f"{n} expressions of different masks a call for us, {n_torch} of them for PyTorch, loss of "
        f"{windows} windows of {length} tokens, {rounds} interleaved rounds; medians, ratios with "
        f"95 % bootstrap intervals.\n\n{markdown_table(rows)}\n"
        f"Our forward passes alone take {100 * share.median:.0f} % [{100 * share.ci[0]:.0f}, "
        f"{100 * share.ci[1]:.0f}] of our time. The largest difference of a loss between the two "
        f"sides is {gap.max():.2g} nats (`{worst}`).\n\n"
        "The interpreter alone, 16 expressions, mapped over programs (a true branch for each "
        f"instruction) or vectorised (all operators computed):\n\n{markdown_table(batching)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
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
    parts = [measure(64, 16, 5, windows, length) for windows, length in ((8, 128), (1, 128))]
    text = "# Scoring expressions on stories260K, beside PyTorch\n\n" + "\n".join(parts)
    atomic_write(RESULTS / "throughput.md", text)
    print(text)


if __name__ == "__main__":
    main()
