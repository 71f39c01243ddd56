"""All workers of a plan in one process: the oracle of the real thing, with the same numbers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from jaxsys.cluster.transport import in_memory
from jaxsys.core import tree
from jaxsys.core.stages import StagedLoss
from jaxsys.pipeline.execute import Worker
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.turn import State, StepInfo, Wanted


class LocalRun(NamedTuple):
    """All workers of a plan in one process; see `local_run`.

    Attributes:
        init: ``params -> states``, one per worker.
        step: ``(states, batch) -> (states, infos)``, one info per worker.
        params: ``states ->`` the whole tree of parameters.
        workers: the workers, by rank.

    >>> LocalRun._fields
    ('init', 'step', 'params', 'workers')
    """

    init: Callable[[Any], list[State]]
    step: Callable[[list[State], Any], tuple[list[State], list[StepInfo]]]
    params: Callable[[list[State]], Any]
    workers: list[Worker]


def local_run(
    staged: StagedLoss,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    params: Any,
    *,
    error_feedback: bool = False,
    clip_norm: float | int | None = None,
) -> LocalRun:
    """Put all workers of a plan in this process, joined in memory.

    They take turns in one thread: a worker goes on until it needs a message that is not there yet.

    Args:
        staged: the loss, cut at the plan's boundaries for the shapes of one micro-batch.
        plan: the plan.
        optimizer: any optax transformation that treats each leaf for itself.
        params: the tree of parameters, or shapes and types.
        error_feedback: as for `Worker`.
        clip_norm: as for `Worker`.

    Returns:
        The functions of the run.

    >>> import jax.numpy as jnp
    >>> from jaxsys.core.stages import cut
    >>> p = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    >>> f = lambda p, x: jnp.mean((x @ p["a"]) @ p["b"])
    >>> loss = cut(f, p, (jnp.ones((1, 2)),), [[0], [1]])
    >>> run = local_run(loss, Plan(2, (1,), (0, 1), micro_batches=2), optax.sgd(0.5), p)
    >>> states, infos = run.step(run.init(p), (jnp.ones((2, 2)),))
    >>> infos[0].loss, run.params(states)["b"].tolist()
    (6.0, [[0.0], [0.0], [0.0]])
    """
    ends = in_memory(len(plan.chains) * plan.n_workers)
    given = {"error_feedback": error_feedback, "clip_norm": clip_norm}
    workers = [Worker(staged, plan, end, optimizer, params, **given) for end in ends]

    def step(states: list[State], batch: Any) -> tuple[list[State], list[StepInfo]]:
        runs = {w.rank: w.run(s, batch) for w, s in zip(workers, states, strict=True)}
        wanted: dict[int, Wanted | None] = dict.fromkeys(runs)
        done: dict[int, tuple[State, StepInfo]] = {}
        while runs:
            ready = [r for r in runs if _there(ends[r], wanted[r])]
            if not ready:
                raise RuntimeError(f"workers wait in a circle for {wanted}")
            for rank in ready:
                try:
                    while _there(ends[rank], wanted[rank]):
                        wanted[rank] = next(runs[rank])
                except StopIteration as end:
                    done[rank] = end.value
                    del runs[rank], wanted[rank]
        found = [done[w.rank] for w in workers]
        return [s for s, _ in found], [info for _, info in found]

    def whole(states: list[State]) -> Any:
        flat: dict[str, Any] = {}
        for state in states:
            flat = state.params | flat
        names, structure = tree.paths(params), jax.tree.structure(params)
        return jax.tree.unflatten(structure, [flat[name] for name in names])

    return LocalRun(lambda p: [w.init(p) for w in workers], step, whole, workers)


def _there(end: Any, wanted: Wanted | None) -> bool:
    return wanted is None or end.has(*wanted)


def run_local(
    staged: StagedLoss,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    params: Any,
    batches: Iterable[Sequence[Any]],
    *,
    error_feedback: bool = False,
) -> tuple[Any, list[float]]:
    """Train in one process as the plan's processes would.

    Args:
        staged: the loss, cut at the plan's boundaries for the shapes of one micro-batch.
        plan: the plan.
        optimizer: any optax transformation that treats each leaf for itself.
        params: the tree of parameters.
        batches: the examples of each step.
        error_feedback: as for `Worker`.

    Returns:
        The parameters after the last step, and the loss of each step.

    >>> import jax.numpy as jnp
    >>> from jaxsys.core.stages import cut
    >>> p = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    >>> f = lambda p, x: jnp.mean((x @ p["a"]) @ p["b"])
    >>> loss = cut(f, p, (jnp.ones((2, 2)),), [[0], [1]])
    >>> run_local(loss, Plan(2, (1,), (0, 1)), optax.sgd(0.1), p, [(jnp.ones((2, 2)),)] * 2)[1]
    [6.0, 4.319999694824219]
    """
    run = local_run(staged, plan, optimizer, params, error_feedback=error_feedback)
    states, losses = run.init(params), []
    for batch in batches:
        states, infos = run.step(states, batch)
        losses.append(infos[0].loss)
    return run.params(states), losses
