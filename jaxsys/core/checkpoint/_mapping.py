"""Map a file into memory, turning what can go wrong with a path into one sentence."""

import contextlib
import mmap
from pathlib import Path

import numpy as np

from jaxsys.core.errors import UserError


def map_file(path: str | Path, *, least_bytes: int) -> np.ndarray:
    """Map a whole file as read-only bytes; nothing of it is read yet.

    Args:
      path: of a regular file.
      least_bytes: what the smallest valid file of its kind has.

    Returns:
      uint8 [file size]; the mapping lives as long as any view of it.

    Raises:
      UserError: if the file is missing, no regular file, unreadable or too short.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise UserError(f"{path} is {what}; expected a file; check the path")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < least_bytes:
                raise UserError(
                    f"{path} has {size} bytes, fewer than the {least_bytes} of its smallest "
                    "valid form; download or write it again"
                )
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the file") from None
    return np.frombuffer(mapped, np.uint8)


def advise(view: np.ndarray, *, need: bool) -> None:
    """Tell the system that a mapped array is read soon, or that its pages may go.

    Reading ahead fills the page cache without waiting and without taking memory of the process.
    Pages that go stay in the page cache while there is room, but no longer count as this process's
    memory. Arrays that are not mapped from a file are left alone.

    Args:
      view: of a mapped file, as `read_safetensors` gives it.
      need: read it ahead, or let its pages go.
    """
    owner: object = view
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if not isinstance(owner, mmap.mmap) or view.nbytes == 0 or not hasattr(owner, "madvise"):
        return
    first = np.frombuffer(owner, np.uint8).ctypes.data
    start = view.ctypes.data - first
    if need:
        here = start - start % mmap.PAGESIZE
        with contextlib.suppress(OSError):
            owner.madvise(mmap.MADV_WILLNEED, here, start + view.nbytes - here)
        return
    # Whole pages only: the ones at the borders belong to neighbours too.
    here = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (start + view.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > here:
        with contextlib.suppress(OSError):
            owner.madvise(mmap.MADV_DONTNEED, here, end - here)


def short(name: str, most: int = 80) -> str:
    """Quote a name from a foreign file: escaped, and cut so that it cannot flood a message."""
    return repr(name if len(name) <= most else name[:most] + "…")
