"""The training loop shared by every system: optimiser presets, checkpoints, logs."""

from jaxsys.train import logs, optimizers
from jaxsys.train.loop import NonFiniteError, check_finite, iterate, resume

__all__ = ["NonFiniteError", "check_finite", "iterate", "logs", "optimizers", "resume"]
