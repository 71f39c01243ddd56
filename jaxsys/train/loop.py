"""Run steps, save on the way, stop at the first number that is not finite.

The loop is a generator, so that the caller's body (printing, logging, stopping early) is an
ordinary `for`. Batches are a function of the step number, so a run resumes exactly by starting at
the step after the checkpoint's.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError


class NonFiniteError(ArithmeticError):
    """Stop a run whose loss or update is no longer finite.

    Attributes:
      step: at which it happened.
      where: `loss`, or the name of the first layer with such an update.

    >>> raise NonFiniteError(12, "h.3")
    Traceback (most recent call last):
    ...
    jaxsys.train.loop.NonFiniteError: step 12: h.3 is not finite; the last checkpoint is from before
    """

    def __init__(self, step: int, where: str):
        super().__init__(f"step {step}: {where} is not finite; the last checkpoint is from before")
        self.step = step
        self.where = where


def check_finite(
    step: int, loss: Any, layer_norms: Any = (), layer_names: Sequence[str] = ()
) -> None:
    """Raise if an update or the loss is not finite; the layer is named where one is to blame.

    Args:
      step: number of the step.
      loss: scalar or array.
      layer_norms: `[L]` norm of each layer's update.
      layer_names: L names.

    Raises:
      NonFiniteError: naming the first such layer, else the loss.

    >>> check_finite(3, 0.5, [1.0, float("inf")], ["h.0", "h.1"])
    Traceback (most recent call last):
    ...
    jaxsys.train.loop.NonFiniteError: step 3: h.1 is not finite; the last checkpoint is from before
    """
    norms = np.asarray(layer_norms, np.float64)
    if norms.shape != (len(layer_names),):
        raise UserError(
            f"layer_norms has shape {norms.shape} and there are {len(layer_names)} layer names; "
            "give one norm for each layer"
        )
    broken = np.flatnonzero(~np.isfinite(norms))
    if broken.size:
        raise NonFiniteError(step, layer_names[int(broken[0])])
    if not np.isfinite(np.asarray(loss, np.float64)).all():
        raise NonFiniteError(step, "loss")


def iterate(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batch_at: Callable[[int], Any],
    *,
    start: int = 0,
    steps: int,
    save_every: int = 0,
    store: RunStore | None = None,
    meta: dict[str, Any] | None = None,
    guard: Callable[[int, Any], None] | None = None,
) -> Iterator[tuple[int, Any, Any]]:
    """Run steps `start` to `steps` - 1, saving on the way.

    Step `i` is saved before it is yielded if `i + 1` is a multiple of `save_every` or `i` is the
    last one; so what the caller has seen as saved survives, and `start = store.latest() + 1`
    resumes with the same losses.

    Args:
      step: `(state, batch) -> (state, info)`.
      state: the state before step `start`.
      batch_at: step number to batch.
      start: the first step to run.
      steps: the number of steps of the whole run, those before `start` included.
      save_every: steps between checkpoints; 0 saves only the last step.
      store: where to save; nothing is saved if left out.
      meta: saved along (configuration, plan).
      guard: called with the step number and its info before anything is saved; raises to stop.

    Yields:
      Step number, state after it, and its info.

    Raises:
      UserError: for a negative start or save_every.

    >>> def step(state, batch):
    ...     return state + batch, {"sum": state + batch}
    >>> [info["sum"] for _, _, info in iterate(step, 0, lambda i: i, steps=4)]
    [0, 1, 3, 6]
    """
    if start < 0 or save_every < 0:
        raise UserError(f"start is {start} and save_every {save_every}; neither may be negative")
    return _iterate(step, state, batch_at, range(start, steps), save_every, store, meta, guard)


# Apart from `iterate`, so that its mistakes are raised by the call and not by the first `next`.
def _iterate(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batch_at: Callable[[int], Any],
    numbers: range,
    save_every: int,
    store: RunStore | None,
    meta: dict[str, Any] | None,
    guard: Callable[[int, Any], None] | None,
) -> Iterator[tuple[int, Any, Any]]:
    for i in numbers:
        state, info = step(state, batch_at(i))
        if guard is not None:
            guard(i, info)
        due = save_every > 0 and (i + 1) % save_every == 0
        if store is not None and (due or i == numbers[-1]):
            store.save(i, state, meta)
        yield i, state, info


def resume(store: RunStore | None, state: Any, identity: dict[str, Any]) -> tuple[Any, int]:
    """Go on from the newest checkpoint of a store, if it is of this run.

    Args:
      store: where the run saves; None starts afresh.
      state: a fresh state, which tells what to read.
      identity: what makes the run this one: parts, each of names and values, as JSON reads them.

    Returns:
      The state, and the step to run next.

    Raises:
      UserError: naming the first setting of the saved run that differs.

    >>> resume(None, {"w": 1.0}, {})
    ({'w': 1.0}, 0)
    """
    latest = None if store is None else store.latest()
    if store is None or latest is None:
        return state, 0
    saved, found = store.restore(latest, state)
    if found != identity:
        parts = [(part, name) for part in identity for name in {**identity[part], **found[part]}]
        part, name = next((p, n) for p, n in parts if identity[p].get(n) != found.get(p, {}).get(n))
        raise UserError(
            f"{store.directory} holds a run with {name} {found[part].get(name)!r} and this one has "
            f"{identity[part].get(name)!r}; choose another directory or the same settings"
        )
    return saved, latest + 1
