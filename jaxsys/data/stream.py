"""An endless, shuffled, resumable stream of token windows, split over processes.

Nothing is consumed: the batch of a step is a function of (seed, step, process). The state to save
is therefore the step number alone, and it stays valid for another number of processes as long as
the global batch is the same.
"""

import functools
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32, Integer

from jaxsys.core.errors import UserError


@dataclass(frozen=True)
class TokenStream:
    """Cut tokens into windows and deal them out, every window once an epoch.

    Window `i` is `tokens[i·T : i·T + T + 1]`: T inputs and, shifted by one, T targets. All windows
    of all epochs, each epoch in its own order, form one sequence; process p of P takes rows
    `(step·P + p)·B` to `(step·P + p + 1)·B` of it, so within an epoch no two processes see the
    same window. A batch may cross from one epoch into the next.

    Attributes:
      tokens: `[N]` token ids.
      batch: windows for each process and step (B).
      length: tokens to predict in each window (T).
      process_id: which share this is, from 0.
      num_processes: how many shares there are (P).
      seed: of the order.

    Raises:
      UserError: if the text gives fewer windows than one step of all processes needs, or a size is
        out of range.

    >>> stream = TokenStream(np.arange(100), batch=2, length=4, seed=0)
    >>> stream.batch_at(0).shape, stream.windows
    ((2, 5), 24)
    >>> bool((stream.batch_at(10**6) == stream.batch_at(10**6)).all())
    True
    """

    tokens: Integer[np.ndarray, "N"] = field(repr=False)
    batch: int
    length: int
    process_id: int = 0
    num_processes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 1:
            raise UserError(
                f"batch is {self.batch} and length {self.length}; both must be positive"
            )
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"process {self.process_id} of {self.num_processes} does not exist; "
                f"processes are numbered 0 to {self.num_processes - 1}"
            )
        needed = self.batch * self.num_processes
        if self.windows < needed:
            raise UserError(
                f"the text has {self.tokens.size} tokens, which is {max(self.windows, 0)} windows "
                f"of {self.length}, and one step needs {needed}; give a longer text, or a smaller "
                "batch, length or number of workers"
            )

    @property
    def windows(self) -> int:
        """Count the windows of one epoch."""
        return (self.tokens.size - 1) // self.length

    @property
    def tokens_per_step(self) -> int:
        """Count the tokens predicted in one step of all processes."""
        return self.batch * self.length * self.num_processes

    def indices_at(self, step: int) -> Integer[np.ndarray, "{self.batch}"]:
        """Find which windows this process sees in a step.

        Args:
          step: from 0.
        """
        start = (step * self.num_processes + self.process_id) * self.batch
        return shuffled(self.windows, start, self.batch, self.seed)

    def batch_at(self, step: int) -> Int32[np.ndarray, "{self.batch} {self.length+1}"]:
        """Read the batch of a step.

        Args:
          step: from 0, without end.

        Returns:
          `[B, T + 1]` token ids: inputs are `[:, :-1]`, targets `[:, 1:]`.
        """
        starts = self.indices_at(step)[:, None] * self.length
        return self.tokens[starts + np.arange(self.length + 1)].astype(np.int32)


def shuffled(n: int, start: int, count: int, seed: int) -> Integer[np.ndarray, "{count}"]:
    """Read a part of the endless sequence of 0 to n - 1, each epoch in an order of its own.

    Args:
      n: how many things there are.
      start: place in the sequence, from 0.
      count: how many to read.
      seed: of the orders.

    >>> sorted(shuffled(5, 10, 5, seed=0).tolist())
    [0, 1, 2, 3, 4]
    """
    epochs, places = np.divmod(np.arange(start, start + count), n)
    orders = {int(e): _order(n, seed, int(e)) for e in np.unique(epochs)}
    return np.array([orders[int(e)][p] for e, p in zip(epochs, places, strict=True)])


def train_valid_split(
    tokens: Integer[np.ndarray, "N"], fraction: float = 0.05
) -> tuple[Integer[np.ndarray, "M"], Integer[np.ndarray, "K"]]:
    """Set the end of a text aside for validation.

    Args:
      tokens: `[N]` token ids.
      fraction: of them to set aside, in (0, 1).

    Returns:
      The tokens to train on and those to validate on.

    Raises:
      UserError: for a fraction outside (0, 1), or if a part would be empty.

    >>> train, valid = train_valid_split(np.arange(10), 0.2)
    >>> train.size, valid.tolist()
    (8, [8, 9])
    """
    if not 0 < fraction < 1:
        raise UserError(f"fraction is {fraction}; it must lie between 0 and 1, for example 0.05")
    held = round(tokens.size * fraction)
    if not 0 < held < tokens.size:
        raise UserError(
            f"{fraction} of {tokens.size} tokens leaves an empty part; give a longer text"
        )
    return tokens[:-held], tokens[-held:]


@functools.lru_cache(maxsize=4)
def _order(windows: int, seed: int, epoch: int) -> np.ndarray:
    # Raw words of a bit generator are promised never to change between NumPy versions; those of
    # `Generator.permutation` are not, and a resumed run must see the order that it began with.
    # Equal words would be ordered by position, which is as good an order as any.
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(windows)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order
