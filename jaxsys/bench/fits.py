"""What fits: the largest batch of each technique within a memory budget, without running anything.

Peak memory grows with the batch as a line, nearly. Two small batches are compiled, the line through
them gives a batch, and that one is compiled to check, and a smaller one if it does not fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxsys.bench.records import record
from jaxsys.bench.static import analyse, devices_for, flags_of
from jaxsys.bench.step import Task
from jaxsys.bench.techniques import Technique, Where, why_not
from jaxsys.core.errors import UserError
from jaxsys.core.report import format_bytes
from jaxsys.models.lm import LMConfig

_TRIES = 4  # programs compiled after the first two


def largest(peak_of: Callable[[int], int], budget_bytes: int | float) -> tuple[int, int]:
    """Find the largest number of batches whose peak is within a budget.

    Args:
      peak_of: batches to bytes; growing, and dear to call.
      budget_bytes: the bound.

    Returns:
      The number and its peak; (0, peak of 1) if not even one fits. It has been checked that the
      number fits; that one more does not only where the line through two peaks was right.

    >>> calls = []
    >>> largest(lambda n: calls.append(n) or 100 + 10 * n, 205), calls
    ((10, 200), [1, 2, 10])
    """
    one = peak_of(1)
    if one > budget_bytes:
        return 0, one
    two = peak_of(2)
    if two > budget_bytes:
        return 1, one
    best, peak, over = 2, two, 0
    low, at_low = 1, one
    for _ in range(_TRIES):
        slope = max((peak - at_low) / (best - low), 1.0)
        guess = best + int((budget_bytes - peak) / slope)
        guess = min(guess, over - 1) if over else guess
        if guess <= best:
            break
        found = peak_of(guess)
        if found > budget_bytes:
            over = guess
            # The line was too flat: the next guess is by the line up to what did not fit.
            slope = max((found - peak) / (guess - best), 1.0)
            guess = best + int((budget_bytes - peak) / slope)
            if guess <= best or (found := peak_of(guess)) > budget_bytes:
                break
        low, at_low, best, peak = best, peak, guess, found
    return best, peak


def search(
    model: str,
    config: LMConfig,
    techniques: Sequence[Technique],
    task: Task,
    budget_bytes: int | float,
    *,
    devices: Sequence[Any] | None = None,
    on_event: Callable[[str], None] = lambda _: None,
    on_row: Callable[[dict[str, Any]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Find the largest batch of each technique that fits, from shapes alone.

    Args:
      model: its name, for the rows.
      config: the model.
      techniques: the ones with ``layers="scan"`` compile in seconds at any depth; others in time
        that grows with it.
      task: what is trained; its batch does not count.
      budget_bytes: of one device.
      devices: as for `static.measure`.
      on_event: told what is being compiled.
      on_row: given each row as soon as it is known.

    Returns:
      Rows of kind ``static`` with ``largest_batch`` (over all devices) and its
      ``peak_memory_predicted_bytes``; "out of memory" where not one row of text fits. Flags have
      the budget.

    Raises:
      UserError: a budget that is not positive.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> found = search("tiny", config, [Technique(layers="scan")], Task(tokens=8), 1000)
    >>> found[0]["status"], found[0]["largest_batch"]
    ('out of memory', 0)
    """
    if budget_bytes <= 0:
        raise UserError(f"the budget is {budget_bytes} bytes; expected more than 0; raise it")
    rows = []
    for technique in techniques:
        chosen = devices_for(technique, devices)
        flags = flags_of(model, technique, task, len(chosen)) | {"budget_bytes": int(budget_bytes)}
        flags.pop("batch")
        unit = technique.accumulate * len(chosen)
        rows.append(_one(config, technique, task, chosen, unit, flags, budget_bytes, on_event))
        on_row(rows[-1])
    return rows


def _one(config, technique, task, devices, unit, flags, budget, on_event) -> dict[str, Any]:
    where = Where.here(devices)
    reason = why_not(technique, config, where, method=task.method, batch=unit)
    if reason:
        return record("static", task.seed, flags, status="not here", why=reason)
    compiled = []

    def peak(n: int) -> int:
        on_event(f"{technique.name}, batch {n * unit}")
        found = analyse(config, technique, replace(task, batch=n * unit), devices)
        compiled.append(found.compile_s)
        return found.memory.peak

    n, need = largest(peak, budget)
    fields = {
        "largest_batch": n * unit,
        "peak_memory_predicted_bytes": need,
        "programs_compiled": len(compiled),
        "compile_s": sum(compiled),
    }
    if n:
        return record("static", task.seed, flags, **fields)
    why = (
        f"a batch of {unit} would need {format_bytes(need)} on a device, and the budget is "
        f"{format_bytes(budget)}"
    )
    return record("static", task.seed, flags, status="out of memory", why=why, **fields)
