"""How step time and bytes grow with the number of workers: 2, 4, 8 in the netlab.

Command:   python experiments/localsgd/scaling.py
Minutes:   about 5 on 2 cores
Expected:  bytes per step of S-SGD follow the ring's 2 (W-1) / W; compute per worker grows once
           there are more workers than cores; partial synchronisation sends 1/H of the bytes
Results:   results/scaling.md
The planner's own growth, to 10,000 layers, is in planner_speed.py.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, markdown_table
from jaxsys.localsgd.compare import Comparison, compare
from jaxsys.localsgd.supervise import Links
from jaxsys.localsgd.task import Task

HERE = Path(__file__).parent
STRATEGIES = ("ssgd", "local", "dreamddp-nofill")


def run(counts: list[int], request: Comparison) -> list[dict[str, str]]:
    """Run one comparison per worker count; returns the lines of the table."""
    lines = []
    for workers in counts:
        with tempfile.TemporaryDirectory() as folder:
            record, _ = compare(dataclasses.replace(request, workers=workers, out=folder))
        parameters = sum(record.profile.elements)
        compute_s = sum(record.profile.forward_s) + sum(record.profile.backward_s)
        for row in record.rows():
            period = record.plans[row["strategy"]].period
            ideal = 2 * (workers - 1) / workers * 4 * parameters / period
            lines.append(
                {
                    "workers": str(workers),
                    "strategy": row["strategy"],
                    "compute, s": f"{compute_s:.3f}",
                    "s/step": f"{row['step_s']:.3f} [{row['low_s']:.3f}, {row['high_s']:.3f}]",
                    "predicted": f"{row['predicted_s']:.3f}",
                    "MB sent/step": f"{row['sent_bytes_per_step'] / 1e6:.3f}",
                    "ring 2(W-1)/W n/H, MB": f"{ideal / 1e6:.3f}",
                    "network": record.label(),
                }
            )
    return lines


def main() -> None:
    """Run the experiment and write its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two workers and a tiny model only")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8])
    args = parser.parse_args()
    request = Comparison(
        strategies=STRATEGIES, steps=10, task=Task(batch=2), links=Links("auto", ("100mbit",))
    )
    counts = args.workers
    if args.smoke:
        task = Task(model="tiny", batch=2, min_layer_bytes=20_000)
        request = dataclasses.replace(request, steps=4, period=2, task=task)
        counts = [2]
    table = markdown_table(run(counts, request))
    text = (
        "# Growth with the number of workers\n\n"
        f"`python experiments/localsgd/scaling.py`; {machine()}; model {request.task.model}, batch "
        f"{request.task.batch} per worker, period {request.period}, {request.steps} steps, seed "
        f"{request.seed}; 95 % bootstrap intervals over blocks.\n\n{table}"
    )
    if not args.smoke:
        atomic_write(HERE / "results" / "scaling.md", text)
    print(text)


if __name__ == "__main__":
    main()
