"""How much of a phase's communication hides behind the compute: the time model of a plan."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError
from jaxsys.core.timeline import Task

LAUNCHES = ("gated", "eager", "after")


def check_launch(launch: str) -> None:
    """Refuse a launch rule that does not exist.

    Args:
        launch: the rule's name.

    Raises:
        UserError: it is none of ``gated``, ``eager``, ``after``.

    >>> check_launch("gated")
    """
    if launch not in LAUNCHES:
        raise UserError(
            f"launch is {launch!r}; it must be one of {', '.join(LAUNCHES)}; pass one of them"
        )


def check_times(backward_s, comm_s, forward_s: int | float = 0.0, tail_s: int | float = 0.0):
    """Turn a profile into two float64 vectors, refusing what cannot be a time.

    Args:
        backward_s: backward seconds per layer, backward order (index 0 is nearest the loss), [L].
        comm_s: communication seconds per layer in the same order, [L].
        forward_s: seconds of the forward pass.
        tail_s: seconds of compute after the last backward.

    Returns:
        ``(backward_s, comm_s)`` as float64 NumPy vectors.

    Raises:
        UserError: no layers, lengths that differ, or a time that is negative or not finite.

    >>> check_times([1, 1], [2, 0.5])
    (array([1., 1.]), array([2. , 0.5]))
    """
    vectors = []
    for name, times in (("backward_s", backward_s), ("comm_s", comm_s)):
        vector = np.asarray(times, np.float64)
        if vector.ndim != 1 or vector.size == 0:
            raise UserError(
                f"{name} has shape {vector.shape}; it must be a list with one time per layer; "
                "pass at least one layer"
            )
        bad = np.flatnonzero(~np.isfinite(vector) | (vector < 0))
        if bad.size:
            raise UserError(
                f"{name}[{bad[0]}] is {vector[bad[0]]}; a time must be finite and not negative; "
                "mend or re-measure the profile"
            )
        vectors.append(vector)
    for name, seconds in (("forward_s", forward_s), ("tail_s", tail_s)):
        if not (np.isfinite(seconds) and seconds >= 0):
            raise UserError(
                f"{name} is {seconds}; it must be finite and not negative; pass 0 if it is unknown"
            )
    if len(vectors[0]) != len(vectors[1]):
        raise UserError(
            f"backward_s has {len(vectors[0])} layers and comm_s has {len(vectors[1])}; they must "
            "have one time per layer each; pass the same layers in the same order"
        )
    return vectors[0], vectors[1]


def release_s(
    backward_s: Float[np.ndarray, "L"], launch: str, forward_s: int | float, tail_s: int | float
) -> tuple[Float[np.ndarray, "L"], float]:
    """Say when each layer's communication may start, and when the compute ends.

    Both are counted from the start of the backward pass. With ``B_i = b_0 + … + b_i``, layer i is
    released at ``B_i`` (``gated``: once its own backward is done), at ``−forward_s`` (``eager``: at
    the start of the iteration) or at the end of all compute (``after``).

    Args:
        backward_s: backward seconds per layer, backward order, [L].
        launch: the rule.
        forward_s: seconds of the forward pass.
        tail_s: seconds of compute after the last backward.

    Returns:
        The release times [L], and the end of the compute ``B_{L−1} + tail_s``.

    >>> release_s(np.array([1.0, 2.0]), "gated", 0.5, 0.25)
    (array([1., 3.]), 3.25)
    """
    ends = np.cumsum(backward_s)
    end = float(ends[-1] + tail_s)
    if launch == "gated":
        return ends, end
    return np.full_like(ends, -forward_s if launch == "eager" else end), end


def finish_s(layers, release, comm_s) -> float:
    """Run one phase's communications on one serial channel and say when the last one ends.

    ``f ← max(f, r_i) + c_i`` over ascending i, which is ``max_k (r_k + Σ_{l≥k} c_l)``.

    Args:
        layers: the phase's layer indices, ascending; not empty.
        release: release times, [L].
        comm_s: communication seconds, [L].

    Returns:
        The end of the last communication, on the clock of ``release``.

    >>> finish_s([0, 2], np.array([1.0, 2.0, 3.0]), np.array([5.0, 1.0, 1.0]))
    7.0
    """
    index = np.asarray(layers)
    remaining = np.cumsum(comm_s[index][::-1])[::-1]
    return float(np.max(release[index] + remaining))


def wait_s(
    phase_layers: Iterable[int],
    backward_s,
    comm_s,
    *,
    launch: str = "gated",
    forward_s: int | float = 0.0,
    tail_s: int | float = 0.0,
) -> float:
    """Predict the seconds that one iteration waits for communication after its compute.

    ``wait(S) = max(0, f − (B_{L−1} + tail))`` with f from one serial channel that runs the layers
    of S in backward order, each not before its release (Eq. 7's three times per layer). It predicts
    any schedule: WFBP is all layers ``gated`` in every iteration, S-SGD one merged call ``after``.

    Args:
        phase_layers: the layers communicated in the iteration; any order, none twice.
        backward_s: backward seconds per layer, backward order (index 0 is nearest the loss), [L].
        comm_s: communication seconds per layer, [L].
        launch: ``gated`` (a layer may start once its own backward is done), ``eager`` (at the
            start of the iteration) or ``after`` (once all compute is done).
        forward_s: seconds of the forward pass; only ``eager`` can hide behind it.
        tail_s: seconds of compute after the last backward (the optimiser's update).

    Returns:
        Seconds of waiting, 0 for an empty phase.

    Raises:
        UserError: bad times, an unknown launch, a layer that does not exist or comes twice.

    Reference: arXiv 2502.11058, Eq. 7; the channel rule follows the released scheduler.

    >>> wait_s([0, 1], [1, 1, 1], [1, 3, 9])
    2.0
    >>> wait_s([0, 1], [1, 1, 1], [1, 3, 9], launch="eager", forward_s=1.5)
    0.0
    """
    check_launch(launch)
    backward_s, comm_s = check_times(backward_s, comm_s, forward_s, tail_s)
    layers = check_layers(phase_layers, len(comm_s))
    release, end = release_s(backward_s, launch, forward_s, tail_s)
    return phase_wait_s(layers, release, end, comm_s)


def phase_wait_s(layers, release, end: float, comm_s) -> float:
    """Say how far one phase's communications outlast the compute.

    Args:
        layers: ascending layer indices, perhaps none.
        release: release times, [L].
        end: end of the compute, on the same clock.
        comm_s: communication seconds, [L].

    Returns:
        ``max(0, finish − end)``, 0 for an empty phase.

    >>> phase_wait_s([1], np.array([1.0, 2.0]), 2.0, np.array([9.0, 0.5]))
    0.5
    """
    return max(0.0, finish_s(layers, release, comm_s) - end) if len(layers) else 0.0


def check_layers(layers: Iterable[int], n_layers: int) -> tuple[int, ...]:
    """Sort a phase's layers, refusing one that does not exist or comes twice.

    Args:
        layers: layer indices.
        n_layers: how many layers there are.

    Returns:
        The indices, ascending.

    Raises:
        UserError: an index outside 0 … n_layers − 1, or a repeated one.

    >>> check_layers([2, 0], 3)
    (0, 2)
    """
    ordered = tuple(sorted(int(layer) for layer in layers))
    if ordered and not 0 <= ordered[0] <= ordered[-1] < n_layers:
        raise UserError(
            f"a phase names layers {ordered[0]} to {ordered[-1]}; there are {n_layers} layers; "
            f"pass indices from 0 to {n_layers - 1}"
        )
    if len(set(ordered)) != len(ordered):
        raise UserError(
            f"a phase names {len(ordered)} layers of which {len(set(ordered))} are different; a "
            "layer is communicated once in an iteration; remove the repeated ones"
        )
    return ordered


def fill_bubbles(layers, release, end: float, comm_s) -> tuple[int, ...]:
    """Add every layer to a phase that can be communicated in it without adding wait.

    Layers are tried from the output side on. Layer i fits if the channel, free at f, would still
    finish the phase's remaining layers by ``D = max(end, finish)``:
    ``max(f, r_i) + c_i + Σ_{j in phase, j>i} c_j ≤ D``.

    Reconstruction: the paper says to add synchronisations that are fully hidden. The released code
    tries only layers before the phase's first one, fits them into the backward time up to that
    layer, and stops at the first that does not fit. Here layers after and between are tried too,
    a layer that does not fit is passed over, and the test is the channel rule itself.

    Args:
        layers: the phase's layers, ascending.
        release: release times, [L].
        end: end of the compute, on the same clock.
        comm_s: communication seconds, [L].

    Returns:
        The phase's layers with the added ones, ascending.

    Reference: arXiv 2502.11058, section on filling the bubbles.

    >>> fill_bubbles([2], np.array([1.0, 2.0, 3.0]), 3.0, np.array([1.0, 1.5, 0.5]))
    (0, 2)
    """
    if len(layers):
        deadline = max(end, finish_s(layers, release, comm_s))
    else:
        deadline = end
    planned = set(layers)
    left = float(sum(comm_s[layer] for layer in layers))
    free = -np.inf
    chosen = []
    for layer, (ready, cost) in enumerate(zip(release.tolist(), comm_s.tolist(), strict=True)):
        if layer in planned:
            left -= cost
        elif max(free, ready) + cost + left > deadline:
            continue
        free = max(free, ready) + cost
        chosen.append(layer)
    return tuple(chosen)


def phase_tasks(
    phase_layers: Iterable[int],
    backward_s,
    comm_s,
    *,
    launch: str = "gated",
    forward_s: int | float = 0.0,
    tail_s: int | float = 0.0,
) -> tuple[Task, ...]:
    """Write one iteration as tasks on a compute and a communication stream.

    Args:
        phase_layers: the layers communicated in the iteration.
        backward_s: backward seconds per layer, backward order, [L].
        comm_s: communication seconds per layer, [L].
        launch: as in `wait_s`.
        forward_s: seconds of the forward pass.
        tail_s: seconds of compute after the last backward.

    Returns:
        Tasks ``forward``, ``backward i``, ``tail`` on ``compute`` and ``sync i`` on ``comm``; their
        makespan is the iteration time ``forward + Σb + tail + wait``.

    Raises:
        UserError: as `wait_s`.

    >>> from jaxsys.core.timeline import simulate
    >>> simulate(phase_tasks([0, 1], [1, 1, 1], [1, 3, 9])).makespan_s
    5.0
    """
    check_launch(launch)
    backward_s, comm_s = check_times(backward_s, comm_s, forward_s, tail_s)
    layers = check_layers(phase_layers, len(comm_s))
    compute = [Task("forward", "compute", float(forward_s))]
    compute += [Task(f"backward {i}", "compute", float(b)) for i, b in enumerate(backward_s)]
    compute.append(Task("tail", "compute", float(tail_s)))
    gates = {
        "gated": lambda i: (f"backward {i}",),
        "eager": lambda i: (),
        "after": lambda i: ("tail",),
    }
    syncs = [Task(f"sync {i}", "comm", float(comm_s[i]), after=gates[launch](i)) for i in layers]
    return (*compute, *syncs)
