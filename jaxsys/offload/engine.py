"""Run a placed model: one call of `forward` for a decode step or a chunk of a prompt."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.offload.cache import Policy
from jaxsys.offload.call import Call
from jaxsys.offload.choose import Mode
from jaxsys.offload.hot import HotExperts
from jaxsys.offload.layers import Programs, programs
from jaxsys.offload.load import Placed, check_files
from jaxsys.offload.monitor import Monitor
from jaxsys.offload.traces import Recorder
from jaxsys.offload.transfer import Ring

# (layer, active experts, their tokens) -> what to do with columns that are not resident; a dense
# block is asked for as expert -1. `choose.chooser` makes one from a plan and a machine.
Choose = Callable[[int, Sequence[int], Sequence[int]], Sequence[Mode]]


class State(NamedTuple):
    """Hold what a run remembers: keys and values of each layer, and how far each row has come.

    Attributes:
        stores: each layer's keys and values, [B, K, S, C].
        lengths: filled slots of each row, on the host.

    >>> State((), np.zeros(2, np.int32)).lengths.tolist()
    [0, 0]
    """

    stores: tuple[Any, ...]
    lengths: np.ndarray

    @property
    def slots(self) -> int:
        """Most tokens that a row can hold, S."""
        return self.stores[0][0].shape[2]


class Engine(NamedTuple):
    """Hold what runs a placed model.

    Attributes:
        placed: the model.
        programs: compiled for it.
        ring: transfer buffers; None without an accelerator.
        choose: decides about parts whose columns are not all resident; see `Choose`.
        monitor: counts.
        hot: a cache of experts, or None where the plan's stay.
        recorder: takes down what routers choose, or None.
        early: whether the next mixture layer's router is run early and what it names copied ahead.

    >>> Engine._fields[:5]
    ('placed', 'programs', 'ring', 'choose', 'monitor')
    """

    placed: Placed
    programs: Programs
    ring: Ring | None
    choose: Choose
    monitor: Monitor
    hot: HotExperts | None
    recorder: Recorder | None
    early: bool = False


def as_planned(layer: int, experts: Sequence[int], counts: Sequence[int]) -> list[Mode]:
    """Do with every part what the plan says.

    >>> as_planned(0, [3, 5], [1, 1])
    ['planned', 'planned']
    """
    del layer, counts
    return ["planned"] * len(experts)


def make_engine(
    placed: Placed,
    *,
    choose: Choose = as_planned,
    monitor: Monitor | None = None,
    pinned: bool | None = None,
    policy: Policy | None = None,
    recorder: Recorder | None = None,
    early: bool = False,
) -> Engine:
    """Make what runs a placed model.

    Args:
        placed: from `place_model`.
        choose: decides at run time about parts that are not resident.
        monitor: counts; a fresh one by default.
        pinned: copy weights through page-locked memory; on accelerators that are no CPU by default.
        policy: keep experts that were copied over, in the place of others; needs a model placed
            with ``fixed=False``.
        recorder: takes down what routers choose; needs the same.
        early: run the next mixture layer's norm and router on what its predecessor reads, and copy
            ahead what they name and is not resident, where a transfer buffer is free. What has
            come is used on the accelerator; what was named in vain is dropped.

    Returns:
        The engine.

    Raises:
        UserError: transfer buffers too small for the plan's largest copy, or a policy or recorder
            for a model whose experts are fixed.

    >>> from jaxsys.models import lm
    >>> from jaxsys.offload.load import place_model
    >>> from jaxsys.offload.parts import parts_of
    >>> from jaxsys.offload.place import cpu_plan, find_devices
    >>> config = lm.LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> params = lm.init(jax.random.key(0), config)
    >>> placed = place_model(params, cpu_plan(parts_of(config)), find_devices("none"),
    ...                      config=config)
    >>> engine = make_engine(placed)
    >>> state = init_state(placed, 1, 16)
    >>> forward(engine, state, np.ones((1, 3), np.int32))[0].shape
    (1, 97)
    """
    device, ring = placed.devices.accelerator, None
    if device is not None:
        locked = device.platform != "cpu" if pinned is None else pinned
        ring = Ring(device, _buffers(placed), pinned=locked)
    parts = {
        (i, e): pieces[0].weights
        for i, layer in enumerate(placed.layers)
        for e, pieces in layer.ffn.items()
        if e >= 0 and len(pieces) == 1 and pieces[0].role == "cpu"
    }
    mixtures = [layer for i, layer in enumerate(placed.layers) if placed.config.is_sparse(i)]
    if (policy or recorder) and any(layer.whole is not None for layer in mixtures):
        raise UserError(
            "a cache or a record of experts was asked for and the model's experts are fixed; "
            "expected experts that stay in the CPU's memory; place the model with fixed=False"
        )
    hot = HotExperts(policy, placed.plan, parts, device) if policy and device else None
    return Engine(
        placed, programs(placed.config), ring, choose, monitor or Monitor(), hot, recorder, early
    )


def _buffers(placed: Placed) -> int:
    """Count the transfer buffers that the plan leaves room for; 2 where it does not say."""
    sizes = [
        piece.n_bytes
        for layer in placed.layers
        for pieces in (*layer.ffn.values(), *([(layer.half,)] if layer.half else []))
        for piece in pieces
        if piece.role == "stream"
    ]
    room = placed.plan.buffer_bytes
    if not room or not sizes:
        return 2
    if room < max(sizes):
        raise UserError(
            f"the plan's transfer buffers hold {room} bytes and its largest copy has {max(sizes)}; "
            "expected room for one at least, better for two; raise buffer_bytes"
        )
    return min(room // max(sizes), 4)


def init_state(placed: Placed, batch: int, slots: int) -> State:
    """Allocate empty caches where the plan wants them.

    Args:
        placed: the model.
        batch: B, rows that are decoded together.
        slots: S, most tokens of a row.

    Returns:
        The state before the first token.

    Raises:
        UserError: for more slots than the model was made for, or than the plan's memory holds.

    >>> from jaxsys.models import lm
    >>> from jaxsys.offload.load import place_model
    >>> from jaxsys.offload.parts import parts_of
    >>> from jaxsys.offload.place import cpu_plan, find_devices
    >>> config = lm.LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> plan, params = cpu_plan(parts_of(config)), lm.init(jax.random.key(0), config)
    >>> init_state(place_model(params, plan, find_devices("none"), config=config), 1, 65)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: a cache of 65 tokens a row was asked for and the model ...
    """
    config = placed.config
    if slots > config.max_positions:
        raise UserError(
            f"a cache of {slots} tokens a row was asked for and the model was made for "
            f"{config.max_positions}; shorten prompts or answers"
        )
    shape = (batch, config.kv_heads, slots, config.head_width)
    size = 2 * int(np.prod(shape, dtype=np.int64)) * np.dtype(placed.dtype).itemsize
    planned = placed.plan.cache_bytes
    if planned and "accelerator" in placed.plan.cache_on and size > planned:
        raise UserError(
            f"a layer's keys and values take {size} bytes for {batch} rows of {slots} tokens and "
            f"the plan keeps {planned}; plan for this batch and length"
        )
    stores = []
    for layer in placed.layers:
        home = placed.home(layer)
        stores.append(tuple(jnp.zeros(shape, placed.dtype, device=home) for _ in range(2)))
    return State(tuple(stores), np.zeros(batch, np.int32))


def forward(
    engine: Engine,
    state: State,
    tokens: np.ndarray,
    *,
    counts: np.ndarray | None = None,
    row: int | None = None,
    sequences: np.ndarray | None = None,
) -> tuple[jax.Array, State]:
    """Run new tokens of every row, or of one.

    Args:
        engine: from `make_engine`.
        state: its stores are used up.
        tokens: [B, T] ids of every row, or [1, T] of one.
        counts: how many of a row's tokens count, [B]; the rest is padding. All by default.
        row: the only row that is meant.
        sequences: number of each row's text, [B], for a recorder; the row's by default.

    Returns:
        Logits after each row's last token, [B, V], not waited for; the state after it.

    Raises:
        UserError: for tokens that the cache has no room for, or a file that was cut.

    >>> forward.__name__  # see `make_engine`
    'forward'
    """
    if counts is None:
        counts = np.full(tokens.shape[0], tokens.shape[1])
    counts = np.asarray(counts, np.int32)
    own = slice(None) if row is None else slice(row, row + 1)
    start = state.lengths[own]
    if (start + tokens.shape[1]).max() > state.slots:
        raise UserError(
            f"{int((start + tokens.shape[1]).max())} tokens of a row were to be remembered and the "
            f"cache holds {state.slots}; shorten the prompt or make a longer cache"
        )
    check_files(engine.placed.files)
    call = Call(engine, tokens, start, counts, None if row is None else np.int32(row))
    if sequences is not None:
        call.sequences = sequences
    logits, stores = (call.alone if engine.placed.tree is not None else call.run)(state.stores)
    lengths = state.lengths.copy()
    lengths[own] += counts
    engine.monitor.tokens += int(counts.sum())
    return logits, State(stores, lengths)
