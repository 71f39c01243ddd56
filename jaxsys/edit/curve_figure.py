"""Table and figure of the cells of `jaxsys.edit.curve`."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxsys.core import report
from jaxsys.core.errors import UserError

_EDIT = ("efficacy", "paraphrase", "neighbourhood", "locality", "score", "written")


def curve_table(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lay cells out as rows: method, edits, abilities, how well the facts are known, seconds.

    Args:
      cells: from `Grid.run`.

    Returns:
      A row for each cell. ``mute`` is the largest share of questions of a task to which nothing was
      answered (written, where there is such a task), ``same`` the largest share of one answer; both
      are there only where a task has them.

    >>> cell = {"method": "rome", "n": 1, "edit": {}, "abilities": {"arc": {"value": 0.5}}}
    >>> curve_table([cell])
    [{'method': 'rome', 'edits': 1, 'arc': 0.5}]
    """
    rows = []
    for cell in cells:
        row: dict[str, Any] = {"method": cell["method"], "edits": cell["n"]}
        if "failed" in cell:
            rows.append({**row, "failed": cell["failed"]})
            continue
        tasks = cell["abilities"]
        row |= {name: round(task["value"], 3) for name, task in tasks.items()}
        for title, keys in (("mute", ("muted", "empty")), ("same", ("constant",))):
            found = [next((t[k] for k in keys if k in t), None) for t in tasks.values()]
            known = [value for value in found if value is not None]
            if known:
                row[title] = round(max(known), 3)
        row |= {k: round(cell["edit"][k]["value"], 3) for k in _EDIT if k in cell["edit"]}
        if "edit_s" in cell:
            row["s per edit"] = round(cell["edit_s"] / cell["n"], 2)
        rows.append(row)
    return rows


def draw_curve(cells: Sequence[Mapping[str, Any]], path: Any, title: str = "") -> None:
    """Draw each ability, and what became of the edits, against the number of edits.

    Bands are 95 % bootstrap intervals over questions or records; the dashed line is chance.

    Args:
      cells: from `Grid.run`.
      path: ends in .png, .svg or .pdf.
      title: above.

    Raises:
      UserError: if no cell has edits in it.

    >>> import tempfile
    >>> task = {"value": 0.5, "low": 0.4, "high": 0.6}
    >>> cells = [{"method": "rome", "n": 1, "edit": {}, "abilities": {"arc": task}}]
    >>> draw_curve(cells, f"{tempfile.mkdtemp()}/a.png")
    """
    good = [cell for cell in cells if "failed" not in cell]
    methods = list(dict.fromkeys(cell["method"] for cell in good if cell["n"] > 0))
    if not methods:
        raise UserError("there is no cell with edits to draw; run at least one method")
    before = [cell for cell in good if cell["n"] == 0]
    tasks = list(dict.fromkeys(name for cell in good for name in cell["abilities"]))
    asked = [k for k in ("efficacy", "paraphrase", "locality") if any(k in c["edit"] for c in good)]
    muted = [t for t in tasks if any("muted" in c["abilities"].get(t, {}) for c in good)]
    panels = [("abilities", t) for t in tasks] + [("edit", k) for k in asked]
    panels += [("muted", t) for t in muted]
    columns = min(3, len(panels))
    fig, axes = report.figure(-(-len(panels) // columns), columns, width=3.8, height=2.8)
    for axis, (part, name) in zip(axes.flat, panels, strict=False):
        for i, method in enumerate(methods):
            own = [*before, *(c for c in good if c["method"] == method)]
            points = [(c["n"], _point(c, part, name)) for c in sorted(own, key=lambda c: c["n"])]
            _line(axis, [p for p in points if p[1] is not None], method, i)
        chance = next(
            (t["chance"] for c in good if "chance" in (t := c["abilities"].get(name, {}))), None
        )
        if part == "abilities" and chance:
            axis.axhline(chance, color="#888888", linestyle="--", linewidth=0.8)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(left=-0.1)
        axis.set_xlabel("edits")
        axis.set_title(f"{name}: nothing written" if part == "muted" else name)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=6)
    if title:
        fig.suptitle(title, fontsize=9)
    report.save_figure(fig, path)


def _point(cell: Mapping[str, Any], part: str, name: str) -> tuple[float, float, float] | None:
    if part == "muted":
        value = cell["abilities"].get(name, {}).get("muted")
        return None if value is None else (value, value, value)
    found = cell[part].get(name)
    if found is None or found["value"] is None:
        return None
    value = found["value"]
    low, high = found.get("low"), found.get("high")
    return value, value if low is None else low, value if high is None else high


def _line(axis: Any, points: Sequence[tuple[int, Any]], method: str, i: int) -> None:
    if not points:
        return
    x = [n for n, _ in points]
    value, low, high = zip(*(p for _, p in points), strict=True)
    # More methods than colours: the next round of colours is dashed.
    colour = report.COLOURS[i % 7]
    style = ("-", "--", ":")[i // 7 % 3]
    axis.plot(x, value, marker="o", ms=3, lw=1.2, color=colour, linestyle=style, label=method)
    axis.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
