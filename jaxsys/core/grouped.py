"""Grouped matrix products: rows sorted into groups, each group with a matrix of its own."""

import importlib.util
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Integer

from jaxsys.core.errors import UserError

BACKENDS = ("ragged_dot", "pallas", "tokamax")
TILE_ROWS, TILE_INNER, TILE_COLUMNS = 64, 32, 64


def grouped_matmul(
    rows: Float[Array, "M D"],
    weights: Float[Array, "E D F"],
    sizes: Integer[Array, "E"],
    backend: str = "ragged_dot",
) -> Float[Array, "M F"]:
    """Multiply each group of rows by its own matrix.

    ``ragged_dot`` is XLA's, a masked dense product on CPU. ``pallas`` is our kernel, made for GPUs
    and interpreted elsewhere (right, and slow). ``tokamax`` is the package of that name.

    Args:
        rows: sorted by group; those past the sum of sizes give zeros or nothing of use.
        weights: one matrix per group.
        sizes: rows of each group.
        backend: one of `BACKENDS`.

    Returns:
        Products, in the rows' dtype.

    Raises:
        UserError: for another name, or Tokamax where it is not installed.

    >>> weights = jnp.array([[[2.0]], [[3.0]]])
    >>> grouped_matmul(jnp.ones((3, 1)), weights, jnp.array([1, 2])).ravel().tolist()
    [2.0, 3.0, 3.0]
    """
    if backend not in BACKENDS:
        raise UserError(
            f"the grouped product's back end is {backend!r}; expected one of {', '.join(BACKENDS)};"
            " choose one"
        )
    if backend not in available():
        raise UserError("Tokamax is not installed; install jaxsys[tokamax] or take ragged_dot")
    sizes = sizes.astype(jnp.int32)
    weights = weights.astype(rows.dtype)
    if backend == "pallas":
        return _pallas(rows, weights, sizes)
    if backend == "tokamax":
        # Only where the extra is installed.
        import tokamax  # pyright: ignore[reportMissingImports]

        return tokamax.ragged_dot(rows, weights, sizes)
    return jax.lax.ragged_dot(rows, weights, sizes)


def available() -> tuple[str, ...]:
    """List the back ends that are installed.

    >>> "ragged_dot" in available()
    True
    """
    has_tokamax = importlib.util.find_spec("tokamax") is not None
    return tuple(name for name in BACKENDS if name != "tokamax" or has_tokamax)


class Tiles(NamedTuple):
    """Say how groups are laid out so that no tile of rows holds two of them.

    Attributes:
        group: of each tile; the last group where a tile is empty.
        starts: first tile of each group, and the end, [E + 1].
        source: row at each padded place, M where there is none.
        place: padded place of each row.

    >>> Tiles._fields
    ('group', 'starts', 'source', 'place')
    """

    group: Integer[Array, "tiles"]
    starts: Integer[Array, "E1"]
    source: Integer[Array, "padded"]
    place: Integer[Array, "M"]


def tiles_of(sizes: Integer[Array, "E"], n_rows: int, tile: int = TILE_ROWS) -> Tiles:
    """Lay out groups of rows in tiles.

    >>> tiles_of(jnp.array([1, 3]), 4, tile=2).group.tolist()
    [0, 1, 1, 1]
    """
    n_groups = sizes.shape[0]
    n_tiles = -(-n_rows // tile) + n_groups
    own = -(-sizes // tile)
    ends = jnp.cumsum(own)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])
    group = jnp.searchsorted(ends, jnp.arange(n_tiles), side="right")
    group = jnp.minimum(group, n_groups - 1).astype(jnp.int32)
    first = jnp.cumsum(sizes) - sizes  # of each group, among the rows as they came
    padded = jnp.arange(n_tiles * tile)
    of_place = jnp.repeat(group, tile)
    rank = padded - tile * starts[of_place]
    source = jnp.where(rank < sizes[of_place], first[of_place] + rank, n_rows)
    row = jnp.arange(n_rows)
    of_row = jnp.searchsorted(jnp.cumsum(sizes), row, side="right")
    kept = of_row < n_groups
    of_row = jnp.minimum(of_row, n_groups - 1)
    place = jnp.where(kept, tile * starts[of_row] + row - first[of_row], n_tiles * tile)
    return Tiles(group, starts.astype(jnp.int32), source, place)


@jax.custom_vjp
def _pallas(rows: Array, weights: Array, sizes: Array) -> Array:
    return _forward(rows, weights, sizes)[0]


def _forward(rows, weights, sizes):
    tiles = tiles_of(sizes, rows.shape[0])
    padded = _padded(rows, tiles)
    return _unpadded(_products(padded, weights, tiles.group), tiles), (padded, weights, tiles)


def _backward(saved, dy):
    padded, weights, tiles = saved
    dpadded = _padded(dy, tiles)
    drows = _products(dpadded, jnp.swapaxes(weights, 1, 2), tiles.group)
    dweights = _outer(padded, dpadded, tiles.starts, weights.shape)
    return _unpadded(drows, tiles), dweights.astype(weights.dtype), None


_pallas.defvjp(_forward, _backward)


def _padded(rows: Array, tiles: Tiles) -> Array:
    return rows.at[tiles.source].get(mode="fill", fill_value=0)


def _unpadded(rows: Array, tiles: Tiles) -> Array:
    return rows.at[tiles.place].get(mode="fill", fill_value=0)


def _up(x: Array, *multiples: int) -> Array:
    """Pad each of the last axes with zeros to a multiple."""
    lead = x.ndim - len(multiples)
    pads = [-n % m for n, m in zip(x.shape[lead:], multiples, strict=True)]
    return jnp.pad(x, [(0, 0)] * lead + [(0, p) for p in pads]) if any(pads) else x


def _interpreted() -> bool:
    return jax.default_backend() != "gpu"


def _products(padded: Array, weights: Array, group: Array) -> Array:
    """Multiply each tile of rows by its group's matrix."""
    width = weights.shape[-1]
    x, w = _up(padded, 1, TILE_INNER), _up(weights, TILE_INNER, TILE_COLUMNS)
    kernel = partial(_product_kernel, steps=x.shape[1] // TILE_INNER)
    out = pl.pallas_call(
        kernel,
        grid=(x.shape[0] // TILE_ROWS, w.shape[2] // TILE_COLUMNS),
        out_specs=pl.BlockSpec((TILE_ROWS, TILE_COLUMNS), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), padded.dtype),
        interpret=_interpreted(),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    )(group, x, w)
    return out[:, :width]


def _product_kernel(group_ref, x_ref, w_ref, out_ref, *, steps: int):
    i, j = pl.program_id(0), pl.program_id(1)
    e = group_ref[i]
    rows, columns = pl.ds(i * TILE_ROWS, TILE_ROWS), pl.ds(j * TILE_COLUMNS, TILE_COLUMNS)

    def add(step, total):
        inner = pl.ds(step * TILE_INNER, TILE_INNER)
        x, w = x_ref[rows, inner], w_ref[e, inner, columns]
        return total + jnp.dot(x, w, preferred_element_type=jnp.float32)

    zeros = jnp.zeros((TILE_ROWS, TILE_COLUMNS), jnp.float32)
    out_ref[...] = jax.lax.fori_loop(0, steps, add, zeros).astype(out_ref.dtype)


def _outer(padded: Array, dpadded: Array, starts: Array, shape: tuple[int, ...]) -> Array:
    """Sum xᵀ dy over the tiles of each group."""
    n_groups, inner, width = shape
    x, dy = _up(padded, 1, TILE_COLUMNS), _up(dpadded, 1, TILE_COLUMNS)
    out = pl.pallas_call(
        _outer_kernel,
        grid=(n_groups, x.shape[1] // TILE_COLUMNS, dy.shape[1] // TILE_COLUMNS),
        out_specs=pl.BlockSpec((None, TILE_COLUMNS, TILE_COLUMNS), lambda e, i, j: (e, i, j)),
        out_shape=jax.ShapeDtypeStruct((n_groups, x.shape[1], dy.shape[1]), jnp.float32),
        interpret=_interpreted(),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    )(starts, x, dy)
    return out[:, :inner, :width]


def _outer_kernel(starts_ref, x_ref, dy_ref, out_ref):
    e, i, j = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    inner, columns = (pl.ds(at * TILE_COLUMNS, TILE_COLUMNS) for at in (i, j))

    def add(tile, total):
        rows = pl.ds(tile * TILE_ROWS, TILE_ROWS)
        x, dy = x_ref[rows, inner], dy_ref[rows, columns]
        return total + jnp.dot(x.T, dy, preferred_element_type=jnp.float32)

    zeros = jnp.zeros((TILE_COLUMNS, TILE_COLUMNS), jnp.float32)
    out_ref[...] = jax.lax.fori_loop(starts_ref[e], starts_ref[e + 1], add, zeros)
