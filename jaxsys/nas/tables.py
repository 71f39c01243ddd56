"""Tables of architectures with scores and accuracies, from CSV, JSON and NPZ files.

The schema is one row for each architecture and one column for each quantity:

* CSV: a header with column names; a cell is either ``e12,e13,e14,e23,e24,e34`` or ``arch_str``.
* JSON: either a list of objects (the columns are the keys), or NASLib's form
  ``{data set: {"(0, 1, 2, 3, 4, 0)": {"snip": {"score": 1.5}, "val_accuracy": 90.1}}}``, with
  or without the name of the search space above.
* NPZ: one array for each column, first axis the architectures; nothing is unpickled.

Rows whose cell occurs twice, values that are missing, and columns that do not exist are refused by
name. Files of other spaces need no cell columns: load them with `cells=False`.
The name `digits` stands for the benchmark that the package carries; see `digits_benchmark`.
"""

import csv
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.nas import space

DIGITS = Path(__file__).with_name("digits_cells.npz")
EDGE_COLUMNS = tuple(f"e{a}{b}" for a, b in space.EDGES)


class Table(NamedTuple):
    """Architectures and what is known of them.

    Attributes:
      cells: `[N, 6]` operations of NAS-Bench-201, or None for another space.
      columns: name -> `[N]` or `[N, ...]`; numbers, or strings.

    >>> Table(None, {"acc": np.array([90.0])}).column("acc").tolist()
    [90.0]
    """

    cells: np.ndarray | None
    columns: dict[str, np.ndarray]

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers.

        Raises:
          UserError: if it does not exist, holds text, or a value is missing.
        """
        if name not in self.columns:
            raise UserError(
                f"the table has no column {name!r}; it has {', '.join(self.columns)}; choose one"
            )
        values = self.columns[name]
        if not np.issubdtype(values.dtype, np.number):
            raise UserError(
                f"column {name!r} holds text such as {values.flat[0]!r}; expected numbers; choose "
                "another column"
            )
        missing = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))
        if missing.size:
            raise UserError(
                f"column {name!r} has no number in row {int(missing[0])} and in "
                f"{missing.size - 1} others; expected one for each architecture; complete the "
                "table or select rows first"
            )
        return values

    def select(self, rows: Any) -> "Table":
        """Keep some rows, by mask or index."""
        cells = None if self.cells is None else self.cells[rows]
        return Table(cells, {k: v[rows] for k, v in self.columns.items()})


def load(path: Path | str, *, dataset: str | None = None, cells: bool = True) -> Table:
    """Read a table by its ending: .csv, .json or .npz.

    Args:
      path: the file, or `digits`.
      dataset: in a file with a column `dataset`, or in NASLib's form, the rows to keep.
      cells: whether rows are NAS-Bench-201 cells.

    Returns:
      The table, in the file's order.

    Raises:
      UserError: for an ending, cell, row or form that is not understood, naming it.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "t.csv")
    >>> _ = path.write_text("e12,e13,e14,e23,e24,e34,acc\\n0,0,0,0,0,1,90.5\\n")
    >>> load(path).column("acc").tolist()
    [90.5]
    """
    file = DIGITS if str(path) == "digits" else Path(path)
    readers = {".csv": _read_csv, ".json": _read_json, ".npz": _read_npz}
    if file.suffix.lower() not in readers:
        raise UserError(
            f"table {str(file)!r} ends in {file.suffix!r}; expected .csv, .json or .npz; convert it"
        )
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"table {str(file)!r} cannot be read ({error.strerror}); expected a file; correct the "
            "path"
        ) from None
    columns = readers[file.suffix.lower()](raw, file.name, dataset)
    if dataset is not None and "dataset" in columns:
        keep = columns["dataset"] == dataset
        if not keep.any():
            names = ", ".join(sorted(set(columns["dataset"].tolist())))
            raise UserError(
                f"{file.name} has no rows of data set {dataset!r}; it has {names}; choose one"
            )
        columns = {k: v[keep] for k, v in columns.items()}
    return Table(_cells(columns, file.name) if cells else None, columns)


def digits_benchmark() -> Table:
    """Load the benchmark that the package carries: 3,375 cells trained on the 8×8 digits.

    A random sample of the 9,445 cells that differ once operations through which nothing flows are
    `none` (`space.canonical`); `experiments/nas/own_benchmark.py` trained them. Columns:

    * valid, test: accuracies in percent, mean of two seeds; test_seeds `[N, 2]`;
    * test_loss, test_loss_seeds, train_loss: cross-entropies in nats after training;
    * params, l2_norm, grad_norm, snip, plain, grasp, fisher, synflow, jacob_cov, epe_nas, naswot,
      zico: proxies of the untrained network; synflow_nodes (logarithms) and snip_nodes `[N, 8]`
      layer by layer: stem, six edges, classifier.

    >>> table = digits_benchmark()
    >>> len(table.cells), table.column("snip_nodes").shape
    (3375, (3375, 8))
    """
    return load(DIGITS)


def join(left: Table, right: Table) -> Table:
    """Put the columns of two tables side by side, matching by cell; keeps cells that both have.

    Raises:
      UserError: if no cell is in both, or a table has none.

    >>> a = Table(np.zeros((1, 6), np.int32), {"x": np.array([1.0])})
    >>> b = Table(np.zeros((1, 6), np.int32), {"y": np.array([2.0])})
    >>> sorted(join(a, b).columns)
    ['x', 'y']
    """
    if left.cells is None or right.cells is None:
        raise UserError("a table without cells cannot be joined; expected cells in both; add them")
    _, a, b = np.intersect1d(
        space.to_index(left.cells), space.to_index(right.cells), return_indices=True
    )
    if not a.size:
        raise UserError("the two tables have no cell in common; expected at least one; check them")
    rows = np.sort(a)
    b = b[np.argsort(a)]
    return Table(
        left.cells[rows],
        {k: v[rows] for k, v in left.columns.items()}
        | {k: v[b] for k, v in right.columns.items() if k not in left.columns},
    )


def data_folder(data: Path | str | None = None) -> Path:
    """Find the folder of tables: the one given, or `nas` in the one that JAXSYS_DATA names.

    Raises:
      UserError: if there is none.

    >>> import tempfile
    >>> data_folder(tempfile.gettempdir()).is_dir()
    True
    """
    named = os.environ.get("JAXSYS_DATA")
    folder = Path(data) if data is not None else Path(named or "") / "nas"
    if (data is None and not named) or not folder.is_dir():
        raise UserError(
            f"the folder of tables {str(folder)!r} is not there; expected nb201_tss_all.csv and "
            "others in it; set JAXSYS_DATA to the folder above it, or name a table"
        )
    return folder


def nas_bench_201(data: Path | str | None = None) -> Table:
    """Load all 15,625 cells: accuracies, zen scores, parameters (M) and MFLOPs.

    Columns: test_c10, test_c100, test_in16, val_c10, val_c100, val_in16 (percent), zen_*,
    params_m, mflops.

    Args:
      data: the folder of nb201_tss_all.csv; see `data_folder`.

    Raises:
      UserError: if rows are missing.

    >>> nas_bench_201("no/such/folder")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the folder of tables 'no/such/folder' is not there; ...
    """
    table = load(data_folder(data) / "nb201_tss_all.csv")
    assert table.cells is not None
    absent = np.setdiff1d(np.arange(space.N_CELLS), space.to_index(table.cells))
    if absent.size:
        first = space.to_string(space.from_index(int(absent[0])))
        raise UserError(
            f"nb201_tss_all.csv lacks {absent.size} of 15,625 cells, the first {first}; expected "
            "all; get the whole file"
        )
    return table


def _numbers(values: Sequence[Any]) -> np.ndarray:
    try:
        return np.array([np.nan if v is None or v == "" else float(v) for v in values])
    except (TypeError, ValueError):
        return np.array([str(v) for v in values])


def _read_csv(raw: bytes, name: str, dataset: str | None) -> dict[str, np.ndarray]:
    rows = list(csv.reader(io.StringIO(raw.decode("utf-8-sig"))))
    if len(rows) < 2:
        raise UserError(f"{name} has no rows; expected a header and at least one; check the file")
    header, body = rows[0], rows[1:]
    wrong = [i for i, row in enumerate(body) if len(row) != len(header)]
    if wrong or len(set(header)) != len(header):
        where = f"row {wrong[0]} has {len(body[wrong[0]])} values" if wrong else "a name is doubled"
        raise UserError(f"{name}: {where}; expected {len(header)} distinct columns; mend the file")
    return {c: _numbers([row[i] for row in body]) for i, c in enumerate(header)}


def _read_json(raw: bytes, name: str, dataset: str | None) -> dict[str, np.ndarray]:
    try:
        document = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{name} is no JSON ({error}); expected a list or NASLib's form") from None
    if isinstance(document, Mapping):
        [inner] = document.values() if len(document) == 1 else [None]
        if dataset not in document and isinstance(inner, Mapping) and dataset in inner:
            document = inner  # the name of the search space stands above the data sets
        if dataset is None or dataset not in document:
            raise UserError(
                f"{name} holds the data sets {', '.join(map(str, document))}, asked for "
                f"{dataset!r}; expected one of them; name it"
            )
        document = [_flat(arch, values) for arch, values in document[dataset].items()]
    if not document or not all(isinstance(row, Mapping) for row in document):
        raise UserError(f"{name} holds no list of objects; expected one for each architecture")
    names = dict.fromkeys(k for row in document for k in row)
    return {k: _numbers([row.get(k) for row in document]) for k in names}


def _flat(arch: str, values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"arch": arch}
    digits = arch.strip("()[] ").split(",")
    if len(digits) == 6 and all(d.strip().isdecimal() for d in digits):
        found |= dict(zip(EDGE_COLUMNS, (int(d) for d in digits), strict=True))
    for key, value in values.items():
        if isinstance(value, Mapping):
            value = value.get("score")
        if value is None or isinstance(value, int | float | str):
            found[key] = value
    return found


def _read_npz(raw: bytes, name: str, dataset: str | None) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            columns = {key: archive[key] for key in archive.files}
    except (ValueError, OSError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{name} is no NPZ of plain arrays ({error}); write it anew") from None
    lengths = {k: v.shape[0] if v.ndim else -1 for k, v in columns.items()}
    if len(set(lengths.values())) != 1:
        raise UserError(
            f"{name} holds arrays of different lengths {lengths}; expected one row for each "
            "architecture in all; mend the file"
        )
    return columns


def _cells(columns: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if all(c in columns for c in EDGE_COLUMNS):
        numbers = np.stack([columns[c] for c in EDGE_COLUMNS], 1)
        whole = np.issubdtype(numbers.dtype, np.number) and np.all(numbers == np.floor(numbers))
        if not whole:
            raise UserError(f"{name}: an operation is no whole number; expected 0 to 4; mend it")
        cells = space.check_ops(numbers.astype(np.int32))
    elif "cells" in columns:
        cells = space.check_ops(columns["cells"])
    elif "arch_str" in columns:
        cells = np.stack([space.from_string(str(text)) for text in columns["arch_str"]])
    else:
        raise UserError(
            f"{name} names no cells (columns {', '.join(columns)}); expected "
            f"{','.join(EDGE_COLUMNS)} or arch_str; add them, or load with cells=False"
        )
    index, counts = np.unique(space.to_index(cells), return_counts=True)
    if counts.max() > 1:
        first = space.to_string(space.from_index(int(index[counts > 1][0])))
        raise UserError(
            f"{name} has {int((counts > 1).sum())} cells in several rows, the first {first}; "
            "expected each once; drop the duplicates or name a data set"
        )
    return cells
