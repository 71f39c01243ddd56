"""The figures of a report: throughput and memory, parts of a step, roofline, latencies, lines."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsys.bench.compare import number
from jaxsys.bench.records import label
from jaxsys.core.report import COLOURS, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_MOST_BARS = 40
_MARKS = {"matmul": "o", "attention": "s", "norm": "^", "softmax": "v", "elementwise": "D",
          "gather": "P"}  # fmt: skip
_LINE = "#555555"


def throughput_and_memory(rows: Sequence[Row]) -> "Figure | None":
    """Draw tokens per second and peak memory as bars, the fastest first.

    Args:
      rows: of training or fine-tuning.

    Returns:
      The figure; None where no row has a throughput.

    >>> throughput_and_memory([]) is None
    True
    """
    done = [row for row in rows if number(row, "tokens_per_s") is not None]
    done = sorted(done, key=lambda row: -(number(row, "tokens_per_s") or 0))[:_MOST_BARS]
    if not done:
        return None
    fig, ((left, right),) = figure(1, 2, height=max(2.2, 0.24 * len(done) + 0.9), width=5.2)
    places = np.arange(len(done))[::-1]
    left.barh(places, [number(row, "tokens_per_s") for row in done], color=COLOURS[0])
    left.set_yticks(places, _labels(done), fontsize=7)
    left.set_xlabel("tokens/s")
    for offset, field, name, colour in (
        (0.2, "peak_memory_measured_bytes", "measured", COLOURS[1]),
        (-0.2, "peak_memory_predicted_bytes", "predicted", COLOURS[5]),
    ):
        held = [(number(row, field) or 0) / 2**20 for row in done]
        if any(held):
            right.barh(places + offset, held, height=0.4, color=colour, label=name)
            right.legend(fontsize=7)
    right.set_yticks(places, [])
    right.set_xlabel("peak memory, MiB")
    return fig


def labels(rows: Sequence[Row]) -> tuple[list[str], str]:
    """Name rows by the flags in which they differ.

    Args:
      rows: of one kind.

    Returns:
      A name for each, and the flags that all share, as text.

    >>> labels([{"flags": {"batch": 2, "zero": 1}}, {"flags": {"batch": 2, "zero": 2}}])
    (['zero 1', 'zero 2'], 'batch 2')
    """
    flat = [_flat(row["flags"]) for row in rows]
    names = list(dict.fromkeys(key for flags in flat for key in flags))
    same = {n for n in names if len({str(flags.get(n)) for flags in flat}) == 1}
    found = [label({"flags": {k: v for k, v in flags.items() if k not in same}}) for flags in flat]
    shared = label({"flags": {k: v for k, v in (flat[0] if flat else {}).items() if k in same}})
    return [text.removeprefix("technique ") for text in found], shared


def _labels(rows: Sequence[Row]) -> list[str]:
    own, shared = labels(rows)
    return [_short(text or shared) for text in own]


def _flat(flags: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in flags.items():
        found |= _flat(value) if isinstance(value, Mapping) else {key: value}
    return found


def _short(text: str, most: int = 48) -> str:
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text.replace("$", r"\$")  # no formulas: the text may be anybody's


def parts(row: Row) -> "Figure | None":
    """Draw a step's parts: stacked bars of forward, backward and optimizer, and their shares.

    Args:
      row: of kind ``modules``.

    Returns:
      The figure; None where the row has no parts.

    >>> parts({"parts": {}}) is None
    True
    """
    found = row.get("parts")
    table = {
        key: (number(part, "profiled.median_s") or 0.0) * 1e3
        for key, part in (found.items() if isinstance(found, Mapping) else ())
    }
    if not any(table.values()):
        return None
    table = {key if " " in key else f"{key} {key}": value for key, value in table.items()}
    names = list(dict.fromkeys(key.partition(" ")[0] for key in table))
    phases = list(dict.fromkeys(key.partition(" ")[2] for key in table))
    fig, ((left, right),) = figure(1, 2, width=4.8, height=3.6)
    places, base = np.arange(len(names))[::-1], np.zeros(len(names))
    for phase, colour in zip(phases, COLOURS * 2, strict=False):
        held = np.array([table.get(f"{name} {phase}", 0.0) for name in names])
        left.barh(places, held, left=base, color=colour, label=_short(phase))
        base += held
    left.set_yticks(places, [_short(name) for name in names])
    left.set_xlabel("ms of a step (profiled)")
    left.legend(fontsize=7)
    order = np.argsort(-base)
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    right.pie(
        base[order],
        labels=[_short(names[i]) if base[i] > 0.02 * base.sum() else "" for i in order],
        colors=colours,
        startangle=90,
        counterclock=False,
        wedgeprops={"edgecolor": "white", "linewidth": 0.6},
        textprops={"fontsize": 7},
    )
    return fig


def roofline(rows: Sequence[Row]) -> "Figure | None":
    """Draw every operator under the roofline, and those that compute nothing by their bandwidth.

    Args:
      rows: of kind ``ops``.

    Returns:
      The figure; None without operators.

    Reference: Williams, Waterman and Patterson, "Roofline" (2009).

    >>> roofline([]) is None
    True
    """
    done = [row for row in rows if number(row, "bytes_per_s") is not None]
    if not done:
        return None
    fig, ((left, right),) = figure(1, 2, width=5.2, height=3.8)
    dtypes = list(dict.fromkeys(str(row["flags"].get("dtype")) for row in done))
    colour = dict(zip(dtypes, COLOURS * 9, strict=False))
    for row in done:
        flops, n_bytes = number(row, "flops") or 0.0, number(row, "bytes") or 1.0
        mark = _MARKS.get(str(row["flags"].get("group")), "x")
        at = {"marker": mark, "color": colour[str(row["flags"].get("dtype"))], "s": 18,
              "alpha": 0.8, "linewidths": 0}  # fmt: skip
        if flops > 0:
            left.scatter(flops / n_bytes, (number(row, "flops_per_s") or 0) / 1e9, **at)
        right.scatter(n_bytes / 2**20, (number(row, "bytes_per_s") or 0) / 1e9, **at)
    for dtype in dtypes:
        _roof(
            left, right, [r for r in done if str(r["flags"].get("dtype")) == dtype], colour[dtype]
        )
    left.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    right.set(xscale="log", yscale="log", xlabel="MiB read and written", ylabel="GB/s")
    for name, mark in _MARKS.items():
        if any(row["flags"].get("group") == name for row in done):
            right.scatter([], [], marker=mark, color=_LINE, s=18, label=name)
    for dtype in dtypes:
        right.scatter([], [], marker="o", color=colour[dtype], s=18, label=_short(dtype))
    right.legend(fontsize=6, ncols=2)
    return fig


def _roof(left: Any, right: Any, rows: Sequence[Row], colour: str) -> None:
    rates = [(number(r, "peak.flops_per_s"), number(r, "peak.bytes_per_s")) for r in rows]
    known = [(f, b) for f, b in rates if f and b]
    if known:
        flops, bandwidth = known[0]
        x = np.geomspace(2**-5, 2**12, 100)
        left.plot(x, np.minimum(flops, x * bandwidth) / 1e9, color=colour, linewidth=1)
        right.axhline(bandwidth / 1e9, color=_LINE, linewidth=1)


def latencies(rows: Sequence[Row]) -> "Figure | None":
    """Draw the share of requests that were answered within a time, a line for each row.

    Args:
      rows: of kind ``serve``.

    Returns:
      The figure; None where no row has such shares.

    >>> latencies([]) is None
    True
    """
    done = [(row, _pairs(row.get("e2e_cdf"))) for row in rows]
    done = [(row, pairs) for row, pairs in done if len(pairs)]
    if not done:
        return None
    fig, ((axis,),) = figure(width=6.4, height=3.6)
    for text, (_, pairs) in zip(_labels([row for row, _ in done]), done, strict=True):
        axis.step(pairs[:, 0], 100 * pairs[:, 1], where="post", label=text)
    axis.set(xlabel="seconds from sending to the last token", ylabel="% of requests", ylim=(0, 101))
    axis.legend(fontsize=7)
    return fig


def _pairs(value: Any) -> np.ndarray:
    try:
        found = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return np.zeros((0, 2))
    return found if found.ndim == 2 and found.shape[1] == 2 else np.zeros((0, 2))


def lines(rows: Sequence[Row]) -> "Figure | None":
    """Draw seconds by size for copies and collectives, with the lines fitted to them.

    Args:
      rows: of kind ``comm``.

    Returns:
      The figure; None where nothing was timed.

    >>> lines([]) is None
    True
    """
    names = list(dict.fromkeys(str(row["flags"].get("operator")) for row in rows))
    fig, ((axis,),) = figure(width=6.4, height=4.0)
    drawn = False
    for name, colour in zip(names, COLOURS * 9, strict=False):
        own = [row for row in rows if str(row["flags"].get("operator")) == name]
        points = [(number(r, "flags.bytes"), number(r, "time.median_s")) for r in own]
        points = [(n, s) for n, s in points if n and s]
        if not points:
            continue
        sizes, seconds = np.array(points).T
        axis.scatter(sizes / 2**10, 1e3 * seconds, color=colour, s=14, label=_short(name))
        drawn = True
        for row in own:
            alpha, beta = number(row, "line.alpha_s"), number(row, "line.beta_s_per_unit")
            if alpha is not None and beta is not None:
                x = np.geomspace(sizes.min(), sizes.max(), 100)
                axis.plot(x / 2**10, 1e3 * (alpha + beta * x), color=colour, linewidth=1)
    if not drawn:
        return None
    axis.set(xscale="log", yscale="log", xlabel="KiB", ylabel="ms")
    axis.legend(fontsize=7)
    return fig
