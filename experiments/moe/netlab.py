"""A pipelined layer over four processes and slow links: measured time beside the recurrence's.

Command:   python experiments/moe/netlab.py            about 3 minutes on 2 cores
           python experiments/moe/netlab.py --smoke    two processes, a small layer, kept nowhere
Expected:  a chunked layer faster than a whole one by a fifth or more; the recurrence chooses a good
           degree on a slow link and too many chunks on a fast one, sharing included it does not
Results:   results/netlab.md, .json and .png

Each process computes on one virtual device and carries all-to-alls on another, whose link is
shaped; forward passes, the degrees in turns. The lines behind the prediction are measured in the
same processes before: all-to-alls and experts of five sizes, all processes at once, each alone and
while the other is at work. Predicted twice: by the recurrence on the idle lines, in which
overlapping is free, and with sharing, where either stream goes at its busy pace while the other is
at work, as with four processes on two cores. Rates found in the results are not measured again.
Where shaped networks cannot be had the link is emulated, and every figure says so.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxsys.cluster import available, join, launch, netlab, parse_rate
from jaxsys.core.cost import LinearCost, PoorFitError, fit_linear
from jaxsys.core.measure import bootstrap_ci, machine
from jaxsys.core.report import atomic_write, figure, markdown_table, save_figure, to_json

HERE = Path(__file__).parent
DEGREES = (1, 2, 4, 8)
LINES = ("all_to_all", "expert", "busy all_to_all", "busy expert")
MARK = "@netlab "
FULL = {"workers": 4, "experts": 8, "width": 256, "hidden": 4096, "slots": 128, "rounds": 15}
SMOKE = {"workers": 2, "experts": 4, "width": 32, "hidden": 64, "slots": 16, "rounds": 3}


def worker(options: dict) -> None:
    """Profile, predict and measure in one of the processes."""
    member = join()
    import jax

    from jaxsys.core.lane import Lane
    from jaxsys.core.mesh import device_pair
    from jaxsys.moe.contract import Dims, Gate, MoESpec, Order
    from jaxsys.moe.dispatch import TRANSPORTS
    from jaxsys.moe.experts import gpt_ffn
    from jaxsys.moe.host import host_layer

    pair, experts = device_pair(), gpt_ffn()
    lane, n = Lane(pair), member.num_processes
    moves = TRANSPORTS["flat"]
    spec = MoESpec(Gate(None, None, 1), Order(None, None), experts, *moves)
    rate = options["hold_bits_s"]
    hold_s = None if rate is None else (lambda size: 32 * size * (n - 1) / n / rate)
    layer = host_layer(spec, lane, hold_s)
    dims = Dims(options["width"], options["hidden"], options["experts"] // n)
    shape = (options["experts"], options["slots"], options["width"])
    keys = jax.random.split(jax.random.key(member.process_id))
    params = jax.device_put(experts.init(keys[0], dims), pair.compute)
    buffer = jax.device_put(jax.random.normal(keys[1], shape), pair.compute)
    lines = profile(layer, lane, params, buffer, options["rounds"], hold_s)
    found = measure(layer, lane, params, buffer, options["rounds"])
    if member.process_id == 0:
        result = {"lines": {k: v.to_dict() for k, v in lines.items()}, "measured": found}
        print(MARK + json.dumps(result), flush=True)
    lane.gather(np.zeros(1, np.float32))
    lane.close()


def profile(layer, lane, params, buffer, rounds: int, hold_s) -> dict[str, LinearCost]:
    """Fit seconds over elements of a chunk's buffer: the slowest process's, medians of rounds."""
    import jax

    sizes = [buffer.shape[1] // d for d in (16, 8, 4, 2, 1)]
    times: dict[str, list[np.ndarray]] = {name: [] for name in LINES}
    for k in range(rounds + 1):  # the first compiles
        row: dict[str, list[float]] = {name: [] for name in LINES}
        for slots in sizes:
            chunk = jax.block_until_ready(buffer[:, :slots])
            hold = 0.0 if hold_s is None else hold_s(chunk.size)

            def send(count: int, chunk=chunk, hold=hold) -> list:
                return [lane.submit(layer.dispatch, (chunk,), hold_s=hold) for _ in range(count)]

            def compute(rows) -> float:
                start_s = time.perf_counter()
                jax.block_until_ready(layer.experts(params, rows))
                return time.perf_counter() - start_s

            lane.gather(np.zeros(1, np.float32))
            # The second of two: what a link lets pass at once after a pause would flatter it.
            rows, start_s, end_s = send(2)[1].result()
            row["all_to_all"].append(end_s - start_s)
            lane.gather(np.zeros(1, np.float32))
            row["expert"].append(compute(rows))
            lane.gather(np.zeros(1, np.float32))
            under_way, runs = send(5), []
            while not under_way[-1].done():
                runs.append(compute(rows))
            ends_s = [future.result().end_s for future in under_way]
            row["busy all_to_all"].append((ends_s[-1] - ends_s[0]) / (len(ends_s) - 1))
            row["busy expert"].append(float(np.median(runs)))
        for name, values in row.items():
            slowest = lane.gather(np.array(values, np.float32)).max(0)
            if k:
                times[name].append(slowest)
    elements = [buffer.size // buffer.shape[1] * slots for slots in sizes]
    return {name: fit(elements, np.median(rows, axis=0)) for name, rows in times.items()}


def fit(elements: list[int], seconds: np.ndarray) -> LinearCost:
    """Fit a line even below the gate that a plan would need; its r² is reported."""
    try:
        return fit_linear(elements, seconds, min_r2=-1e9, max_residual=1e9)
    except PoorFitError:  # times that do not grow: all the same, then
        return LinearCost(float(np.median(seconds)), 0.0, 0.0, 1.0, len(elements))


def measure(layer, lane, params, buffer, rounds: int) -> dict[str, dict]:
    """Time the layer at every degree, in turns; a round counts as its slowest process."""
    rng, times = np.random.default_rng(0), {r: [] for r in DEGREES}
    want, spans = None, {}
    for k in range(rounds + 1):  # the first compiles
        for r in rng.permutation(DEGREES).tolist():
            lane.gather(np.zeros(1, np.float32))
            y, info = layer.run(params, buffer, r)
            slowest = lane.gather(np.array([info.layer_s], np.float32)).max()
            if k:
                times[r].append(float(slowest))
                spans[r] = [list(span) for span in info.spans]
            want = np.asarray(y) if want is None else want
            np.testing.assert_allclose(np.asarray(y), want, rtol=1e-4, atol=1e-4)
    return {str(r): {"layer_s": times[r], "spans": spans[r]} for r in DEGREES}


def run(rate: str, options: dict) -> dict:
    """Run the processes at one link rate and put the prediction beside what they measured."""
    n, found, lines = options["workers"], [], []

    def on_line(i: int, line: str) -> None:
        lines.append(f"[{i}] {line}")
        if line.startswith(MARK):
            found.append(json.loads(line[len(MARK) :]))

    def start(options: dict, **place) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(options)]
        report = launch(command, n, on_line=on_line, pin=True, **place)
        if report.exit_code:
            raise RuntimeError("\n".join(lines[-20:]))

    if available().ok:
        with netlab(n, rate) as lab:
            lab.verify()
            start(options | {"hold_bits_s": None}, wrap=lab.wrap, host=lab.addresses[0])
    else:
        start(options | {"hold_bits_s": parse_rate(rate)})
    label = "shaped link" if available().ok else "emulated link"
    return {"rate": rate, "label": f"{label}, {rate}", "options": options, **found[0]}


def predict(result: dict) -> list[dict]:
    """Put predictions beside what was measured, a row per degree."""
    from jaxsys.moe.cases import Chunk
    from jaxsys.moe.host import Pace, shared_makespan_s
    from jaxsys.moe.recurrence import makespan_s

    options = result["options"]
    whole = options["experts"] * options["slots"] * options["width"]
    lines = [LinearCost.from_dict(result["lines"][name]) for name in LINES]
    rows = []
    for r in DEGREES:
        pace = Pace(*(line(whole / r) for line in lines))
        chunk = Chunk(pace.a, 0.0, 0.0, pace.e)
        seconds = result["measured"][str(r)]["layer_s"]
        low, high = bootstrap_ci(np.array(seconds))
        rows.append(
            {
                "degree": r,
                "recurrence_s": float(makespan_s(chunk, r, most=max(DEGREES))),
                "with_sharing_s": shared_makespan_s(pace, r),
                "measured_s": float(np.median(seconds)),
                "low_s": low,
                "high_s": high,
                "rounds": len(seconds),
            }
        )
    return rows


def best(rows: list[dict], name: str) -> dict:
    """Give the row with the least time of that name."""
    return min(rows, key=lambda row: row[name])


def summary(results: list[dict]) -> list[dict]:
    """Two lines a rate: how far off each prediction is, and what its best degree costs."""
    lines = []
    for result in results:
        rows = predict(result)
        fastest = best(rows, "measured_s")
        for name in ("recurrence_s", "with_sharing_s"):
            chosen = best(rows, name)
            errors = [row["measured_s"] / row[name] - 1 for row in rows]
            lines.append(
                {
                    "link": result["label"],
                    "prediction": name.removesuffix("_s").replace("_", " "),
                    "measured over predicted, r = 1, 2, 4, 8": ", ".join(
                        f"{error:+.0%}" for error in errors
                    ),
                    "its best r": chosen["degree"],
                    "measured best r": fastest["degree"],
                    "its best over the best": round(
                        chosen["measured_s"] / fastest["measured_s"], 2
                    ),
                    "whole layer over its best": round(
                        rows[0]["measured_s"] / chosen["measured_s"], 2
                    ),
                }
            )
    return lines


def draw(results: list[dict], path: Path) -> None:
    """Draw measured points with intervals over predicted lines, layer time against degree."""
    fig, axes = figure(1, 1, width=5.4, height=3.8)
    for result in results:
        rows = predict(result)
        degrees = [row["degree"] for row in rows]
        (line,) = axes[0, 0].plot(degrees, [row["with_sharing_s"] for row in rows], linewidth=1)
        idle = [row["recurrence_s"] for row in rows]
        axes[0, 0].plot(degrees, idle, "--", linewidth=1, color=line.get_color())
        low = [max(0.0, row["measured_s"] - row["low_s"]) for row in rows]
        high = [max(0.0, row["high_s"] - row["measured_s"]) for row in rows]
        axes[0, 0].errorbar(
            degrees,
            [row["measured_s"] for row in rows],
            yerr=[low, high],
            fmt="o",
            markersize=4,
            color=line.get_color(),
            label=result["label"],
        )
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xticks(DEGREES, [str(r) for r in DEGREES])
    axes[0, 0].set(xlabel="pipeline degree", ylabel="s per forward pass of a layer")
    axes[0, 0].set_title("points measured, lines predicted (dashed: sharing left out)")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=8)
    save_figure(fig, path)


def main() -> None:
    """Run the experiment and write its results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rates", nargs="+", default=["50mbit", "100mbit", "200mbit"])
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    options = dict(SMOKE if args.smoke else FULL)
    options["rounds"] = args.rounds or options["rounds"]
    out = Path(tempfile.mkdtemp()) if args.smoke else args.out
    rates = args.rates[:1] if args.smoke else args.rates
    path = out / "netlab.json"
    results = json.loads(path.read_text()) if path.exists() else []
    known = {result["rate"] for result in results if result["options"] == options}
    results += [run(rate, options) for rate in rates if rate not in known]
    results.sort(key=lambda result: parse_rate(result["rate"]))
    atomic_write(path, to_json(results))
    text = [
        "# A pipelined layer over slow links, measured beside predicted\n",
        "`python experiments/moe/netlab.py`\n",
        f"{machine()}\n",
        f"{options['workers']} processes on as many links, {options['experts']} GPT experts of "
        f"{options['width']} × {options['hidden']}, {options['slots']} slots each on every "
        f"process, float32, forward; medians of {options['rounds']} rounds, degrees in turns, a "
        "round counting as its slowest process, with 95 % bootstrap intervals. Predicted from "
        "lines that the same processes measured before: by the recurrence, in which overlapping is "
        "free, and with sharing of the two cores among the four processes.\n",
        markdown_table(summary(results)),
    ]
    for result in results:
        lines = {name: LinearCost.from_dict(line) for name, line in result["lines"].items()}
        fitted = ", ".join(
            f"{name} α {line.alpha_s * 1e3:.1f} ms, β {line.beta_s_per_unit * 1e9:.1f} ns an "
            f"element, r² {line.r2:.3f}"
            for name, line in lines.items()
        )
        text += [f"## {result['label']}\n", f"{fitted}.\n", markdown_table(predict(result))]
    atomic_write(out / "netlab.md", "\n".join(text))
    draw(results, out / "netlab.png")
    print("\n".join(text))


if __name__ == "__main__":
    main()
