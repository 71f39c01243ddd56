"""Every gate, order, transport, pair of degrees and mesh against a dense layer on one device.

Command:   python experiments/moe/parity.py            about 6 minutes on 2 cores, 8 virtual devices
           python experiments/moe/parity.py --every    all 990 combinations, about 90 minutes
           python experiments/moe/parity.py --smoke    two combinations, kept nowhere
Expected:  loss, outputs, gradients of all parameters and of the input, and what the layer tells,
           within 1e-5 of the largest entry of each array
Results:   results/parity.jsonl (a line per combination; those found there are not run again) and
           results/parity.md

By default as few combinations as a greedy choice needs for any two values of different choices to
meet in one of them. The reference runs every expert on every token and takes over from the layer
only what the gate chose and who found a slot (`tests/moe/parallel_cases.py`).
"""

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import jax

from jaxsys.core.measure import machine
from jaxsys.core.report import append_jsonl, atomic_write, markdown_table

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "moe"))
import parallel_cases as cases

HERE = Path(__file__).parent
NAMES = ("gate", "order", "transport", "degrees", "mesh")
TRANSPORTS = ("flat", "gather", "ragged", "2dh", "1dh")
MESHES = ("8x1", "4x2", "2x2x2")
SMOKE = (
    ("cosine", "sparse", "flat", (2, 2), "8x1"),
    ("groups", "einsum", "2dh", (4, 1), "4x2"),
)


def combinations() -> list[tuple]:
    """List all that can be combined: hierarchical transports need nodes."""
    every = itertools.product(cases.GATES, cases.ORDERS, TRANSPORTS, cases.PAIRS, MESHES)
    return [c for c in every if not c[2].endswith("dh") or c[4] == "4x2"]


def cover(wanted: list[tuple]) -> list[tuple]:
    """Choose greedily until every pair of values that can meet has met."""

    def pairs(combination: tuple) -> set:
        return set(itertools.combinations(enumerate(combination), 2))

    left = set().union(*map(pairs, wanted))
    chosen = []
    while left:
        best = max(wanted, key=lambda c: len(pairs(c) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def measure(combination: tuple, references: dict) -> dict:
    """Give the largest relative error of each array."""
    gate, order, transport, pair, mesh = combination
    spec = cases.make_spec(gate, order, transport)
    given = cases.make_case(spec)
    known = (gate, order, math.lcm(*pair))
    if known not in references:
        references[known] = cases.reference(spec, cases.ROWS, known[2])(*given)
    got = cases.sharded(spec, pair, *cases.make_mesh(mesh))(*given)
    errors = cases.errors(got, references[known])
    worst = max(errors, key=errors.get)
    return dict(zip(NAMES, combination, strict=True)) | {"error": errors[worst], "in": worst}


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Compiling is all that takes time here.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    jax.config.update("jax_num_cpu_devices", 8)
    out = Path(tempfile.mkdtemp()) if args.smoke else HERE / "results"
    wanted = combinations() if args.every else cover(combinations())
    chosen = list(SMOKE) if args.smoke else wanted
    path, rows = out / "parity.jsonl", {}
    if path.exists():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[tuple(str(row[n]).strip("()[]") for n in NAMES)] = row
    references: dict = {}
    for k, combination in enumerate(chosen):
        key = tuple(str(v).strip("()[]") for v in combination)
        if key not in rows:
            rows[key] = measure(combination, references)
            append_jsonl(path, rows[key])
        print(f"{k + 1} of {len(chosen)}: {combination} {rows[key]['error']:.1e}", flush=True)
    worst = sorted(rows.values(), key=lambda row: -row["error"])
    text = [
        "# Sharded layers against a dense one on one device\n",
        f"`python experiments/moe/parity.py`, {machine()}\n",
        f"{len(rows)} combinations of {len(cases.GATES)} gates, {len(cases.ORDERS)} orders, "
        f"{len(TRANSPORTS)} transports, {len(cases.PAIRS)} pairs of degrees and {len(MESHES)} "
        "meshes of 8 virtual devices; error: largest over an array, relative to its largest entry, "
        f"the worst of all arrays. Worst of all: {worst[0]['error']:.1e}.\n",
        markdown_table(worst[:10]),
    ]
    atomic_write(out / "parity.md", "\n".join(text))
    print("\n".join(text))
    if worst[0]["error"] >= 1e-5:
        raise SystemExit("an error is above 1e-5")


if __name__ == "__main__":
    main()
