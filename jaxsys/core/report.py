"""Write what was found: tables, JSON lines, figures in one style, and files that are never half.

matplotlib and rich are imported only where they are used, and figures are made without pyplot, so
nothing here needs a display or leaves global state behind.
"""

import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsys.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's eight colours, told apart under the common forms of colour blindness.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
)


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Lay rows out as a Markdown table, numbers to the right.

    Args:
      rows: one mapping of column name to value for each row; a missing value leaves a blank.
      columns: names and order; all that occur, in order of first occurrence, if left out.

    Returns:
      The table, ending with a line feed; empty if there is no column.

    >>> print(markdown_table([{"name": "ssgd", "step": 0.5}, {"name": "local"}]), end="")
    | name  | step |
    | :---- | ---: |
    | ssgd  |  0.5 |
    | local |      |
    """
    names, cells, right = _cells(rows, columns)
    if not names:
        return ""
    header = [_escape(name) for name in names]
    body = [[_escape(cell) for cell in row] for row in cells]
    widths = [max([3, *(len(row[i]) for row in [header, *body])]) for i in range(len(names))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        return "| " + " | ".join(padded) + " |\n"

    rule = [
        "-" * (width - 1) + ":" if to_right else ":" + "-" * (width - 1)
        for width, to_right in zip(widths, right, strict=True)
    ]
    return line(header) + line(rule) + "".join(line(row) for row in body)


def print_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    *,
    title: str | None = None,
    stderr: bool = False,
) -> None:
    """Print rows as a table on the terminal.

    Args:
      rows: one mapping of column name to value for each row.
      columns: names and order; all that occur if left out.
      title: printed above.
      stderr: print on standard error, where standard output belongs to a JSON object.

    >>> print_table([{"name": "ssgd", "step": 0.5}])
    ┏━━━━━━┳━━━━━━┓
    ┃ name ┃ step ┃
    ┡━━━━━━╇━━━━━━┩
    │ ssgd │  0.5 │
    └──────┴──────┘
    """
    from rich.console import Console
    from rich.table import Table

    names, cells, right = _cells(rows, columns)
    table = Table(title=title)
    for name, to_right in zip(names, right, strict=True):
        table.add_column(name, justify="right" if to_right else "left")
    for row in cells:
        table.add_row(*row)
    console = Console(stderr=stderr, markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no edge at which to cut columns
    console.print(table)


def to_json(value: Any) -> str:
    """Encode a value as one line of strict JSON.

    NumPy and JAX scalars and arrays become numbers and lists, tuples become lists, and numbers
    that JSON does not know (nan, inf) become null.

    >>> to_json({"loss": np.float32(0.5), "phases": ((0, 1), ()), "gap": float("nan")})
    '{"loss": 0.5, "phases": [[0, 1], []], "gap": null}'
    """
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Any]) -> None:
    """Write one line of JSON for each row, replacing the file at once.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> write_jsonl(f"{folder}/log.jsonl", [{"step": 0}, {"step": 1}])
    >>> Path(folder, "log.jsonl").read_text()
    '{"step": 0}\\n{"step": 1}\\n'
    """
    atomic_write(path, "".join(to_json(row) + "\n" for row in rows))


def append_jsonl(path: str | os.PathLike[str], row: Any) -> None:
    """Append one line of JSON in a single write, making the folder if need be.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> append_jsonl(f"{folder}/log.jsonl", {"step": 0})
    >>> Path(folder, "log.jsonl").read_text()
    '{"step": 0}\\n'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab") as file:
        file.write((to_json(row) + "\n").encode())


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file under a temporary name and rename it, so that no reader ever sees half of it.

    Args:
      path: the file; its folder is made if need be.
      content: bytes, or text written as UTF-8.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> atomic_write(f"{folder}/new/plan.json", "{}")
    >>> [p.name for p in Path(folder, "new").iterdir()]
    ['plan.json']
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    # In the same folder: a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def figure(
    nrows: int = 1, ncols: int = 1, *, width: float = 4.8, height: float = 3.2
) -> tuple["Figure", np.ndarray]:
    """Make a figure in the house style.

    Args:
      nrows: rows of panels.
      ncols: columns of panels.
      width: of one panel in inches.
      height: of one panel in inches.

    Returns:
      The figure, and its axes as an array `[nrows, ncols]`.

    >>> fig, axes = figure(1, 2)
    >>> axes.shape
    (1, 2)
    """
    from cycler import cycler
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width * ncols, height * nrows), dpi=150, layout="constrained")
    axes = fig.subplots(nrows, ncols, squeeze=False)
    for axis in axes.flat:
        axis.set_prop_cycle(cycler(color=COLOURS))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(visible=True, color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        for label in (axis.title, axis.xaxis.label, axis.yaxis.label):
            label.set_fontsize(9)
    return fig, axes


def save_figure(fig: "Figure", path: str | os.PathLike[str]) -> None:
    """Save a figure in the format that its name ends in; the same figure gives the same bytes.

    Args:
      fig: a matplotlib figure.
      path: ends in .png, .svg or .pdf.

    Raises:
      UserError: for another ending.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save_figure(figure()[0], f"{folder}/loss.png")
    >>> Path(folder, "loss.png").read_bytes()[1:4]
    b'PNG'
    """
    # A date or a version in the file would show as a change where nothing changed.
    silent = {
        ".png": {"Software": None},
        ".svg": {"Date": None, "Creator": None},
        ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    suffix = Path(path).suffix.lower()
    if suffix not in silent:
        raise UserError(f"figure name {str(path)!r} ends in {suffix!r}; use .png, .svg or .pdf")
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "jaxsys"}):
        fig.savefig(buffer, format=suffix[1:], metadata=silent[suffix])
    atomic_write(path, buffer.getvalue())


def format_seconds(seconds: int | float) -> str:
    """Write a duration with three digits and a fitting unit.

    >>> [format_seconds(s) for s in (2.5e-5, 0.0123, 0.5, 61.0, 7384.0)]
    ['25 µs', '12.3 ms', '500 ms', '1 min 1 s', '2 h 3 min']
    """
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60} s"
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        # 0.9996 of a unit would round to "1e+03" of the next.
        if seconds * factor >= 0.9995:
            return f"{seconds * factor:.3g} {unit}"
    return "0 s" if seconds == 0 else f"{seconds * 1e9:.3g} ns"


def format_bytes(count: int | float) -> str:
    """Write a number of bytes with three digits and a binary unit.

    >>> [format_bytes(n) for n in (0, 1023, 1536, 3 * 2**30)]
    ['0 B', '1023 B', '1.50 KiB', '3.00 GiB']
    """
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    # 1023.5 would round to a four-digit "1024 KiB".
    while abs(value) >= 1023.5 and len(units) > 1:
        value /= 1024
        del units[0]
    digits = 0 if units[0] == "B" else max(0, 3 - len(str(int(abs(value)))))
    return f"{value:.{digits}f} {units[0]}"


def _cells(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None
) -> tuple[list[str], list[list[str]], list[bool]]:
    names = list(
        dict.fromkeys(name for row in rows for name in row) if columns is None else columns
    )
    cells = [[_text(row.get(name)) for name in names] for row in rows]
    # A column goes to the right if all that it holds are numbers.
    right = []
    for name in names:
        held = [row[name] for row in rows if row.get(name) is not None]
        right.append(bool(held) and all(_is_number(value) for value in held))
    return names, cells, right


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return str(value)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [_plain(item) for item in items]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return _plain(np.asarray(value).tolist())
    raise UserError(f"a {type(value).__name__} cannot be written as JSON; convert it to numbers")


def _umask() -> int:
    # The only way to read it is to set it.
    current = os.umask(0)
    os.umask(current)
    return current
