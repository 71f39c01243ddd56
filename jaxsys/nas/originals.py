"""Read the files that NAS-Bench-101 and NDS were published in, without their authors' code.

NAS-Bench-101, three forms:

* ``.tfrecord``: the published file. Each record is the JSON row below.
* ``.json`` or JSON Lines of rows ``[hash, epochs, "0100…", "input,…,output", metrics]``, metrics
  being the base64 of the benchmark's protocol buffer; rows of one cell, its repeats, are averaged.
* ``.json`` of objects, in a list or by hash, with ``module_adjacency`` (or ``matrix``) and
  ``module_operations`` (or ``ops``), and any numbers, which become columns.

NDS: a list of objects, or two of them under ``top`` and ``mid``, each with ``net`` (a ``genotype``,
``width`` and ``depth``), ``params``, ``flops`` and the test error of every epoch ``test_ep_top1``.

Every table has the column `arch`, text that the space reads. Nothing is unpickled or evaluated.
"""

import base64
import binascii
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.nas import darts, nb101
from jaxsys.nas.tables import Table

_MOST_BYTES, _MOST_ROWS, _RECORD_BYTES = 4 << 30, 2_000_000, 1 << 20
_EVALUATION = {3: "train_accuracy", 4: "validation_accuracy", 5: "test_accuracy"}


def _refuse(where: str, what: str, expected: str) -> UserError:
    return UserError(f"{where} {what}; expected {expected}; get the original file")


def nas_bench_101(path: Path | str) -> Table:
    """Read NAS-Bench-101.

    Args:
      path: a file of one of the three forms.

    Returns:
      `arch`, `hash`, and the columns of the file. Of rows with metrics: `trainable_parameters`, and
      for each number of epochs such as 108 `validation_accuracy_108`, `test_accuracy_108`,
      `train_accuracy_108` at the end of the training, means over repeats, as fractions.

    Raises:
      UserError: for a file of another form, naming the row; a cell that is none; a hash that is
        not the cell's.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "t.json")
    >>> cell = {"matrix": [[0, 1], [0, 0]], "ops": ["input", "output"], "test_accuracy": 0.5}
    >>> _ = path.write_text(json.dumps([cell]))
    >>> nas_bench_101(path).column("test_accuracy").tolist()
    [0.5]
    """
    file = _checked(Path(path))
    if file.suffix == ".tfrecord":
        return _joined(_records(file), file.name)
    document = _parsed(file)
    if isinstance(document, Mapping):
        document = [
            dict(v) | {"hash": k} if isinstance(v, Mapping) else v for k, v in document.items()
        ]
    if isinstance(document, list) and document and isinstance(document[0], list):
        return _joined(document, file.name)
    return _objects(document, file.name)


def nds(path: Path | str, *, space: Literal["darts", "any"] = "darts") -> Table:
    """Read a sweep of NDS, such as DARTS.json.

    Args:
      path: the file.
      space: `darts` reads genotypes of DARTS; `any` keeps the network's description as JSON text,
        for NASNet, Amoeba, PNAS, ENAS and ResNeXt, of which no networks are built here.

    Returns:
      `arch`, `width`, `depth`, `params` and `flops` (counts), `test_accuracy` after the last epoch
      and `best_test_accuracy`, in percent.

    Raises:
      UserError: for a file of another form, naming the row, or a genotype outside the space.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "t.json")
    >>> row = {"net": {"width": 4, "depth": 2}, "params": 1, "flops": 2, "test_ep_top1": [9.0, 8.0]}
    >>> _ = path.write_text(json.dumps([row]))
    >>> nds(path, space="any").column("test_accuracy").tolist()
    [92.0]
    """
    file = _checked(Path(path))
    document = _parsed(file)
    if isinstance(document, Mapping) and {"top", "mid"} <= set(document):
        document = [*document["top"], *document["mid"]]
    rows = []
    for i, row in _each(document, file.name):
        where = f"{file.name}: row {i}"
        net = _field(row, "net", Mapping, where)
        if space == "darts":
            arch = darts.to_string(darts.from_genotype(_field(net, "genotype", Mapping, where)))
        else:
            arch = json.dumps(net, sort_keys=True)
        errors = _field(row, "test_ep_top1", list, where)
        if not errors or not all(isinstance(e, int | float) for e in errors):
            raise _refuse(where, "has no test errors", "a list of numbers")
        found = {
            k: _field(net, k, int | float | list, where) for k in ("width", "depth") if k in net
        }
        found |= {k: _field(row, k, int | float, where) for k in ("params", "flops")}
        found |= {"test_accuracy": 100 - errors[-1], "best_test_accuracy": 100 - min(errors)}
        rows.append({"arch": arch} | {k: v for k, v in found.items() if not isinstance(v, list)})
    return _table(rows)


def archs_in(path: Path | str, space: str, dataset: str | None = None) -> list[str]:
    """List the architectures that a table of a space names, as text.

    Args:
      path: an original file, or a table of ours or of NASLib's with the column `arch`.
      space: `nb101` or `darts` for originals; any other reads tables only.
      dataset: see `tables.load`.

    Raises:
      UserError: if it names none.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "t.csv")
    >>> _ = path.write_text("arch,acc\\n48:2x96,90\\n")
    >>> archs_in(path, "vit")
    ['48:2x96']
    """
    from jaxsys.nas.tables import load

    file = _checked(Path(path))
    with file.open("rb") as stream:
        head = stream.read(200) if file.suffix in (".json", ".jsonl") else b""
    ours = not head or b'"nasbench101"' in head or b'"arch"' in head
    if space == "nb101" and (file.suffix == ".tfrecord" or not ours):
        table = nas_bench_101(file)
    elif space == "darts" and (b'"net"' in head or b'"top"' in head or b'"mid"' in head):
        table = nds(file)
    else:
        table = load(file, dataset=dataset, cells=False)
    if "arch" not in table.columns:
        raise UserError(
            f"{file.name} names no architectures (columns {', '.join(table.columns)}); expected "
            "the column arch; add it"
        )
    return [str(text) for text in table.columns["arch"]]


def _checked(file: Path) -> Path:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise UserError(
            f"table {str(file)!r} cannot be read ({error.strerror}); expected a file; correct the "
            "path"
        ) from None
    if size > _MOST_BYTES:
        raise _refuse(file.name, f"has {size} bytes", f"at most {_MOST_BYTES}")
    return file


def _parsed(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        try:
            return json.loads(text)
        except ValueError:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise _refuse(file.name, f"is no JSON ({str(error)[:80]})", "JSON or JSON Lines") from None


def _each(document: Any, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if not isinstance(document, list) or not 0 < len(document) <= _MOST_ROWS:
        raise _refuse(name, "holds no list of architectures", f"1 to {_MOST_ROWS} objects")
    for i, row in enumerate(document):
        if not isinstance(row, Mapping):
            raise _refuse(f"{name}: row {i}", f"is {str(row)[:40]!r}", "an object")
        yield i, row


def _field(row: Mapping[str, Any], name: str, kind: Any, where: str) -> Any:
    if not isinstance(row.get(name), kind) or isinstance(row.get(name), bool):
        raise _refuse(where, f"has no {name!r} of the right kind", "the published fields")
    return row[name]


def _table(rows: list[dict[str, Any]]) -> Table:
    names = dict.fromkeys(k for row in rows for k in row)
    text = ("arch", "hash")
    return Table(
        None,
        {k: np.array([row.get(k, "" if k in text else np.nan) for row in rows]) for k in names},
    )


def _cell(matrix: Any, ops: Any, claimed: Any, where: str) -> dict[str, str]:
    if not isinstance(ops, list) or not all(isinstance(o, str) for o in ops) or len(ops) > 7:
        raise _refuse(where, f"has operations {str(ops)[:60]}", "at most 7 names")
    try:
        arch = nb101.encode(np.array(matrix), ops)
    except (UserError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    found = nb101.module_hash(arch)
    if claimed is not None and claimed != found:
        raise _refuse(where, f"has the hash {str(claimed)[:40]!r}", f"{found}, the cell's")
    return {"arch": nb101.to_string(arch), "hash": found}


def _objects(document: Any, name: str) -> Table:
    rows = []
    for i, row in _each(document, name):
        matrix = row.get("module_adjacency", row.get("matrix"))
        ops = row.get("module_operations", row.get("ops"))
        claimed = row.get("hash", row.get("hash_"))
        numbers = {
            k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)
        }
        rows.append(_cell(matrix, ops, claimed, f"{name}: row {i}") | numbers)
    return _table(rows)


def _joined(records: Iterable[Any], name: str) -> Table:
    """Average the repeats of each cell and number of epochs."""
    cells: dict[str, dict[str, Any]] = {}
    sums: dict[tuple[str, str], list[float]] = {}
    for i, row in enumerate(records):
        where = f"{name}: row {i}"
        if i >= _MOST_ROWS:
            raise _refuse(name, "has too many rows", f"at most {_MOST_ROWS}")
        kinds = (str, int, str, str, str)
        if not isinstance(row, list) or [type(v) for v in row] != list(kinds):
            raise _refuse(where, f"is {str(row)[:40]!r}", "[hash, epochs, digits, names, metrics]")
        key, epochs, digits, names, raw = row
        metrics = _metrics(raw, where)
        if key not in cells:
            side = round(len(digits) ** 0.5)
            if side > 7 or side * side != len(digits) or not set(digits) <= {"0", "1"}:
                raise _refuse(where, f"has the matrix {digits[:60]!r}", "V·V digits 0 and 1")
            matrix = np.array([int(d) for d in digits]).reshape(side, side)
            cells[key] = _cell(matrix, names.split(","), key, where)
            cells[key]["trainable_parameters"] = metrics.pop("trainable_parameters")
        for metric in _EVALUATION.values():
            sums.setdefault((key, f"{metric}_{epochs}"), []).append(metrics[metric])
    for (key, column), values in sums.items():
        cells[key][column] = float(np.mean(values))
    if not cells:
        raise _refuse(name, "has no rows", "at least one")
    return _table(list(cells.values()))


def _records(file: Path) -> Iterator[Any]:
    """Read the records of a TFRecord: length, its checksum, bytes, their checksum."""
    with file.open("rb") as stream:
        while header := stream.read(12):
            length = int.from_bytes(header[:8], "little")
            body = stream.read(length) if len(header) == 12 and length <= _RECORD_BYTES else b""
            if not body or len(body) < length or len(stream.read(4)) < 4:
                raise _refuse(file.name, f"breaks off near byte {stream.tell()}", "whole records")
            try:
                yield json.loads(body)
            except ValueError:
                raise _refuse(file.name, "holds a record that is no JSON", "rows") from None


def _metrics(raw: str, where: str) -> dict[str, Any]:
    """Decode the protocol buffer ModelMetrics: evaluations (1), trainable parameters (2)."""
    try:
        found: dict[str, Any] = {}
        for number, value in _fields(base64.b64decode(raw, validate=True)):
            if number == 2:
                found["trainable_parameters"] = value
            elif number == 1:  # the last evaluation is that at the end of the training
                for inner, v in _fields(value):
                    if inner in _EVALUATION:
                        found[_EVALUATION[inner]] = struct.unpack("<d", v)[0]
        if set(found) != {"trainable_parameters", *_EVALUATION.values()}:
            raise ValueError
        return found
    except (ValueError, binascii.Error, struct.error, IndexError, TypeError):
        raise _refuse(
            where, "has metrics that cannot be decoded", "base64 of ModelMetrics"
        ) from None


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Split a protocol buffer into field numbers and values."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[kind] if kind in (1, 5) else varint() if kind == 2 else -1
        if size < 0 or at + size > len(data):
            raise ValueError
        at += size
        yield number, data[at - size : at]
