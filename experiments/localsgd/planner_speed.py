"""Time the planner: layers, bandwidths in one call, worker counts.

    python experiments/localsgd/planner_speed.py            about 3 minutes on 2 cores
    python experiments/localsgd/planner_speed.py --smoke    seconds, nothing written

Expected on 2 cores: 125 layers with period 10 in under 1 ms a plan after compilation; 10,000
bandwidths × 125 layers × period 10 in one vmapped call in under 1 s; 10,000 layers in under 2 s.
These hold on idle cores: neighbours stretch them, so the load average is printed too. Profiles are
drawn at random with the seed given.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.cost import allreduce_s
from jaxsys.core.measure import interleaved, machine
from jaxsys.core.report import atomic_write, format_seconds, markdown_table
from jaxsys.localsgd.plan import plan_sync
from jaxsys.localsgd.plan_dp import schedule, schedule_many

RESULTS = Path(__file__).parent / "results"
PERIOD = 10


def profile(n_layers: int, seed: int):
    """Draw backward seconds and payload bytes of a model whose layer sizes vary by factors."""
    rng = np.random.default_rng([seed, n_layers])
    backward_s = rng.uniform(0.5e-3, 1.5e-3, n_layers)
    n_bytes = rng.lognormal(0, 1, n_layers) * 4e5
    return backward_s, n_bytes


def comm_at(n_bytes, workers, bandwidth_bits_s):
    """Model a ring all-reduce with 1 ms latency per step, [..., L] for any leading axes."""
    return allreduce_s(
        n_bytes, workers, bandwidth_bits_s=bandwidth_bits_s, latency_s=1e-3, algorithm="ring"
    )


def one_plan(sizes, runs, seed):
    """Time plan_sync by method and the jitted schedule, each size in one interleaved run."""
    rows = []
    for n in sizes:
        backward_s, n_bytes = profile(n, seed)
        # Communication as long as ten backward passes: the hardest place, comm = H·bp.
        comm_s = n_bytes * PERIOD * backward_s.sum() / n_bytes.sum()
        arrays = jnp.asarray(backward_s, jnp.float32), jnp.asarray(comm_s, jnp.float32)
        functions, waits = {}, {}
        for method in ("dreamddp", "dfs", "equal", "best"):
            make = partial(plan_sync, backward_s, comm_s, PERIOD, method=method)
            functions[f"plan_sync {method}"] = make
            waits[f"plan_sync {method}"] = sum(make().wait_s)
        call = partial(jax.jit(partial(schedule, period=PERIOD, max_period=PERIOD)), *arrays)
        functions["schedule, jitted float32"] = call
        waits["schedule, jitted float32"] = float(call()[1].sum())
        for name, found in interleaved(functions, warmup=1, runs=runs, seed=seed).items():
            rows.append({"layers": n, "planner": name, **_times(found), "Σ wait s": waits[name]})
    return rows


def many_bandwidths(counts, n_layers, runs, seed):
    """Time one call that plans for many bandwidths: chunked, and as one bare vmap."""
    backward_s, n_bytes = profile(n_layers, seed)
    backward_s, n_bytes = jnp.asarray(backward_s, jnp.float32), jnp.asarray(n_bytes, jnp.float32)
    rows = []
    for count in counts:
        rates = jnp.geomspace(1e7, 1e10, count)
        comm_s = comm_at(n_bytes[None], jnp.full((1, 1), 16), rates[:, None])

        one = partial(schedule, backward_s, period=PERIOD, max_period=PERIOD)
        functions = {
            "schedule_many": partial(schedule_many, backward_s, comm_s, PERIOD, max_period=PERIOD),
            "vmap(schedule)": partial(jax.jit(jax.vmap(lambda c, one=one: one(c))), comm_s),
        }
        for name, found in interleaved(functions, warmup=1, runs=runs, seed=seed).items():
            per_plan = format_seconds(found.median_s / count)
            rows.append({"bandwidths": count, "call": name, **_times(found), "per plan": per_plan})
    return rows


def many_workers(counts, n_layers, runs, seed):
    """Time a sweep over worker counts, and show what the plans say at 1 Gbit/s."""
    backward_s, n_bytes = profile(n_layers, seed)
    backward_s, n_bytes = jnp.asarray(backward_s, jnp.float32), jnp.asarray(n_bytes, jnp.float32)
    workers = jnp.asarray(counts)

    @jax.jit
    def sweep(workers):
        comm_s = comm_at(n_bytes[None], workers[:, None], 1e9)
        return comm_s, schedule_many(backward_s, comm_s, PERIOD, max_period=PERIOD)[1]

    found = interleaved({"sweep": lambda: sweep(workers)}, warmup=1, runs=runs, seed=seed)["sweep"]
    comm_s, waits = (np.asarray(x) for x in sweep(workers))
    rows = []
    for count, comm, wait in zip(counts, comm_s.sum(axis=1), waits.sum(axis=1), strict=True):
        rows.append(
            {
                "workers": count,
                "comm, all layers s": f"{comm:.3f}",
                "comm / (H·bp)": f"{comm / (PERIOD * float(backward_s.sum())):.2f}",
                "hidden share": f"{1 - wait / comm:.3f}" if comm else "",
            }
        )
    return rows, found


def _times(found):
    low, high = found.ci_s
    return {
        "fastest": format_seconds(min(found.seconds)),
        "median": format_seconds(found.median_s),
        "95 % interval": f"{format_seconds(low)} … {format_seconds(high)}",
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the planner.")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing written")
    given = parser.parse_args(argv)
    runs, seed = (2 if given.smoke else given.runs), given.seed
    sizes = (10, 40) if given.smoke else (10, 30, 125, 300, 1000, 3000, 10_000)
    counts = (1, 20) if given.smoke else (1, 10, 100, 1000, 10_000)
    n_layers = 20 if given.smoke else 125
    team = (2, 1000) if given.smoke else (2, 8, 32, 128, 512, 2048, 8192)

    text = "# Planner speed\n\n"
    text += (
        f"{machine(devices=True)}. Seed {seed}, {runs} interleaved runs after one uncounted, "
        f"median and bootstrap interval. Period {PERIOD}; times after compilation, including the "
        "transfer of the result. Load average at the start "
        f"{os.getloadavg()[0]:.1f}: where it is above 0, the fastest run says more about the "
        "planner and the median about the neighbours.\n\n"
    )
    text += "## One plan\n\nRandom profiles with comm = H·bp. `plan_sync` computes in float64.\n\n"
    text += markdown_table(one_plan(sizes, runs, seed))
    text += f"\n## Many bandwidths, {n_layers} layers, 16 workers, 10 Mbit/s to 10 Gbit/s\n\n"
    text += markdown_table(many_bandwidths(counts, n_layers, runs, seed))
    text += f"\n## Worker counts, {n_layers} layers, modelled ring at 1 Gbit/s, 1 ms a step\n\n"
    rows, found = many_workers(team, n_layers, runs, seed)
    text += markdown_table(rows)
    text += (
        f"\nThe whole sweep, all-reduce model and {len(team)} plans: {_times(found)['median']}.\n"
    )
    print(text)
    if not given.smoke:
        atomic_write(given.out / "planner_speed.md", text)


if __name__ == "__main__":
    main()
