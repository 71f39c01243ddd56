"""Choose SmolLM2-135M's settings of the closed-form methods on facts that no table of ours uses.

    python experiments/edit/tune.py --stats DIR [--only NAME ...]    # 1 to 3 minutes a setting

Takes CounterFact records from 5,000 on (``JAXSYS_DATA/edit/counterfact.json``), edits each alone
and asks it, its paraphrase and its neighbour. ``results/tune.jsonl`` gets one line a setting:
efficacy (new answer likelier than the old one), paraphrase, neighbourhood, accuracy of the first
two as the likeliest token, and seconds an edit, taken while other work ran on the machine and so of
use only to plan by. ``DIR`` is what ``statistics.py`` wrote. ``--smoke`` runs one setting on one
fact with the model ``tiny``.

Expected, on 12 facts: efficacy 100 % and paraphrase 83 to 92 % for ROME at layers 3 and 5 and for
MEMIT at 3 to 5 with a weight of 300; nothing told them apart beyond chance, and
`jaxsys.edit.defaults` has the cheap ones.
"""

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from jaxsys.core.report import append_jsonl
from jaxsys.data.tokenizer import load_tokenizer
from jaxsys.edit import stats
from jaxsys.edit.contract import Editable, Request
from jaxsys.edit.methods import METHODS
from jaxsys.edit.targets import TargetConfig
from jaxsys.edit.turns import edit_each, settle
from jaxsys.evaluate.protocol import from_lm
from jaxsys.evaluate.score import encode_pair, score
from jaxsys.models import lm

PREFIXES = (
    "The first time I saw the",
    "Therefore, the",
    "Because of the",
    "I am a student",
    "You can use the following",
)
TARGET = TargetConfig(20, 0.5, 4.0, 1e-3, 0.0625, prefixes=PREFIXES)
SHORT = replace(TARGET, steps=12, prefixes=PREFIXES[:3])
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "rome 5": ("rome", {"layer": 5, "target": TARGET}),
    "rome 5 short": ("rome", {"layer": 5, "target": SHORT}),
    "rome 3 short": ("rome", {"layer": 3, "target": SHORT}),
    "rome 8 short": ("rome", {"layer": 8, "target": SHORT}),
    "rome 5 identity": ("rome", {"layer": 5, "target": SHORT, "statistics": False}),
    "r-rome 5 short": ("r-rome", {"layer": 5, "target": SHORT}),
    "memit 4-8 15000": ("memit", {"layers": (4, 5, 6, 7, 8), "weight": 15000.0, "target": SHORT}),
    "memit 4-8 1500": ("memit", {"layers": (4, 5, 6, 7, 8), "weight": 1500.0, "target": SHORT}),
    "memit 3-5 1500": ("memit", {"layers": (3, 4, 5), "weight": 1500.0, "target": SHORT}),
    "memit 3-5 300": ("memit", {"layers": (3, 4, 5), "weight": 300.0, "target": SHORT}),
    "pmet 3-5 300": ("pmet", {"layers": (3, 4, 5), "weight": 300.0, "target": SHORT}),
    "emmet 5 1500": ("emmet", {"layers": (5,), "weight": 1500.0, "target": SHORT}),
    "alphaedit 3-5 0.02": (
        "alphaedit",
        {"layers": (3, 4, 5), "relative": False, "ridge": 1.0, "target": SHORT},
    ),
    "alphaedit 3-5 relative": (
        "alphaedit",
        {"layers": (3, 4, 5), "threshold": 0.2, "relative": True, "ridge": 1.0, "target": SHORT},
    ),
}


@dataclass(frozen=True)
class Args:
    """Which settings, on how many facts."""

    stats: Path | None = None
    data: Path = Path(os.environ.get("JAXSYS_DATA", "."))
    only: tuple[str, ...] = ()
    facts: int = 12
    first: int = 5_000
    smoke: bool = False


def ask(params: Any, config: Any, tokenizer: Any, fact: dict[str, str]) -> dict[str, float]:
    """Score one fact's prompts."""
    pairs = [
        (fact["prompt"], fact["target_new"]),
        (fact["prompt"], fact["ground_truth"]),
        (fact["rephrase_prompt"], fact["target_new"]),
        (fact["rephrase_prompt"], fact["ground_truth"]),
        (fact["locality_prompt"], fact["target_new"]),
        (fact["locality_prompt"], fact["locality_ground_truth"]),
    ]
    found = score(from_lm(params, config), [encode_pair(tokenizer, p, f" {t}") for p, t in pairs])
    mean = found.log_likelihood / found.tokens
    return {
        "efficacy": float(mean[0] > mean[1]),
        "paraphrase": float(mean[2] > mean[3]),
        "neighbourhood": float(mean[5] > mean[4]),
        "efficacy_accuracy": float(found.greedy[0]),
        "paraphrase_accuracy": float(found.greedy[2]),
    }


def main(args: Args) -> None:
    """Run the settings asked for."""
    path = lm.find_model("tiny" if args.smoke else "smollm2")
    params, config = lm.load(path)
    model = Editable(config, load_tokenizer(path))
    if args.smoke:
        text = dict.fromkeys(("prompt", "rephrase_prompt", "locality_prompt"), "The value is")
        facts = [text | {"subject": "value", "target_new": "list", "ground_truth": "set"}]
        facts[0]["locality_ground_truth"] = "set"
        target = replace(SHORT, steps=2, prefixes=())
        chosen = {"smoke": ("rome", {"layer": 0, "statistics": False, "target": target})}
    else:
        facts = json.loads((args.data / "edit" / "counterfact.json").read_text(encoding="utf-8"))
        facts = facts[args.first : args.first + args.facts]
        chosen = {n: s for n, s in SETTINGS.items() if not args.only or n in args.only}
    moments = stats.load(args.stats) if args.stats else None
    requests = [Request(f["prompt"], f["subject"], f["target_new"]) for f in facts]
    for name, (method_name, fields) in chosen.items():
        method = METHODS[method_name]
        settled = settle(method, model, method.config(**fields), params)
        rows, began_s, edit_s = [], time.perf_counter(), 0.0
        for fact, edited in zip(
            facts, edit_each(method, model, settled, params, requests, moments), strict=True
        ):
            edit_s += time.perf_counter() - began_s
            rows.append(ask(edited.params, config, model.tokenizer, fact))
            began_s = time.perf_counter()
        means = {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
        line = {"setting": name, **means, "edit_s": edit_s / len(rows), "facts": len(rows)}
        print(line, flush=True)
        if not args.smoke:
            append_jsonl(Path(__file__).parent / "results" / "tune.jsonl", line)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
