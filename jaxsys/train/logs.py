"""Write what happens at each step: JSON lines, TensorBoard, Weights & Biases, or several at once.

A row is a flat mapping; its `step`, where it has one, is the horizontal axis.
"""

import os
from collections.abc import Mapping
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxsys.core import report
from jaxsys.core.errors import UserError


@runtime_checkable
class Writer(Protocol):
    """Say what every writer can do.

    >>> writer: Writer = Tee()
    >>> writer.write({"step": 0}); writer.close()
    """

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row."""
        ...

    def close(self) -> None:
        """Finish; nothing is written afterwards."""
        ...


class JsonLines:
    """Append each row to a file as one line of JSON, at once, so a killed run keeps its log.

    Args:
      path: the file; lines that it has already stay.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "log.jsonl")
    >>> JsonLines(path).write({"step": 0, "loss": np.float32(2.5)})
    >>> path.read_text()
    '{"step": 0, "loss": 2.5}\\n'
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = path

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line."""
        report.append_jsonl(self._path, row)

    def close(self) -> None:
        """Do nothing: every line is on its way already."""


class TensorBoard:
    """Write the numbers of each row as TensorBoard scalars (extra `tensorboard`).

    Args:
      directory: for the event files.

    Raises:
      UserError: if the package tensorboardX is missing.

    >>> import tempfile
    >>> writer = TensorBoard(tempfile.mkdtemp())
    >>> writer.write({"step": 0, "loss": 2.5}); writer.close()
    """

    def __init__(self, directory: str | os.PathLike[str]):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "TensorBoard logs need the package tensorboardX, which is missing; run "
                "pip install 'jaxsys[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(os.fspath(directory))

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one scalar for each number; lists become one scalar for each entry."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row.get("step"))

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._writer.close()


class WeightsAndBiases:
    """Send each row to Weights & Biases (extra `wandb`), or store it there in offline mode.

    Args:
      project: name of the project.
      config: what the run was started with.
      directory: for the run's local files.

    Raises:
      UserError: if the package wandb is missing.

    >>> WeightsAndBiases("jaxsys", {"lr": 0.1}).write({"step": 0})  # doctest: +SKIP
    """

    def __init__(
        self,
        project: str,
        config: Mapping[str, Any],
        directory: str | os.PathLike[str] | None = None,
    ):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                "Weights & Biases logs need the package wandb, which is missing; run "
                "pip install 'jaxsys[wandb]'"
            ) from None
        self._run = wandb.init(project=project, config=dict(config), dir=directory)

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of one row at its step."""
        self._run.log(_numbers(row), step=row.get("step"))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Tee:
    """Pass each row to several writers.

    Args:
      *writers: in the order in which they are written to.

    >>> Tee(Tee(), Tee()).write({"step": 0})
    """

    def __init__(self, *writers: Writer):
        self._writers = writers

    def write(self, row: Mapping[str, Any]) -> None:
        """Write to each."""
        for writer in self._writers:
            writer.write(row)

    def close(self) -> None:
        """Close each."""
        for writer in self._writers:
            writer.close()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Flatten a row to its numbers: `{"gamma": [1, 2]}` becomes `gamma/0` and `gamma/1`."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        # A bool is a Real to Python and no curve to a reader.
        if name == "step" or isinstance(value, str | bytes | bool) or value is None:
            continue
        if isinstance(value, Mapping):
            flat |= {f"{name}/{key}": x for key, x in _numbers(value).items()}
        elif isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0:
            entries = {str(i): entry for i, entry in enumerate(value)}
            flat |= {f"{name}/{key}": x for key, x in _numbers(entries).items()}
        elif isinstance(value, Real | np.generic) or hasattr(value, "dtype"):
            flat[str(name)] = float(value)
    return flat
