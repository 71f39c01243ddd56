"""Five ways to move slots to the ranks of their experts and back, all with the same result.

Every transport turns each leaf [E, c, ...] of a tree into [E/W, W·c, ...], the slots of this rank's
experts from all W ranks in rank order, and back. Each is a permutation, so the transpose of a
dispatch is its combine: the backward pass dispatches gradients and combines what comes of them.

Expert e lives on rank ⌊e·W / E⌋. Where experts span two mesh axes, such as ``("node", "local")``,
the first is the outer one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsys.core.errors import UserError
from jaxsys.core.mesh import vary
from jaxsys.core.ragged import ragged_all_to_all
from jaxsys.moe.contract import Axes

Move = Callable[[Any, Axes], Any]


class Transport(NamedTuple):
    """A dispatch and its inverse.

    Attributes:
        dispatch: ``(tree of [E, c, ...], Axes) -> tree of [E/W, W·c, ...]``.
        combine: its inverse.

    >>> TRANSPORTS["flat"].dispatch(1.0, Axes())
    1.0
    """

    dispatch: Move
    combine: Move


def expert_axes(axes: Axes) -> tuple[str, ...]:
    """List the mesh axes that experts are spread over.

    >>> expert_axes(Axes(expert="node")), expert_axes(Axes())
    (('node',), ())
    """
    return () if axes.expert is None else Axes(expert=axes.expert).tokens


def axis_size(name: str) -> int:
    """Return the size of a mesh axis from inside `jax.shard_map`.

    Raises:
        UserError: if no such axis is in use.

    >>> axis_size("node")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: axis 'node' is not in the mesh; ...
    """
    try:
        return lax.axis_size(name)
    except NameError:
        raise UserError(
            f"axis {name!r} is not in the mesh; expected one that jax.shard_map was given; correct "
            "Axes or make the mesh with it"
        ) from None


def ranks(axes: Axes) -> int:
    """Count the ranks that experts are spread over, W; from inside `jax.shard_map`.

    >>> ranks(Axes())
    1
    """
    count = 1
    for name in expert_axes(axes):
        count *= axis_size(name)
    return count


def check_divides(experts: int, n_ranks: int) -> None:
    """Refuse experts that cannot be dealt out evenly.

    Raises:
        UserError: if the ranks do not divide the experts.

    >>> check_divides(6, 4)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: 6 experts cannot be dealt out over 4 ranks; ...
    """
    if experts % n_ranks:
        raise UserError(
            f"{experts} experts cannot be dealt out over {n_ranks} ranks; expected a multiple of "
            f"{n_ranks}; change the number of experts or the mesh's expert axis"
        )


def _leafwise(send: bool, move: Callable[..., jax.Array]) -> Move:
    """Lift a move of one leaf to trees; without expert axes nothing moves."""

    def moved(tree: Any, axes: Axes) -> Any:
        names, count = expert_axes(axes), ranks(axes)
        if not names:
            return tree
        if send:
            for leaf in jax.tree.leaves(tree):
                check_divides(leaf.shape[0], count)
        return jax.tree.map(lambda leaf: move(leaf, names, count), tree)

    return moved


def _flat_out(x: jax.Array, names: tuple[str, ...], _: int) -> jax.Array:
    return lax.all_to_all(x, names, 0, 1, tiled=True)


def _flat_back(y: jax.Array, names: tuple[str, ...], _: int) -> jax.Array:
    return lax.all_to_all(y, names, 1, 0, tiled=True)


def _nodes(names: tuple[str, ...], form: str) -> tuple[str, str, int, int]:
    if len(names) != 2:
        raise UserError(
            f"the {form} transport goes over {' and '.join(map(repr, names))}; expected two mesh "
            "axes, nodes and ranks in a node; give Axes two expert axes or take the flat transport"
        )
    node, local = names
    return node, local, axis_size(node), axis_size(local)


def _spread(x: jax.Array, n: int, m: int) -> jax.Array:
    """[E, c, ...] to [n, m, E/(n·m), c, ...], by the owner's node and place in it."""
    return x.reshape(n, m, x.shape[0] // (n * m), *x.shape[1:])


def _arrived(x: jax.Array) -> jax.Array:
    """[n, m, E_l, c, ...], by the sender, to [E_l, n·m·c, ...]."""
    x = jnp.moveaxis(x, 2, 0)
    return x.reshape(x.shape[0], -1, *x.shape[4:])


def _returning(y: jax.Array, n: int, m: int) -> jax.Array:
    """The inverse of `_arrived`."""
    return jnp.moveaxis(y.reshape(y.shape[0], n, m, -1, *y.shape[2:]), 0, 2)


def _collected(y: jax.Array) -> jax.Array:
    """The inverse of `_spread`."""
    return y.reshape(-1, *y.shape[3:])


def _two_out(x: jax.Array, names: tuple[str, ...], _: int) -> jax.Array:
    node, local, n, m = _nodes(names, "2DH")
    x = lax.all_to_all(_spread(x, n, m), local, 1, 1, tiled=True)
    return _arrived(lax.all_to_all(x, node, 0, 0, tiled=True))


def _two_back(y: jax.Array, names: tuple[str, ...], _: int) -> jax.Array:
    node, local, n, m = _nodes(names, "2DH")
    y = lax.all_to_all(_returning(y, n, m), node, 0, 0, tiled=True)
    return _collected(lax.all_to_all(y, local, 1, 1, tiled=True))


def _to_leader(x: jax.Array, names: tuple[str, ...], n: int, m: int) -> jax.Array:
    """Stack what the ranks of a node have on its rank 0, [m, ...]; zeros elsewhere but row 0."""
    rows = [x]
    for j in range(1, m):
        rows.append(lax.ppermute(x, names, [(i * m + j, i * m) for i in range(n)]))
    return jnp.stack(rows)


def _from_leader(rows: jax.Array, names: tuple[str, ...], n: int, m: int) -> jax.Array:
    """Give rank j of each node row j of what its rank 0 has."""
    mine = jnp.where(lax.axis_index(names[1]) == 0, rows[0], jnp.zeros_like(rows[0]))
    for j in range(1, m):
        mine = mine + lax.ppermute(rows[j], names, [(i * m, i * m + j) for i in range(n)])
    return mine


def _between_leaders(x: jax.Array, names: tuple[str, ...], n: int, m: int) -> jax.Array:
    """Exchange [n, ...] between the nodes' ranks 0: row i to node i, back by the sender."""
    here = lax.axis_index(names[0])
    away = jnp.arange(n)
    x = jnp.take(x, (here + away) % n, axis=0)  # row s is for the node s places on
    rows = [x[0]]
    for s in range(1, n):
        rows.append(lax.ppermute(x[s], names, [(i * m, (i + s) % n * m) for i in range(n)]))
    return jnp.take(jnp.stack(rows), (here - away) % n, axis=0)


def _one_out(x: jax.Array, names: tuple[str, ...], _: int) -> jax.Array:
    n, m = _nodes(names, "1DH")[2:]
    rows = _to_leader(_spread(x, n, m), names, n, m)  # [m sender, n, m owner, ...]
    rows = _between_leaders(jnp.moveaxis(rows, 1, 0), names, n, m)  # [n sender, m sender, m, ...]
    return _arrived(_from_leader(jnp.moveaxis(rows, 2, 0), names, n, m))


def _one_back(y: jax.Array, names: tuple[str, ...], _: int) -> jax.Array:
    n, m = _nodes(names, "1DH")[2:]
    rows = _to_leader(_returning(y, n, m), names, n, m)  # [m owner, n sender, m sender, ...]
    rows = _between_leaders(jnp.moveaxis(rows, 1, 0), names, n, m)  # [n owner, m owner, m, ...]
    return _collected(_from_leader(jnp.moveaxis(rows, 2, 0), names, n, m))


def _gather_out(x: jax.Array, names: tuple[str, ...], count: int) -> jax.Array:
    everything = lax.all_gather(x, names)  # [W, E, c, ...]
    own = x.shape[0] // count
    mine = lax.dynamic_slice_in_dim(everything, lax.axis_index(names) * own, own, axis=1)
    mine = jnp.moveaxis(mine, 1, 0)
    return mine.reshape(own, -1, *x.shape[2:])


def _gather_back(y: jax.Array, names: tuple[str, ...], count: int) -> jax.Array:
    own = y.shape[0]
    mine = jnp.moveaxis(y.reshape(own, count, -1, *y.shape[2:]), 0, 1)  # [W, E/W, c, ...]
    room = jnp.zeros((count, own * count, *mine.shape[2:]), y.dtype)
    room = vary(room, names)
    room = lax.dynamic_update_slice_in_dim(room, mine, lax.axis_index(names) * own, axis=1)
    return lax.psum_scatter(room, names, scatter_dimension=0)


def _used(slots: jax.Array) -> jax.Array:
    """Count the slots [S, c, ...] up to the last that is not all zeros, [S]."""
    filled = jnp.any(slots != 0, axis=tuple(range(2, slots.ndim)))
    place = jnp.arange(1, slots.shape[1] + 1, dtype=jnp.int32)[None]
    return jnp.max(jnp.where(filled, place, 0), axis=1)


def _send_used(
    slices: jax.Array, offsets: jax.Array, written_at: jax.Array, names: tuple[str, ...]
) -> jax.Array:
    """Send what each slice [S, c, ...] holds; it begins at its offset of the flattened buffer."""
    sizes = _used(slices)
    received = lax.all_to_all(sizes, names, 0, 0, tiled=True)
    flat = slices.reshape(-1, *slices.shape[2:])
    return ragged_all_to_all(
        flat,
        jnp.zeros_like(flat),
        offsets,
        sizes,
        vary(written_at, names),
        received,
        axis_name=names,
        most=slices.shape[1],
    )


# Slots at the end of a slice that are zero need not be sent, whoever they belong to: the receiver
# has zeros there. So sizes are read off what is sent, in the backward pass off the gradients.
@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _ragged_out(x: jax.Array, names: tuple[str, ...], count: int) -> jax.Array:
    n_experts, slots = x.shape[:2]
    own, e = n_experts // count, jnp.arange(n_experts, dtype=jnp.int32)
    me = lax.axis_index(names).astype(jnp.int32)
    written_at = e % own * (count * slots) + me * slots
    moved = _send_used(x, vary(e * slots, names), written_at, names)
    return moved.reshape(own, count * slots, *x.shape[2:])


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _ragged_back(y: jax.Array, names: tuple[str, ...], count: int) -> jax.Array:
    own, slots = y.shape[0], y.shape[1] // count
    slices = jnp.moveaxis(y.reshape(own, count, slots, *y.shape[2:]), 1, 0)
    slices = slices.reshape(count * own, slots, *y.shape[2:])  # by receiver, then expert
    i = jnp.arange(count * own, dtype=jnp.int32)
    me = lax.axis_index(names).astype(jnp.int32)
    written_at = (me * own + i % own) * slots
    moved = _send_used(slices, vary(i * slots, names), written_at, names)
    return moved.reshape(own * count, slots, *y.shape[2:])


_ragged_out.defvjp(
    lambda x, names, count: (_ragged_out(x, names, count), None),
    lambda names, count, _, g: (_ragged_back(g, names, count),),
)
_ragged_back.defvjp(
    lambda y, names, count: (_ragged_back(y, names, count), None),
    lambda names, count, _, g: (_ragged_out(g, names, count),),
)


TRANSPORTS: dict[str, Transport] = {
    # one all-to-all over all ranks
    "flat": Transport(_leafwise(True, _flat_out), _leafwise(False, _flat_back)),
    # all-to-all within each node, then among equal places of the nodes (Tutel, DeepSpeed)
    "2dh": Transport(_leafwise(True, _two_out), _leafwise(False, _two_back)),
    # to each node's rank 0, which exchange among themselves, and out again (Hetu)
    "1dh": Transport(_leafwise(True, _one_out), _leafwise(False, _one_back)),
    # everything to everybody, who keeps his part; sums back (Megatron's all-gather dispatcher)
    "gather": Transport(_leafwise(True, _gather_out), _leafwise(False, _gather_back)),
    # only slots in use; on CPUs the emulation of `core.ragged`
    "ragged": Transport(_leafwise(True, _ragged_out), _leafwise(False, _ragged_back)),
}
