"""Tables and figures of results, as Markdown and as one web page that needs nothing else.

Rows may come from a file of somebody else's: fields that are missing or odd leave a blank, and text
is escaped.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxsys.bench import figures
from jaxsys.bench.compare import number
from jaxsys.bench.page import html_page
from jaxsys.bench.records import KINDS
from jaxsys.core.report import atomic_write, markdown_table, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_TITLES = {
    "train": "Training",
    "finetune": "Fine-tuning",
    "serve": "Serving",
    "modules": "Parts of a step",
    "ops": "Operators",
    "comm": "Copies and collectives",
    "static": "Without running",
}


class Section(NamedTuple):
    """A part of a report.

    Attributes:
      title: heading.
      notes: sentences above the table.
      rows: of the table, name of the column to value.
      figures: name of the file without ending, what it shows, and the figure.

    >>> Section("Training", (), (), ()).title
    'Training'
    """

    title: str
    notes: tuple[str, ...]
    rows: tuple[Row, ...]
    figures: tuple[tuple[str, str, "Figure"], ...]


def sections(rows: Sequence[Row]) -> list[Section]:
    """Sort rows of results into the sections of a report.

    Args:
      rows: as `records.read` gives them.

    Returns:
      One section for the machine, and one for each kind that occurs.

    >>> from jaxsys.bench.records import record
    >>> [s.title for s in sections([record("comm", None, {"operator": "permute"})])]
    ['Machine', 'Copies and collectives']
    """
    makers: dict[str, Callable[[Sequence[Row]], Section]] = {
        "train": _training, "finetune": _training, "serve": _serving, "modules": _modules,
        "ops": _operators, "comm": _communication, "static": _static,
    }  # fmt: skip
    found = [_machines(rows)]
    for kind in KINDS:
        if chosen := [row for row in rows if row["kind"] == kind]:
            found.append(makers[kind](chosen))
    return found


def write(rows: Sequence[Row], folder: Path, *, title: str = "Where the time goes") -> list[Path]:
    """Write report.md with its figures, and report.html with everything in it.

    Args:
      rows: as `records.read` gives them.
      folder: made if need be.
      title: heading.

    Returns:
      The files written.

    >>> import tempfile
    >>> from jaxsys.bench.records import record
    >>> rows = [record("train", 0, {"technique": "naive"}, tokens_per_s=10.0)]
    >>> [path.name for path in write(rows, Path(tempfile.mkdtemp()))]
    ['training.png', 'report.md', 'report.html']
    """
    found = sections(rows)
    paths = []
    for section in found:
        for name, _, figure in section.figures:
            paths.append(folder / f"{name}.png")
            save_figure(figure, paths[-1])
    images = {path.stem: path.read_bytes() for path in paths}
    atomic_write(folder / "report.md", _markdown(title, found))
    atomic_write(folder / "report.html", html_page(title, found, images))
    return [*paths, folder / "report.md", folder / "report.html"]


def _markdown(title: str, found: Iterable[Section]) -> str:
    parts = [f"# {_plain(title)}\n"]
    for section in found:
        parts.append(f"\n## {_plain(section.title)}\n\n")
        parts += [f"{_plain(note)}\n\n" for note in section.notes]
        parts.append(_plain(markdown_table(section.rows)))
        parts += [f"\n![{_plain(what)}]({name}.png)\n" for name, what, _ in section.figures]
    return "".join(parts)


def _plain(text: str) -> str:
    """Escape what Markdown would take for markup of a page."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _machines(rows: Sequence[Row]) -> Section:
    found: dict[str, Row] = {}
    for row in rows:
        machine, versions, git, environment = (
            row[name] if _is(row, name) else {}
            for name in ("machine", "versions", "git", "environment")
        )
        devices = machine.get("devices")
        devices = devices if isinstance(devices, list | tuple) else ()
        line = {
            "processor": machine.get("cpu"),
            "cores": machine.get("cores"),
            "memory GiB": machine.get("memory_gib"),
            "devices": f"{len(devices)} × {devices[0]}" if devices else None,
            "system": machine.get("os"),
            "Python": machine.get("python"),
            **{name: versions.get(name) for name in ("jaxsys", "jax", "jaxlib")},
            "set": ", ".join(f"{k}={v}" for k, v in environment.items()),
            "commit": str(git.get("commit", ""))[:12] + ("" if git.get("clean", True) else " +"),
        }
        found[str(line)] = line
    note = "A plus behind the commit: files were changed."
    return Section("Machine", (note,), tuple(found.values()), ())


def timed(row: Row, path: str, scale: int | float = 1e3) -> str | None:
    """Write a timed figure of a row as median and interval, in milliseconds.

    Args:
      row: of results.
      path: of the figure.
      scale: what seconds are multiplied with.

    Returns:
      The text; None where the row has no such figure.

    >>> timed({"step": {"median_s": 0.5, "low_s": 0.4, "high_s": 0.6, "runs": 9}}, "step")
    '500 [400, 600]'
    """
    median, low, high = (number(row, f"{path}.{end}_s") for end in ("median", "low", "high"))
    if median is None:
        return None
    if low is None or high is None:
        return f"{scale * median:.4g}"
    return f"{scale * median:.4g} [{scale * low:.4g}, {scale * high:.4g}]"


def _scaled(row: Row, path: str, scale: int | float) -> float | None:
    value = number(row, path)
    return None if value is None else float(f"{scale * value:.4g}")


def _status(row: Row) -> str:
    return "" if row["status"] == "ok" else f"{row['status']}: {row.get('why', '')}"


def _training(rows: Sequence[Row]) -> Section:
    kind = rows[0]["kind"]
    own, shared = figures.labels(rows)
    table = [
        {
            "": name,
            "tokens/s": _scaled(row, "tokens_per_s", 1.0),
            "step ms": timed(row, "step"),
            "MFU %": _scaled(row, "mfu", 100.0),
            "HFU %": _scaled(row, "hfu", 100.0),
            "memory MiB, predicted": _scaled(row, "peak_memory_predicted_bytes", 2**-20),
            "measured": _scaled(row, "peak_memory_measured_bytes", 2**-20),
            "compile s": _scaled(row, "compile_s", 1.0),
            "why not": _status(row),
        }
        for name, row in zip(own, rows, strict=True)
    ]
    name = "training" if kind == "train" else "finetuning"
    what = "Tokens per second and peak memory of each technique"
    drawn = figures.throughput_and_memory(rows)
    shown = ((name, what, drawn),) if drawn else ()
    return Section(_TITLES[kind], _all(shared), tuple(table), shown)


def _all(shared: str) -> tuple[str, ...]:
    return (f"All rows: {shared}.",) if shared else ()


def _serving(rows: Sequence[Row]) -> Section:
    table = []
    own, shared = figures.labels(rows)
    for text, row in zip(own, rows, strict=True):
        line: dict[str, Any] = {"": text}
        for name in ("ttft", "tpot", "itl", "e2e"):
            line |= {
                f"{name.upper()} {p} ms": _scaled(row, f"{name}_s.{p}", 1e3) for p in ("p50", "p99")
            }
        line |= {
            "tokens/s": _scaled(row, "output_tokens_per_s", 1.0),
            "requests/s": _scaled(row, "requests_per_s", 1.0),
            "goodput/s": _scaled(row, "goodput_per_s", 1.0),
            "requests": row.get("requests"),
            "failed": row.get("failed"),
            "why not": _status(row),
        }
        table.append(line)
    notes = (
        *_all(shared),
        "TTFT: first token. TPOT: the others' mean, (E2E − TTFT) / (tokens − 1). ITL: between two "
        "tokens. E2E: whole request. Goodput: requests a second that kept the limits.",
    )
    drawn = figures.latencies(rows)
    shown = (("latency", "Share of requests answered within a time", drawn),) if drawn else ()
    return Section(_TITLES["serve"], notes, tuple(table), shown)


def _modules(rows: Sequence[Row]) -> Section:
    own, shared = figures.labels(rows)
    table, notes, shown = [], [*_all(shared)], []
    for i, (name, row) in enumerate(zip(own, rows, strict=True)):
        if row["status"] != "ok":
            notes.append(f"{name}: {_status(row)}.")
            continue
        parts = row.get("parts")
        for key, part in parts.items() if isinstance(parts, Mapping) else ():
            if not isinstance(part, Mapping):
                continue
            table.append(
                {
                    "": name,
                    "part": key,
                    "profiled ms": timed(part, "profiled"),
                    "% of step": _scaled(part, "share", 100.0),
                    "alone ms": timed(part, "alone"),
                    "GFLOP": _scaled(part, "flops", 1e-9),
                }
            )
        notes += _sums(row, name)
        if drawn := figures.parts(row):
            what = f"Parts of a step, {name or shared}"
            shown.append((f"parts_{i}" if i else "parts", what, drawn))
    several = len(set(own)) > 1
    kept = [line if several else {k: v for k, v in line.items() if k} for line in table]
    return Section(_TITLES["modules"], tuple(notes), tuple(kept), tuple(shown))


def _sums(row: Row, name: str) -> list[str]:
    """Say how the two ways of timing parts add up."""
    said = [f"{name}: the step takes {timed(row, 'step')} ms.".removeprefix(": ")]
    for field, what in _TOTALS:
        middle, low, high = (number(row, f"{field}.{end}") for end in ("median", "low", "high"))
        if middle is not None and low is not None and high is not None:
            said.append(
                f"Parts {what} add up to {100 * middle:.1f} % of the step "
                f"[{100 * low:.1f}, {100 * high:.1f}]."
            )
    return [" ".join(said)]


_TOTALS = (
    ("profiled_total", "profiled"),
    ("alone_total", "timed alone"),
    ("groups_total", "timed alone as attention, mlp, head, embedding and optimizer"),
)


def _operators(rows: Sequence[Row]) -> Section:
    table = [
        {
            **{name: row["flags"].get(name) for name in ("operator", "shape", "dtype")},
            "ms": timed(row, "time"),
            "floor ms": _scaled(row, "floor_s", 1e3),
            "% of floor": _scaled(row, "percent_of_floor", 1.0),
            "bound": row.get("bound"),
            "GFLOP/s": _scaled(row, "flops_per_s", 1e-9),
            "GB/s": _scaled(row, "bytes_per_s", 1e-9),
            "why not": _status(row),
        }
        for row in rows
    ]
    peaks = {str(row["peak"].get("source")): row["peak"] for row in rows if _is(row, "peak")}
    notes = [
        f"Peaks: {(number(peak, 'flops_per_s') or 0) / 1e9:.4g} GFLOP/s, "
        f"{(number(peak, 'bytes_per_s') or 0) / 1e9:.4g} GB/s ({source})."
        for source, peak in peaks.items()
    ]
    notes.append("Above 100 % of the floor: what was read or written was in a cache.")
    drawn = figures.roofline(rows)
    shown = (("roofline", "Operators under the roofline", drawn),) if drawn else ()
    return Section(_TITLES["ops"], tuple(notes), tuple(table), shown)


def _is(row: Row, name: str) -> bool:
    return isinstance(row.get(name), Mapping)


def _communication(rows: Sequence[Row]) -> Section:
    table = []
    for row in rows:
        if number(row, "flags.bytes") is not None:
            continue
        beta = number(row, "line.beta_s_per_unit")
        table.append(
            {
                **{name: row["flags"].get(name) for name in ("operator", "devices", "dtype")},
                "α µs": _scaled(row, "line.alpha_s", 1e6),
                "1/β GB/s": float(f"{1e-9 / beta:.4g}") if beta else None,
                "r²": _scaled(row, "line.r2", 1.0),
                "error %": _scaled(row, "line.residual", 100.0),
                "no line": row.get("refused") or _status(row),
            }
        )
    drawn = figures.lines(rows)
    shown = (("communication", "Seconds by size, and the lines fitted", drawn),) if drawn else ()
    return Section(_TITLES["comm"], (), tuple(table), shown)


def _static(rows: Sequence[Row]) -> Section:
    own = ("format", "kind", "status", "machine", "versions", "git", "flags", "seed", "why")
    own_names, shared = figures.labels(rows)
    table = []
    for name, row in zip(own_names, rows, strict=True):
        plain = {
            key: value
            for key, value in row.items()
            if key not in own and isinstance(value, str | int | float)
        }
        table.append({"": name, **plain, "why not": _status(row)})
    return Section(_TITLES["static"], _all(shared), tuple(table), ())
