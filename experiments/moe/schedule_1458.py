"""The paper's 1,458 layer configurations, planned in one call: modelled speed-ups over Tutel.

    python experiments/moe/schedule_1458.py            half a minute
    python experiments/moe/schedule_1458.py --smoke    the same on 54 configurations, no files

Nothing here ran on a cluster: every time is MODELLED, from coefficients that FSMoE (arXiv
2501.10714) publishes for its Testbed-B (8 nodes of 4 RTX 2080 Ti, 100 Gb/s), beside the mean
speed-ups that the paper MEASURED there.

The grid: B {1,2,4} × heads {8,16,32} × L {256,512,1024} × M {1024,2048,4096} × H/M {2,3,4} × f
{1.2, 2.4, no drop} × experts of two or three matrices; k = 2, N_ESP = N_MP = 4, a stack of 12 equal
layers. (The number of heads changes no modelled time.) Two sets of inputs:

- ``fits``: the published α and β; attention on the line of the experts.
- ``table 2``: lines through the two Testbed-B rows of the paper's Table 2 (GPT2-XL and Mixtral-7B,
  B = 4, L = 1024), attention, gate and order included. Its times are 3 (experts) to 9 (all-to-all)
  times those of the fits at the volumes of the released code, which the paper does not explain.

Choices that the paper leaves open: no drop counts as balanced; every baseline takes the best degree
for forward plus backward; Tutel's and Lina's gradients are merged into as few messages as possible;
FSMoE's gradients are placed exactly, which is at least as good as its differential evolution.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsys.core.cost import LinearCost
from jaxsys.core.measure import bootstrap_ci, machine
from jaxsys.core.report import atomic_write, figure, markdown_table, save_figure, write_jsonl
from jaxsys.moe.costs import TESTBED_B, Costs
from jaxsys.moe.degrees import DEGREES
from jaxsys.moe.systems import SYSTEMS, Stack, schedule
from jaxsys.moe.volumes import Shape, Volumes, dense_gradient, dense_work, stack, volumes

RESULTS = Path(__file__).parent / "results"
LAYERS = 12
RANKS = 4
NAMES = ("serial", "tutel", "tutel-improved", "lina", "no-iio", "fsmoe-exact", "jaxsys")
PAPER = {"tutel-improved": 1.08, "no-iio": 1.16, "fsmoe-exact": 1.22}
LABELS = {
    "serial": "no overlap (DeepSpeed-MoE)",
    "tutel": "Tutel + PipeMoE",
    "tutel-improved": "Tutel-Improved",
    "lina": "PipeMoE + Lina",
    "no-iio": "FSMoE without intra/inter overlap",
    "fsmoe-exact": "FSMoE",
    "jaxsys": "jaxsys (degrees 1, 2, 4, 8)",
    "jaxsys, any degree": "jaxsys (any degree from 1 to 16)",
}

# Testbed-B of Table 2, ms: (forward GPT2-XL, forward Mixtral, backward GPT2-XL, backward Mixtral).
TABLE_2 = {
    "all_to_all": (11.2, 28.3, 11.2, 30.8),
    "all_gather": (15.5, 39.6, 15.5, 40.1),
    "reduce_scatter": (15.7, 40.8, 15.2, 41.8),
    "expert": (6.7, 58.5, 13.0, 119.7),
    "all_reduce": (None, None, 7.3, 32.1),
    "attention": (4.5, 9.5, 8.6, 18.1),
}
GATE_AND_ORDER_S = 0.4e-3
GPT2_XL = Shape(4, 1024, 1600, 6400, expert_ranks=RANKS, dense_ranks=RANKS)
MIXTRAL = Shape(4, 1024, 4096, 14336, matmuls=3, expert_ranks=RANKS, dense_ranks=RANKS)


def through(sizes: tuple[float, float], ms: tuple[float, float]) -> LinearCost:
    """Draw the line through two points, through zero where it would start below."""
    beta = (ms[1] - ms[0]) / (sizes[1] - sizes[0])
    alpha = max(0.0, ms[0] - beta * sizes[0])
    if alpha == 0.0:
        beta = float(np.dot(sizes, ms) / np.dot(sizes, sizes))
    return LinearCost(alpha * 1e-3, beta * 1e-3, 1.0, 0.0, 2)


def table_2() -> tuple[Costs, LinearCost]:
    """Fit the five operations and the attention to the forward times of Table 2."""
    both = [volumes(GPT2_XL), volumes(MIXTRAL)]
    lines = {}
    for name in Volumes._fields:
        lines[name] = through(tuple(float(getattr(v, name)) for v in both), TABLE_2[name][:2])
    gradients = (dense_gradient(GPT2_XL), dense_gradient(MIXTRAL))
    lines["all_reduce"] = through(gradients, TABLE_2["all_reduce"][2:])
    work = (dense_work(GPT2_XL), dense_work(MIXTRAL))
    return Costs(**lines), through(work, TABLE_2["attention"][:2])


def grid(smoke: bool = False) -> list[Shape]:
    """List the configurations, with one entry for each number of heads."""
    few = (1,) if smoke else (1, 2, 4)
    return [
        Shape(b, tokens, m, ratio * m, 2, f, matmuls, RANKS, RANKS)
        for b, _heads, tokens, m, ratio, f, matmuls in itertools.product(
            few,
            (8,) if smoke else (8, 16, 32),
            (256,) if smoke else (256, 512, 1024),
            (1024, 2048, 4096),
            (2, 3, 4),
            (1.2, 2.4, None),
            (2, 3),
        )
    ]


def stacks(shapes: list[Shape], attention: LinearCost) -> Stack:
    """Turn configurations into stacks of equal layers, fields [N, L]."""
    repeat = np.ones((1, LAYERS))
    each = stack([volumes(shape) for shape in shapes])
    work = np.array([dense_work(shape) for shape in shapes])
    dense_s = (attention(work) + GATE_AND_ORDER_S)[:, None] * repeat
    gradients = np.array([dense_gradient(shape) for shape in shapes])[:, None] * repeat
    return Stack(Volumes(*(n[:, None] for n in each)), dense_s, 2 * dense_s, gradients)


def planner(costs: Costs, degrees: tuple[int, ...], names: tuple[str, ...], width: int = 64) -> Any:
    """Make one compiled call that plans every configuration under every system."""

    def plan_all(layers: Stack) -> dict[str, Any]:
        one = {
            name: lambda s, name=name: schedule(SYSTEMS[name], costs, s, degrees, width=width)
            for name in names
        }
        return {name: jax.vmap(plan)(layers) for name, plan in one.items()}

    return jax.jit(plan_all)


def timed(run: Any, layers: Stack) -> tuple[Any, float, float]:
    """Run once to compile, then five times; return the result, compile and median seconds."""
    begin = time.perf_counter()
    found = jax.block_until_ready(run(layers))
    compile_s = time.perf_counter() - begin
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(run(layers))
        times.append(time.perf_counter() - begin)
    return jax.tree.map(np.asarray, found), compile_s, float(np.median(times))


def study(costs: Costs, attention: LinearCost, shapes: list[Shape], wide: bool) -> dict[str, Any]:
    """Plan the grid and summarise the speed-ups over Tutel."""
    layers = stacks(shapes, attention)
    found, compile_s, ours_s = timed(planner(costs, DEGREES, ("jaxsys",)), layers)
    found = {**jax.tree.map(np.asarray, planner(costs, DEGREES, NAMES[:-1])(layers)), **found}
    if wide:
        every = tuple(range(1, 17))
        more = planner(costs, every, ("jaxsys",))(layers)
        found["jaxsys, any degree"] = jax.tree.map(np.asarray, more["jaxsys"])
    ours = found["jaxsys"]
    return {
        "seconds": {name: part.seconds for name, part in found.items()},
        "exact": float(np.mean(ours.exact)),
        "differ": int(np.sum(np.any(ours.forward != ours.backward, axis=1))),
        "overtake": int(np.sum(np.any(ours.forward_lead != ours.forward, axis=1))),
        "ours_s": ours_s,
        "compile_s": compile_s,
    }


def rows_of(seconds: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Tabulate mean speed-ups over Tutel with bootstrap intervals."""
    rows = []
    for name in (name for name in LABELS if name in seconds):
        times = seconds[name]
        gain = seconds["tutel"] / times
        low, high = bootstrap_ci(gain, statistic=np.mean, n=300)
        rows.append(
            {
                "system": LABELS[name],
                "mean speed-up (modelled)": f"{gain.mean():.3f} [{low:.3f}, {high:.3f}]",
                "10th to 90th percentile": "{:.2f} to {:.2f}".format(
                    *np.percentile(gain, [10, 90])
                ),
                "paper (measured)": PAPER.get(name),
            }
        )
    return rows


def draw(studies: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the distribution of speed-ups over Tutel, one panel for each set of inputs."""
    fig, axes = figure(1, len(studies), width=5.2, height=3.6)
    for axis, (title, found) in zip(axes[0], studies.items(), strict=True):
        seconds = found["seconds"]
        for name in ("tutel-improved", "no-iio", "fsmoe-exact", "jaxsys"):
            gain = np.sort(seconds["tutel"] / seconds[name])
            share = np.arange(1, len(gain) + 1) / len(gain)
            (line,) = axis.plot(gain, share, label=f"{LABELS[name]}: mean {gain.mean():.2f}")
            if name in PAPER:
                axis.axvline(PAPER[name], color=line.get_color(), linestyle=":", linewidth=1)
        axis.set(
            xlabel="modelled speed-up over Tutel + PipeMoE",
            ylabel="share of configurations",
            title=f"inputs: {title} (dotted: the paper's measured means)",
        )
        axis.legend(fontsize=7)
    save_figure(fig, path)


def main() -> None:
    """Plan the grid on both sets of inputs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    jax.config.update("jax_enable_x64", True)
    shapes = grid(smoke)
    measured, attention = table_2()
    inputs = {"fits": (TESTBED_B, TESTBED_B.expert), "table 2": (measured, attention)}
    studies = {name: study(*given, shapes, not smoke) for name, given in inputs.items()}
    text = [
        f"# {len(shapes)} configurations, modelled\n\n",
        "Every time is modelled; the paper's column is what it measured on its Testbed-B.\n\n",
        f"{machine()}\n\n",
    ]
    for name, found in studies.items():
        text += [
            f"## Inputs: {name}\n\n",
            markdown_table(rows_of(found["seconds"])),
            f"\nAll {len(shapes)} stacks of {LAYERS} layers planned in one call: "
            f"{found['ours_s']:.2f} s (median of 5; {found['compile_s']:.1f} s with compiling), "
            f"{found['ours_s'] / len(shapes) * 1e3:.2f} ms each. "
            f"{100 * found['exact']:.1f} % of the partitions are proven optimal in it. "
            f"{found['differ']} configurations take different degrees forward and backward; a "
            f"reduce-scatter overtakes an all-gather in {found['overtake']} forward passes.\n\n",
        ]
    print("".join(text))
    if not smoke:
        atomic_write(RESULTS / "schedule_1458.md", "".join(text))
        draw(studies, RESULTS / "schedule_1458.png")
        write_jsonl(
            RESULTS / "schedule_1458.jsonl",
            [
                {"inputs": name, "ours_s": s["ours_s"], "exact": s["exact"]}
                | {n: float((s["seconds"]["tutel"] / t).mean()) for n, t in s["seconds"].items()}
                for name, s in studies.items()
            ],
        )


if __name__ == "__main__":
    main()
