"""One step of the engine as one jitted program: pieces of prompts and decoding slots together.

All that the host says about a step travels as one array of integers; tokens stay on the device
from step to step. The program has two shapes, with room for pieces of prompts and without, both
compiled before the first request; nothing compiles later.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from jaxsys.bench.serving.schedule import Layout, Turn
from jaxsys.evaluate.sampling import sample_each
from jaxsys.models import lm
from jaxsys.models.lm.paged import Pool, Rows, apply_paged, init_pool


class State(NamedTuple):
    """Hold what stays on the device: the pages, and each slot's newest token.

    >>> State._fields
    ('pool', 'last')
    """

    pool: Pool
    last: Int32[Array, "N"]


class Orders(NamedTuple):
    """Hold what the host says about a step; N slots, R pieces of T tokens.

    >>> empty_orders(Layout(slots=2, pages=8, page_tokens=4, context=16), rows=0).tables.shape
    (2, 4)
    """

    tables: Any  # [N, pages] of each slot
    position: Any  # [N] of the token that a slot reads
    decodes: Any  # [N] whether it reads one
    row_slot: Any  # [R]
    row_start: Any  # [R] position of a piece's first token
    row_count: Any  # [R] tokens of a piece, 0 for none
    row_tokens: Any  # [R, T]
    gives: Any  # [N] whether the slot is given a token
    read_at: Any  # [N] the token of this step after which that one comes
    count: Any  # [N] tokens given before, for the draw
    seed: Any  # [N]
    temperature: Any  # [N], bits of a float
    top_p: Any  # [N], bits of a float


def empty_orders(layout: Layout, rows: int) -> Orders:
    """Make the orders of a step in which nothing happens.

    Args:
      layout: sizes of the engine.
      rows: R, pieces that the step has room for.

    >>> empty_orders(Layout(slots=2, pages=8, page_tokens=4, context=16), rows=3).row_tokens.shape
    (3, 16)
    """
    n = layout.slots
    piece, slot = {"row_slot", "row_start", "row_count"}, (n,)
    shapes: dict[str, tuple[int, ...]] = {
        name: (rows,) if name in piece else slot for name in Orders._fields
    }
    shapes |= {"tables": (n, layout.table), "row_tokens": (rows, layout.row_tokens)}
    return Orders(**{name: np.zeros(shape, np.int32) for name, shape in shapes.items()})


def orders_of(layout: Layout, turn: Turn) -> Orders:
    """Write a turn down as arrays.

    Args:
      layout: sizes of the engine.
      turn: from the scheduler.

    Returns:
      Orders with room for all pieces if there is one, else for none.

    >>> layout = Layout(slots=2, pages=8, page_tokens=4, context=16)
    >>> orders_of(layout, Turn(((1, 5),), (), (), ((1, (3, 4)),))).tables.tolist()
    [[0, 0, 0, 0], [3, 4, 0, 0]]
    """
    orders = empty_orders(layout, layout.prompt_rows if turn.rows else 0)
    for slot, pages in turn.tables:
        orders.tables[slot, : len(pages)] = pages
    for slot, position in turn.decodes:
        orders.position[slot], orders.decodes[slot] = position, 1
    for i, row in enumerate(turn.rows):
        orders.row_slot[i], orders.row_start[i] = row.slot, row.start
        orders.row_count[i] = len(row.tokens)
        orders.row_tokens[i, : len(row.tokens)] = row.tokens
    temperature, top_p = (x.view(np.float32) for x in (orders.temperature, orders.top_p))
    for slot, job, row, count in turn.gives:
        orders.gives[slot], orders.count[slot] = 1, count
        ends = layout.slots + row * layout.row_tokens + orders.row_count[row] - 1 if row >= 0 else 0
        orders.read_at[slot] = ends if row >= 0 else slot
        orders.seed[slot : slot + 1].view(np.uint32)[0] = job.ask.seed % 2**32
        temperature[slot], top_p[slot] = job.ask.temperature, job.ask.top_p
    return orders


def init_state(config: Any, layout: Layout, dtype: Any) -> State:
    """Allocate the pages.

    Args:
      config: the `LMConfig`.
      layout: sizes of the engine.
      dtype: of keys and values.

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> init_state(config, Layout(slots=2, pages=8, page_tokens=4, context=16), "float32").last
    Array([0, 0], dtype=int32)
    """
    pool = init_pool(config, layout.pages, layout.page_tokens, jnp.dtype(dtype))
    return State(pool, jnp.zeros(layout.slots, jnp.int32))


def step(
    params: Any, state: State, orders: Orders, config: Any, layout: Layout
) -> tuple[State, Int32[Array, "N"]]:
    """Read pieces of prompts and the slots' newest tokens, and give the next ones.

    Args:
      params: the model's.
      state: donated; the pages are written in place.
      orders: from `orders_of`.
      config: the `LMConfig`.
      layout: sizes of the engine.

    Returns:
      The state, and each slot's newest token.

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> layout = Layout(slots=2, pages=8, page_tokens=4, context=16)
    >>> state = init_state(config, layout, "float32")
    >>> params = lm.init(jax.random.key(0), config)
    >>> step(params, state, empty_orders(layout, 0), config, layout)[1].shape
    (2,)
    """
    shapes = tuple(x.shape for x in orders)
    packed = np.concatenate([x.reshape(-1) for x in orders])
    return _step(params, state, packed, shapes, config, layout)


@functools.partial(jax.jit, static_argnums=(3, 4, 5), donate_argnums=1)
def _step(params, state, packed, shapes, config, layout):
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    parts = jnp.split(packed, ends)
    orders = Orders(*(x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)))
    single = Rows(orders.tables, orders.position, orders.decodes, 1)
    piece = Rows(
        orders.tables[orders.row_slot], orders.row_start, orders.row_count, layout.row_tokens
    )
    tokens = jnp.concatenate([state.last, orders.row_tokens.reshape(-1)])
    x, pool = apply_paged(params, config, tokens, state.pool, (single, piece))
    logits = lm.head(params, config, x[orders.read_at][None])[0]
    keys = jax.vmap(_key)(orders.seed, orders.count)
    floats = (
        jax.lax.bitcast_convert_type(b, jnp.float32) for b in (orders.temperature, orders.top_p)
    )
    chosen = sample_each(keys, logits, *floats)
    last = jnp.where(orders.gives > 0, chosen, state.last)
    return State(pool, last), last


def _key(seed: Array, count: Array) -> Array:
    """The key with which `evaluate.generate` draws a single row's token of that number."""
    seed = jax.lax.bitcast_convert_type(seed, jnp.uint32)
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), count)
