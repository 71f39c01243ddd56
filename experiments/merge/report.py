"""Tables and figures of the experiment on Mediator, from its records."""

import json
from typing import Any

import numpy as np
from scoring import RESULTS

from jaxsys.core.measure import machine
from jaxsys.core.report import COLOURS, atomic_write, figure, markdown_table, save_figure

FAMILIES = {"stories": "stories260K", "smollm2": "SmolLM2-135M"}


def write_report(budgets: tuple[float, ...]) -> None:
    """Write `mediator.md` and the figures from whatever records there are."""
    text = ["# Mediator beside other merges\n", f"{machine()}\n"]
    drawn: dict[str, list[dict[str, Any]]] = {}
    for name, title in FAMILIES.items():
        file = RESULTS / f"mediator_{name}.json"
        if not file.exists():
            continue
        records = json.loads(file.read_text())
        seeds = sorted({key.split("/")[0] for key in records} & {"0", "1", "2"})
        rows = table(records, seeds)
        drawn[title] = rows
        text += [f"\n## {title}, four experts, {len(seeds)} seed(s)\n\n", markdown_table(rows)]
        text += [verdict(rows, budgets)]
        six = table({k.replace("six/", "0/"): v for k, v in records.items() if "six/" in k}, ["0"])
        if six:
            text += ["\n### Six experts, seed 0\n\n", markdown_table(six)]
        text += [ablations(records), strange(records), layers(records)]
        conflict_figure(records, seeds, name, title)
    atomic_write(RESULTS / "mediator.md", "".join(text))
    drawn = {t: r for t, r in drawn.items() if any("Mediator, " in x["method"] for x in r)}
    if drawn:
        bytes_figure(drawn)
    print(f"wrote {RESULTS / 'mediator.md'}")


def interval(values: list[float]) -> str:
    """Write a mean, and the half width of its 95 % interval where there are several seeds."""
    from math import sqrt

    half = {2: 12.71, 3: 4.30}.get(len(values))
    if half is None:
        return ""
    return f"± {half * float(np.std(values, ddof=1)) / sqrt(len(values)):.4f}"


def table(records: dict[str, Any], seeds: list[str]) -> list[dict[str, Any]]:
    """Lay out the main table by size and accuracy, with shares of ideal routing."""
    labels = [
        key.split("/", 1)[1]
        for key, value in records.items()
        if seeds and key.startswith(f"{seeds[0]}/") and "accuracy" in value
    ]
    labels = [x for x in labels if not x.startswith(("layers:", "denoising", "sparsity", "router"))]
    rows = []
    for label in labels:
        found = [records[f"{s}/{label}"] for s in seeds if f"{s}/{label}" in records]
        best = [records[f"{s}/ideal routing"] for s in seeds if f"{s}/ideal routing" in records]
        accuracy = [f["accuracy"] for f in found]
        row: dict[str, Any] = {
            "method": label,
            "bytes / model": round(float(np.mean([f["ratio"] for f in found])), 3),
            "accuracy": round(float(np.mean(accuracy)), 4),
            "95 %": interval(accuracy),
            "nats": round(float(np.mean([f["nats"] for f in found])), 3),
        }
        if best:
            of = [f["accuracy"] / b["accuracy"] for f, b in zip(found, best, strict=False)]
            row["of ideal"] = round(float(np.mean(of)), 4)
        for task in found[0]["tasks"]:
            row[task] = round(float(np.mean([f["tasks"][task]["accuracy"] for f in found])), 3)
        row["chosen (seed 0)"] = short(found[0]["chosen"])
        row["seeds"] = len(found)
        rows.append(row)
    return sorted(rows, key=lambda row: (round(row["bytes / model"], 1), row["accuracy"]))


def short(chosen: dict[str, Any]) -> str:
    """Write settings on one line."""
    told = {k: v for k, v in chosen.items() if k not in ("layers", "fraction")}
    return " ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items())


def verdict(rows: list[dict[str, Any]], budgets: tuple[float, ...]) -> str:
    """Say for each budget what Mediator reached and what was best of equal or smaller size."""
    lines = ["\n"]
    for budget in budgets:
        own = next((r for r in rows if r["method"] == f"Mediator, {budget:g}x"), None)
        if own is None:
            continue
        limit = own["bytes / model"] + 1e-9
        others = [r for r in rows if "Mediator" not in r["method"] and r["bytes / model"] <= limit]
        best = max(others, key=lambda r: r["accuracy"])
        lines.append(
            f"- at {own['bytes / model']:.2f} times one model: Mediator {own['accuracy']:.4f} "
            f"({own.get('of ideal', float('nan')):.1%} of ideal routing), best other merge of at "
            f"most that size {best['accuracy']:.4f} ({best['method']})\n"
        )
    return "".join(lines)


def ablations(records: dict[str, Any]) -> str:
    """Lay out what changed one choice at a time."""
    rows = [
        {
            "choice": key.split("/", 1)[1],
            "bytes / model": round(value["ratio"], 3),
            "accuracy": round(value["accuracy"], 4),
            "nats": round(value["nats"], 3),
            "routed share": round(value["chosen"].get("fraction", 0.0), 3),
            "right expert": round(value["chosen"].get("right", 1.0), 3),
            "layers": " ".join(x.rsplit(".", 1)[-1] for x in value["chosen"].get("layers", [])),
        }
        for key, value in records.items()
        if key.startswith(("0/layers:", "0/denoising", "0/sparsity", "0/router"))
    ]
    return f"\n### One choice at a time, seed 0\n\n{markdown_table(rows)}" if rows else ""


def strange(records: dict[str, Any]) -> str:
    """Lay out mixed and foreign input."""
    rows = []
    for key, value in records.items():
        if "/foreign " in key:
            row = {"input": key.split("foreign ")[1], "U": round(value["uncertainty"], 3)}
            for name in ("base", "average", "even blend", "select", "threshold", "blend"):
                row[name] = round(value[name]["nats"], 3)
            row["best expert"] = round(value["best expert"]["nats"], 3)
            row["blend's weights"] = " ".join(f"{w:.2f}" for w in value["blend"]["weights"])
            rows.append(row)
    told = "\n### Mixed and foreign input, nats per token, seed 0 (weights in the tasks' order)\n\n"
    return told + markdown_table(rows) if rows else ""


def layers(records: dict[str, Any]) -> str:
    """Lay out conflict by layer."""
    found = records.get("0/conflict")
    if not found:
        return ""
    rows = [
        {"layer": layer, "parameters": found["sizes"][layer]}
        | {name: round(d, 4) for name, d in value.items()}
        for layer, value in found["layers"].items()
    ]
    return f"\n### Conflict by layer, seed 0\n\n{markdown_table(rows)}"


def conflict_figure(records: dict[str, Any], seeds: list[str], name: str, title: str) -> None:
    """Draw conflict over layers, with what the paper says of it."""
    found = [records[f"{s}/conflict"]["layers"] for s in seeds if f"{s}/conflict" in records]
    if not found:
        return
    names = list(found[0])
    fig, axes = figure(1, 1, width=6.0, height=3.2)
    axis = axes[0, 0]
    for i, definition in enumerate(("pairwise_sign", "any_sign", "magnitude")):
        values = np.array([[run[layer][definition] for layer in names] for run in found])
        axis.plot(range(len(names)), values.mean(0), marker="o", ms=3, label=definition)
        if len(values) > 1:
            axis.fill_between(
                range(len(names)), values.min(0), values.max(0), color=COLOURS[i], alpha=0.2
            )
    axis.set_xticks(range(len(names)), [n.rsplit(".", 1)[-1] for n in names], rotation=90)
    axis.set_ylabel("conflict d")
    axis.set_title(f"{title}; the paper: first and last layers conflict most", fontsize=9)
    axis.legend(fontsize=7)
    save_figure(fig, RESULTS / f"mediator_conflict_{name}.png")


def bytes_figure(drawn: dict[str, list[dict[str, Any]]]) -> None:
    """Draw score against stored bytes, a panel for each family."""
    fig, axes = figure(1, len(drawn), width=5.6, height=4.0)
    for axis, (title, rows) in zip(axes[0], drawn.items(), strict=True):
        shown = [r for r in rows if not r["method"].startswith(("expert", "base"))]
        own = [
            r for r in shown if r["method"].startswith("Mediator, ") and "read" not in r["method"]
        ]
        axis.plot(
            [r["bytes / model"] for r in own],
            [r["accuracy"] for r in own],
            marker="s",
            label="Mediator at three budgets",
        )
        for row in shown:
            if row not in own:
                at = (row["bytes / model"], row["accuracy"])
                axis.plot(*at, marker="o", ms=4, ls="", color=COLOURS[1])
                axis.annotate(
                    row["method"], at, fontsize=5, xytext=(3, 2), textcoords="offset points"
                )
        axis.set_xlabel("stored bytes / bytes of one model")
        axis.set_ylabel("held-out accuracy, mean of tasks")
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7, loc="lower right")
    save_figure(fig, RESULTS / "mediator_bytes.png")
