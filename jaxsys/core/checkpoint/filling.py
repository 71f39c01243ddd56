"""Safetensors files that are filled piece by piece and go on where a killed run stopped.

All files are made at their full size first, so that a disk that is too small shows at once. What
is complete stands in a journal; a line is added only after the data is on the disk. Files get their
names when everything is there.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsys.core.checkpoint._places import (
    UNFINISHED,
    header_of,
    plan_files,
    take_names,
    write_index,
)
from jaxsys.core.errors import UserError
from jaxsys.core.tree import size_bytes

_JOURNAL = ".unfinished.jsonl"


class Filling:
    """Write the tensors of a checkpoint in any order, each in consecutive pieces.

    Args:
      path: folder, made if need be.
      shapes: by tensor name, what has a shape and a dtype.
      identity: text that says what is being written; a folder left behind by a killed run goes on
        only if it was written under the same.
      shard_bytes: most data in one file.
      metadata: text fields for the headers.
      sync_bytes: data after which it is forced to the disk and put into the journal.

    Raises:
      UserError: as `write_safetensors`, and if the disk has no room.

    >>> import tempfile
    >>> from jaxsys.core.checkpoint import read_safetensors
    >>> filling = Filling(tempfile.mkdtemp(), {"w": np.zeros(3, np.float32)}, "example")
    >>> filling.write("w", np.ones(2, np.float32))
    >>> filling.write("w", np.zeros(1, np.float32))
    >>> read_safetensors(filling.finish()[0])["w"].tolist()
    [1.0, 1.0, 0.0]
    """

    def __init__(
        self,
        path: str | Path,
        shapes: Mapping[str, Any],
        identity: str,
        *,
        shard_bytes: int = 5 << 30,
        metadata: Mapping[str, Any] | None = None,
        sync_bytes: int = 1 << 30,
    ) -> None:
        self._folder, self._sync_bytes = Path(path), sync_bytes
        self._plan, fields = plan_files(self._folder, shapes, shard_bytes, metadata)
        self._names = list(self._plan)
        self._paths = [self._folder / f".{name}{UNFINISHED}" for name in self._names]
        self._journal = self._folder / _JOURNAL
        heads = [header_of(inside, fields) for inside in self._plan.values()]
        self._place = {
            name: (i, start)
            for i, (_, places) in enumerate(heads)
            for name, start in places.items()
        }
        self._size = {n: size_bytes(s) for inside in self._plan.values() for n, s in inside.items()}
        self._filled = dict.fromkeys(self._size, 0)
        self._since_sync = 0
        self._complete: list[str] = []
        ends = [
            len(head) + sum(size_bytes(spec) for spec in inside.values())
            for (head, _), inside in zip(heads, self._plan.values(), strict=True)
        ]
        self.done = self._resume(identity, ends)
        if not self.done:
            self._start(identity, [head for head, _ in heads], ends)
        self._files = [os.open(path, os.O_RDWR) for path in self._paths]

    def _resume(self, identity: str, ends: list[int]) -> frozenset[str]:
        """Read the journal of a killed run, if it wrote the same thing."""
        try:
            lines = [json.loads(line) for line in self._journal.read_text().splitlines()]
            sizes = [path.stat().st_size for path in self._paths]
        except (OSError, ValueError):
            return frozenset()
        if not lines or lines[0] != {"identity": identity} or sizes != ends:
            return frozenset()
        return frozenset(name for line in lines[1:] for name in line if name in self._size)

    def _start(self, identity: str, heads: list[bytes], ends: list[int]) -> None:
        self._journal.unlink(missing_ok=True)
        for path, head, end in zip(self._paths, heads, ends, strict=True):
            with path.open("wb") as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, end)
                except OSError as error:
                    self._remove()
                    raise UserError(
                        f"the disk of {self._folder} has no room for a file of {end} bytes "
                        f"({error.strerror}); free some, or name a folder on another disk"
                    ) from None
                file.write(head)
        self._journal.write_text(json.dumps({"identity": identity}) + "\n")

    def write(self, name: str, piece: np.ndarray) -> None:
        """Write the next piece of a tensor; several threads may write different tensors."""
        data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        number, start = self._place[name]
        here = start + self._filled[name]
        if self._filled[name] + data.size > self._size[name]:
            raise UserError(f"tensor {name} got more than its {self._size[name]} bytes")
        view = memoryview(data)
        while view:
            count = os.pwrite(self._files[number], view, here)
            view, here = view[count:], here + count
        self._filled[name] += data.size
        self._since_sync += data.size
        if self._filled[name] == self._size[name]:
            self._complete.append(name)
        if self._since_sync >= self._sync_bytes:
            self.sync()

    def sync(self) -> None:
        """Force what was written to the disk and note what is complete."""
        for file in self._files:
            os.fdatasync(file)
        with self._journal.open("a") as journal:
            journal.write(json.dumps(self._complete) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self._complete, self._since_sync = [], 0

    def finish(self) -> list[Path]:
        """Check that everything is there and give the files their names."""
        open_ones = [
            name
            for name, size in self._size.items()
            if self._filled[name] != size and name not in self.done
        ]
        if open_ones:
            raise UserError(f"{len(open_ones)} tensors are not complete, such as {open_ones[0]}")
        for file in self._files:
            os.fsync(file)
        self.close()
        take_names(self._folder, self._paths, self._names)
        write_index(self._folder, self._plan)
        self._remove()
        return [self._folder / name for name in self._names]

    def close(self) -> None:
        """Close the files; what is in the journal stays for the next run."""
        for file in self._files:
            with contextlib.suppress(OSError):
                os.close(file)
        self._files = []

    def _remove(self) -> None:
        for path in (*self._paths, self._journal):
            path.unlink(missing_ok=True)
