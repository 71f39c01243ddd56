"""Options that all commands share, and what a command gives back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jaxsys.core.errors import UserError


class Outcome(NamedTuple):
    """What a command found, where it also decides the exit status."""

    result: dict[str, Any] | None
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class Output:
    """How a command reports.

    Attributes:
      json: Print one JSON object on standard output, and progress on standard error.
    """

    spreads: ClassVar[bool] = False  # whether the members of a job share the work

    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Common(Output):
    """What every command that runs something takes.

    Attributes:
      out: Folder for what is written; made if need be.
      seed: Seed of everything random.
    """

    out: Path | None = None
    seed: int = 0


def make_out(config: Any) -> None:
    """Make the folder that `--out` names before any work starts."""
    out: Path | None = getattr(config, "out", None)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out {out} cannot be made ({error.strerror}); name a folder that can be written"
            ) from None


def is_idle(config: Any) -> bool:
    """Tell whether another member of a launched job runs this command alone.

    The others make nothing of their own; see `jaxsys.cluster.launched_as`.
    """
    from jaxsys.cluster import launched_as

    return not getattr(config, "spreads", True) and launched_as()[0] != 0
