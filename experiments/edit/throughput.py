"""Edits per second by MEMIT: one by one and in batches, and beside the released code.

    python experiments/edit/throughput.py --peer-python VENV/bin/python --peer-code MEMIT
    python experiments/edit/throughput.py                     ours alone
    python experiments/edit/throughput.py --smoke             half a minute, the model tiny

MEMIT is a checkout of kmeng01/memit, VENV an environment with the extra `peers` and transformers;
`throughput_peer.py` says what had to be changed for today's libraries and a CPU. Both sides edit
SmolLM2-135M in float32 on the same cores, with the same facts (CounterFact), the same five
prefixes, layers, second moments, steps, and all other settings; the change of each matrix that the
two arrive at is compared. About 8 minutes on two idle cores.

Ours is timed after compilation (which is said beside it): every batch size a second time. The
released code looks for values one request at a time, so that its seconds per edit do not depend on
the batch; it is timed at 1 and 10 edits, not at 100, and the best of them stands beside our 100.
`--steps` is that of the search for values: as the method's settings have it, or 5 for a shorter
run, which favours the released code (it spends nearly all its time in steps, ours does not).

Target: at a batch of 100 ten times the edits per second of the released code.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from facts import RESULTS, data_file, read_statistics, small_records, small_statistics

from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, markdown_table, to_json
from jaxsys.data.tokenizer import load_tokenizer, save_tokenizer
from jaxsys.edit.files import open_for_editing
from jaxsys.edit.methods import METHODS
from jaxsys.edit.prefixes import MEMIT_SAMPLES, sample_prefixes
from jaxsys.edit.records import load_records
from jaxsys.edit.turns import settle
from jaxsys.models import lm


def ours(
    model: Any, params: Any, config: Any, requests: list[Any], stats: Any, batches: tuple[int, ...]
) -> tuple[list[dict[str, Any]], dict[int, Any]]:
    """Time each batch size, first and again, and keep the changes."""
    method = METHODS["memit"]
    brief = replace(config, target=replace(config.target, steps=1))
    rows, found = [], {}
    for count in batches:
        part, times = requests[:count], []
        for setting in (brief, config):  # the steps are data: both run the same programs
            begin_s = time.perf_counter()
            edited = method.edit(model, setting, params, part, stats)
            jax.block_until_ready(edited.params)
            times.append(time.perf_counter() - begin_s)
        found[count] = edited.info.factors
        rows.append(
            {
                "code": "jaxsys",
                "batch": count,
                "seconds": times[1],
                "edits per second": count / times[1],
                "first call, one step, s": times[0],
            }
        )
        print(rows[-1], flush=True)
    return rows, found


def difference(factors: Any, file: Path) -> float:
    """Compare changes: the largest ‖ΔW − ΔW'‖ / ‖ΔW'‖ over matrices."""
    theirs = np.load(file)
    worst = 0.0
    for path, (a, b) in factors.items():
        other = theirs[path]
        mine = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
        worst = max(worst, float(np.linalg.norm(mine - other) / np.linalg.norm(other)))
    return worst


def peer(given: argparse.Namespace, work: Path, task: dict[str, Any], moments: Any) -> None:
    """Run the released code in its own environment."""
    path = lm.find_model(given.model)
    lm.convert(path, work / "model", dtype="float32")
    save_tokenizer(work / "model", load_tokenizer(path))
    (work / "task.json").write_text(json.dumps(task))
    np.savez(work / "moments.npz", **{str(layer): m for layer, m in moments.items()})
    script = Path(__file__).with_name("throughput_peer.py")
    command = [given.peer_python, script, given.peer_code.resolve(), work]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=work)
    if done.returncode:
        raise SystemExit(f"the released code ended with status {done.returncode}: {done.stderr}")


def as_task(config: Any, records: Any, given: argparse.Namespace) -> dict[str, Any]:
    """Write facts and settings the way the released code wants them."""
    facts = [
        {
            "case_id": i,
            "prompt": r.prompt.replace(r.subject, "{}", 1),
            "subject": r.subject,
            "target_new": {"str": r.target},
        }
        for i, r in enumerate(records)
    ]
    settings = {
        "layers": list(config.layers),
        "v_num_grad_steps": config.target.steps,
        "v_lr": config.target.lr,
        "v_weight_decay": config.target.weight_decay,
        "clamp_norm_factor": config.target.clamp,
        "kl_factor": config.target.kl,
        "mom2_update_weight": config.weight,
    }
    return {
        "facts": facts,
        "prefixes": list(config.target.prefixes),
        "settings": settings,
        "threads": len(os.sched_getaffinity(0)),
        "peer_batches": given.peer_batches,
    }


def report(rows: list[dict[str, Any]], differences: dict[int, float], config: Any) -> None:
    """Write the table and what follows from it."""
    by = {(row["code"], row["batch"]): row for row in rows}
    text = ["# Edits per second, MEMIT on SmolLM2-135M\n\n"]
    shown = [{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    text += [markdown_table(shown), "\n"]
    most = max(batch for code, batch in by if code == "jaxsys")
    if ("jaxsys", 1) in by:
        alone = by["jaxsys", most]["edits per second"] / by["jaxsys", 1]["edits per second"]
        text += [f"- in batches of {most}, {alone:.1f} times the edits per second of one by one\n"]
    theirs = [row for row in rows if row["code"] != "jaxsys"]
    if theirs:
        best = max(row["edits per second"] for row in theirs)
        times = by["jaxsys", most]["edits per second"] / best
        text += [
            f"- at a batch of {most}, {times:.1f} times the released code's edits per second "
            f"(target 10: {'met' if times >= 10 else 'missed'})\n"
        ]
    for count, value in differences.items():
        text += [
            f"- {count} edits: the changes of the weights differ by {value:.2g} of their norm\n"
        ]
    text += [f"\n{config.target.steps} steps; {config.layers} layers. {machine()}\n"]
    name = f"throughput_{config.target.steps}_steps"
    atomic_write(RESULTS / f"{name}.md", "".join(text))
    atomic_write(
        RESULTS / f"{name}.json", to_json({"rows": rows, "differences": differences}) + "\n"
    )


def main() -> None:
    """Time both sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--peer-code", type=Path)
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--stats", type=Path, default=RESULTS / "statistics")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    model, params = open_for_editing("tiny" if given.smoke else given.model)
    batches = (1, 2) if given.smoke else tuple(given.batches)
    if given.smoke:
        requests = [record.request for record in small_records(max(batches))]
        stats: Any = small_statistics(model, params, tuple(range(model.config.layers)))
    else:
        records = load_records(data_file("edit/counterfact.json"), limit=max(batches)).records
        requests = [record.request for record in records]
        stats = read_statistics(given.stats, params)
    samples = ((4, 5),) if given.smoke else MEMIT_SAMPLES
    prefixes = sample_prefixes(model, params, samples)
    config = METHODS["memit"].config()
    steps = 2 if given.smoke else given.steps
    target = replace(config.target, prefixes=prefixes, steps=steps)
    config = settle(METHODS["memit"], model, replace(config, target=target), params)
    rows, found = ours(model, params, config, requests, stats, batches)
    if given.smoke:
        return
    differences: dict[int, float] = {}
    report(rows, differences, config)
    if given.peer_python is not None and given.peer_code is not None:
        moments = {layer: stats.moment(layer) for layer in config.layers}
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            peer(given, work, as_task(config, requests, given), moments)
            for count in given.peer_batches:
                kept = json.loads((work / f"peer_{count}.json").read_text())
                rows.append(
                    {
                        "code": f"released MEMIT, torch {kept['torch']}",
                        "batch": count,
                        "seconds": kept["seconds"],
                        "edits per second": count / kept["seconds"],
                    }
                )
                if count in found:
                    differences[count] = difference(found[count], work / f"peer_{count}.npz")
        report(rows, differences, config)


if __name__ == "__main__":
    main()
