"""Measure the five operations of a layer on a mesh and fit their lines."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsys.core.cost import LinearCost, PoorFitError, fit_linear
from jaxsys.core.errors import UserError
from jaxsys.core.measure import interleaved
from jaxsys.moe.contract import Axes
from jaxsys.moe.costs import Costs

# The paper times communication of 1 to 24 times 2^18 floats; here six of these sizes.
ELEMENTS = tuple(2**18 * factor for factor in (1, 2, 4, 8, 16, 24))
FREE = LinearCost(0.0, 0.0, 1.0, 0.0, 0)  # an axis of one rank moves nothing

Points = list[tuple[float, float]]
Operation = Callable[[int], tuple[float, Callable[[], Any]]]


class Profile(NamedTuple):
    """Hold fitted costs and the points behind them.

    Attributes:
        costs: the lines.
        points: per operation, (size, median seconds).

    >>> Profile._fields
    ('costs', 'points')
    """

    costs: Costs
    points: dict[str, Points]


def expert_mesh(devices: Sequence[Any], expert: int | None = None, tensor: int = 1) -> Mesh:
    """Lay devices out as ranks of experts (outer) by ranks that split each expert (inner).

    Args:
        devices: in the order of processes, so that tensor ranks are neighbours.
        expert: ranks that experts are spread over; all that the tensor ranks leave by default.
        tensor: ranks that split each expert.

    Returns:
        A mesh with the axes ``expert`` and ``tensor``, of type `Auto`.

    Raises:
        UserError: if there are not that many devices, or the tensor ranks do not divide them.

    >>> expert_mesh(jax.devices()[:1]).axis_names
    ('expert', 'tensor')
    """
    n = len(devices)
    if tensor < 1 or (expert is None and n % tensor):
        raise UserError(
            f"{n} devices cannot be laid out by {tensor} tensor ranks; expected a divisor of {n}; "
            "change it"
        )
    rows = n // tensor if expert is None else expert
    if not 1 <= rows * tensor <= n:
        raise UserError(
            f"{rows} × {tensor} ranks need {rows * tensor} devices and there are {n}; expected at "
            "most that many; change one"
        )
    chosen = np.array(devices[: rows * tensor]).reshape(rows, tensor)
    return Mesh(chosen, ("expert", "tensor"), axis_types=(AxisType.Auto,) * 2)


def profile(
    mesh: Mesh,
    axes: Axes,
    *,
    elements: Sequence[int] = ELEMENTS,
    width: int = 512,
    repeats: int = 5,
    min_r2: float | int = 0.9,
    on_operation: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Time all-to-all, all-gather, reduce-scatter, all-reduce and expert products; fit lines.

    Sizes are those of `volumes.Volumes`: of the exchanged, the gathered, the summed and the reduced
    buffer in float32, and multiply-adds of a product of c × width by width × width. All sizes of an
    operation are timed in turns, in shuffled order. An operation over an axis that is not named, or
    has one rank, is free.

    In a job of several processes every process calls it; the slowest process's times count.

    Args:
        mesh: its devices are timed.
        axes: which of its axes are what.
        elements: sizes of the buffers, three or more.
        width: D of the expert products.
        repeats: timed runs of each size.
        min_r2: the gate, least r² of a fit.
        on_operation: called with each operation's name, for progress.

    Returns:
        Lines and points.

    Raises:
        UserError: for an axis that the mesh lacks, or sizes too few or too small.
        PoorFitError: for times that no line explains, naming the operation.

    Reference: arXiv 2501.10714, section on the profiler.

    >>> from jaxsys.core.mesh import replica_mesh
    >>> profile(replica_mesh(jax.devices()[:1]), Axes(expert="node"))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: axis 'node' is not in the mesh, which has replica; ...
    """
    _check(mesh, axes, elements, repeats)
    points: dict[str, Points] = {}
    lines: dict[str, LinearCost] = {}
    for name, make in operations(mesh, axes, width=width).items():
        on_operation(name)
        points[name] = [] if make is None else _time(mesh, make, elements, repeats)
        lines[name] = FREE if make is None else fit(name, points[name], min_r2)
    return Profile(Costs(**lines), points)


def fit(name: str, points: Points, min_r2: float | int = 0.9) -> LinearCost:
    """Fit one operation's line, naming it where the fit is refused.

    Args:
        name: the operation.
        points: (size, seconds).
        min_r2: the gate.

    Returns:
        The line.

    Raises:
        PoorFitError: for a fit below the gate.

    >>> round(fit("all_reduce", [(1.0, 0.3), (2.0, 0.5), (4.0, 0.9)]).beta_s_per_unit, 6)
    0.2
    """
    sizes, seconds = zip(*points, strict=True)
    try:
        return fit_linear(sizes, seconds, min_r2=min_r2)
    except PoorFitError as error:
        raise PoorFitError(f"{name}: {error}") from error


def operations(mesh: Mesh, axes: Axes, *, width: int = 512) -> Mapping[str, Operation | None]:
    """Build the five operations as functions of a size.

    Args:
        mesh: devices.
        axes: which axes of it are what.
        width: D of the expert products.

    Returns:
        Operation to a function of elements, which gives the real size (rounded up to what the ranks
        divide) and a function to time; None where the operation is free.

    >>> from jaxsys.core.mesh import replica_mesh
    >>> size, run = operations(replica_mesh(jax.devices()[:1]), Axes())["expert"](1 << 16)
    >>> size, run().shape
    (33554432.0, (1, 128, 512))
    """
    expert = Axes(expert=axes.expert).tokens
    tensor = (axes.tensor,) if axes.tensor else ()
    data = (axes.data, *expert) if axes.data else expert

    def collective(names: tuple[str, ...], local: Callable[[Any], Any], *, grows: bool = False):
        ranks = int(np.prod([mesh.shape[name] for name in names], dtype=int))
        if ranks == 1:
            return None

        def make(elements: int) -> tuple[float, Callable[[], Any]]:
            share = -(-elements // ranks)
            return float(share * ranks), _bound(mesh, local, share * (1 if grows else ranks))

        return make

    def product(elements: int) -> tuple[float, Callable[[], Any]]:
        rows = -(-elements // width)
        weights = jnp.ones((width, width))
        run = _bound(mesh, lambda x: x.reshape(rows, width) @ weights, rows * width)
        return float(rows) * width * width, run

    return {
        "all_to_all": collective(expert, lambda x: lax.all_to_all(x, expert, 0, 0, tiled=True)),
        "all_gather": collective(
            tensor, lambda x: lax.all_gather(x, tensor, tiled=True), grows=True
        ),
        "reduce_scatter": collective(tensor, lambda x: lax.psum_scatter(x, tensor, tiled=True)),
        "all_reduce": collective(data, lambda x: lax.psum(x, data)),
        "expert": product,
    }


def _bound(mesh: Mesh, local: Callable[[Any], Any], share: int) -> Callable[[], Any]:
    """Compile a function of each device's own vector and close it over data."""
    sharding = NamedSharding(mesh, P(mesh.axis_names))

    def block(x: jax.Array) -> jax.Array:
        return jnp.expand_dims(local(jnp.squeeze(x, 0)), 0)

    run = jax.jit(
        jax.shard_map(
            block, mesh=mesh, in_specs=sharding.spec, out_specs=sharding.spec, check_vma=False
        )
    )
    x = jax.jit(lambda: jnp.ones((mesh.size, share)), out_shardings=sharding)()
    return lambda: run(x)


def _time(
    mesh: Mesh, make: Operation, elements: Sequence[int], repeats: int
) -> list[tuple[float, float]]:
    made = [make(n) for n in elements]
    times = interleaved({str(i): run for i, (_, run) in enumerate(made)}, runs=repeats)
    medians = [times[str(i)].median_s for i in range(len(made))]
    slowest = _slowest(mesh, np.array(medians, np.float32))
    return [(size, float(s)) for (size, _), s in zip(made, slowest, strict=True)]


def _slowest(mesh: Mesh, medians: np.ndarray) -> np.ndarray:
    """Return the largest values over all processes, the same on each."""
    split, whole = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
    mine = np.broadcast_to(medians, (mesh.size, len(medians)))
    x = jax.make_array_from_callback(mine.shape, split, lambda index: mine[index])
    return np.asarray(jax.jit(lambda x: x.max(0), out_shardings=whole)(x))


def _check(mesh: Mesh, axes: Axes, elements: Sequence[int], repeats: int) -> None:
    for name in axes.tokens:
        if name not in mesh.axis_names:
            raise UserError(
                f"axis {name!r} is not in the mesh, which has {', '.join(mesh.axis_names)}; name "
                "one of these, or None"
            )
    if len(set(elements)) < 3 or min(elements) < 1:
        raise UserError(
            f"the sizes are {tuple(elements)}; expected three or more different ones above 0, or "
            "no line can be checked; pass more"
        )
    if repeats < 1:
        raise UserError(f"repeats is {repeats}; expected a whole number from 1 up; raise it")
