"""Predicted against measured step time of every strategy over three link rates, in the netlab.

Command:   python experiments/localsgd/netlab_rates.py
Minutes:   about 10 on 2 cores (two workers with a core each, a GPT of 3.3 million parameters,
           period 5; --workers 4 --batch 8 puts two on a core)
Expected:  measured within 10 % of predicted; near communication = period x step DreamDDP about 1.5
           times faster than local SGD and 3.9 times faster than layer-wise gradient all-reduce
Results:   results/netlab_rates.md, .json and .png, and one figure of a period per rate

Where shaped networks cannot be had the links are emulated, and every figure says so.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, figure, markdown_table, save_figure, to_json
from jaxsys.localsgd import figures
from jaxsys.localsgd.compare import Comparison, compare
from jaxsys.localsgd.supervise import Links
from jaxsys.localsgd.task import Task

HERE = Path(__file__).parent
STRATEGIES = ("ssgd", "wfbp", "local", "equal", "dreamddp-nofill", "dreamddp", "dreamddp-eager")


def run(rates: list[str], request: Comparison, out: Path) -> list[dict]:
    """Run one comparison per rate; returns one result per rate."""
    results = []
    for rate in rates:
        with tempfile.TemporaryDirectory() as folder:
            one = dataclasses.replace(request, links=Links("auto", (rate,)), out=folder)
            record, job = compare(one)
        figures.compare_figure(record, job.strategies, out / f"period_{rate}.png")
        profile = record.profile
        compute_s = profile.compute_s
        whole_s = profile.message_s(sum(profile.elements))
        results.append(
            {
                "rate": rate,
                "label": record.label(),
                "compute_s": compute_s,
                "whole_model_s": whole_s,
                "communication / (period x step)": whole_s / (job.block * compute_s),
                "alpha_s": profile.link.alpha_s,
                "r2": profile.link.r2,
                "jitter_s": profile.jitter_s,
                "sharing": profile.sharing,
                "rows": record.rows(),
                "table": record.table(),
            }
        )
    return results


def summary(results: list[dict]) -> list[dict]:
    """Compare what was measured with what was asked, one line a rate."""
    lines = []
    for r in results:
        rows = {row["strategy"]: row for row in r["rows"]}
        step = {name: row["step_s"] for name, row in rows.items()}
        errors = {n: abs(row["step_s"] / row["predicted_s"] - 1) for n, row in rows.items()}
        worst = max(errors, key=errors.get)
        line = {
            "rate": r["rate"],
            "comm / (H x step)": f"{r['communication / (period x step)']:.2f}",
            "worst prediction": f"{errors[worst]:.0%} ({worst})",
        }
        if all(row["predicted_again_s"] for row in r["rows"]):
            errors = {n: abs(x["step_s"] / x["predicted_again_s"] - 1) for n, x in rows.items()}
            worst = max(errors, key=errors.get)
            line["worst, with the run's own times"] = f"{errors[worst]:.0%} ({worst})"
        for name in ("dreamddp-nofill", "dreamddp", "dreamddp-eager"):
            if name in rows and rows[name]["hidden_planned"] > 0:
                planned = [rows[name]["hidden_planned"], rows[name]["hidden_again"]]
                shares = [f"{rows[name]['hidden'] / p:.0%}" for p in planned if p]
                line[f"{name}: hidden of planned, in-run"] = ", ".join(shares)
        for name in ("dreamddp-nofill", "dreamddp", "dreamddp-eager"):
            for other in ("local", "wfbp"):
                if name in step and other in step:
                    line[f"{other} / {name}"] = f"{step[other] / step[name]:.2f}"
        lines.append(line)
    return lines


def draw(results: list[dict], path: Path) -> None:
    """Draw measured points over predicted lines, step time against rate."""
    fig, axes = figure(1, 1, width=6.4, height=4.2)
    axis = axes[0, 0]
    for name in [row["strategy"] for row in results[0]["rows"]]:
        rows = [next(x for x in r["rows"] if x["strategy"] == name) for r in results]
        rates = [float(r["rate"].removesuffix("mbit")) for r in results]
        (line,) = axis.plot(rates, [x["predicted_s"] for x in rows], linewidth=1)
        axis.errorbar(
            rates,
            [x["step_s"] for x in rows],
            yerr=[
                [x["step_s"] - x["low_s"] for x in rows],
                [x["high_s"] - x["step_s"] for x in rows],
            ],
            fmt="o",
            markersize=4,
            color=line.get_color(),
            label=name,
        )
    axis.set(xscale="log", yscale="log", xlabel="link rate, Mbit/s", ylabel="s per step")
    axis.set_title(f"points measured, lines predicted: {results[0]['label'].split(',')[0]}")
    axis.legend(fontsize=7)
    save_figure(fig, path)


def main() -> None:
    """Run the experiment and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two workers, a tiny model, one rate")
    parser.add_argument("--rates", nargs="+", default=["45mbit", "90mbit", "180mbit"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--period", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    out = Path(tempfile.mkdtemp()) if args.smoke else args.out
    request = Comparison(
        workers=args.workers,
        strategies=STRATEGIES,
        steps=args.steps,
        period=args.period,
        task=Task(batch=args.batch),
    )
    rates = args.rates
    if args.smoke:
        task = Task(model="tiny", batch=2, min_layer_bytes=20_000)
        request = dataclasses.replace(
            request, workers=2, steps=4, period=2, task=task, strategies=("ssgd", "dreamddp")
        )
        rates = ["50mbit"]
    results = run(rates, request, out)
    text = [
        "# Step time, measured beside predicted\n",
        f"`python experiments/localsgd/netlab_rates.py --rates {' '.join(rates)} --steps "
        f"{request.steps} --period {request.period}`\n",
        f"{machine()}\n",
        f"{request.workers} workers, model {request.task.model}, batch {request.task.batch} each, "
        f"period {request.period}, {request.steps} steps in interleaved blocks of one period, seed "
        f"{request.seed}. Intervals are 95 % bootstrap intervals over blocks.\n",
    ]
    for r in results:
        text += [
            f"## {r['label']}\n",
            f"Compute {r['compute_s']:.3f} s a step, whole model {r['whole_model_s']:.3f} s on the "
            f"wire (alpha {r['alpha_s'] * 1e3:.1f} ms, r2 {r['r2']:.3f}), jitter "
            f"{r['jitter_s'] * 1e3:.0f} ms a step, {r['sharing']:.2f} s of compute lost per "
            "second of communication behind it; communication is "
            f"{r['communication / (period x step)']:.2f} of period x step.\n",
            markdown_table(r["table"]),
        ]
    text += ["## Against what was asked\n", markdown_table(summary(results))]
    atomic_write(out / "netlab_rates.md", "\n".join(text))
    plain = [{k: v for k, v in r.items() if k != "table"} for r in results]
    atomic_write(out / "netlab_rates.json", to_json(plain))
    draw(results, out / "netlab_rates.png")
    print("\n".join(text))


if __name__ == "__main__":
    main()
