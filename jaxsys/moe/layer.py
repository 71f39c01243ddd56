"""The layer: gate, slots, order, dispatch, experts, combine, and back.

The same function runs on one device (no axes) and inside `jax.shard_map`; only `pipelined` knows
where the experts are.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.core.tree import path_key
from jaxsys.moe import losses
from jaxsys.moe.capacity import fill_groups, fill_slots, seats, slots_per_expert
from jaxsys.moe.contract import (
    Axes,
    Dims,
    ExpertChoice,
    Info,
    LayerPlan,
    Mixing,
    MoESpec,
    Routed,
    Slots,
    TokenChoice,
)
from jaxsys.moe.gates import rows_of
from jaxsys.moe.order import mix, unmix
from jaxsys.moe.pipelined import pipelined

ONE = LayerPlan()
HERE = Axes()


def init(key: jax.Array, spec: MoESpec, dims: Dims) -> dict[str, Any]:
    """Draw a layer's parameters.

    Args:
        key: random key.
        spec: the layer's parts.
        dims: its sizes.

    Returns:
        ``gate``, ``experts`` and, where there are shared experts, ``shared``.

    Raises:
        UserError: for sizes that a part refuses.

    >>> from jaxsys.moe.experts import swiglu
    >>> from jaxsys.moe.gates import noisy_top_k
    >>> from jaxsys.moe.order import sparse_order
    >>> spec = MoESpec(noisy_top_k(2), sparse_order(), swiglu())
    >>> init(jax.random.key(0), spec, Dims(4, 8, 3))["experts"]["up"].shape
    (3, 4, 8)
    """
    params = {
        "gate": spec.gate.init(path_key(key, "gate"), dims),
        "experts": spec.experts.init(path_key(key, "experts"), dims),
    }
    if spec.shared is not None:
        own = Dims(dims.width, spec.shared_hidden, 1)
        params["shared"] = spec.shared.init(path_key(key, "shared"), own)
    return params


def apply(
    params: dict[str, Any],
    x: Float[Array, "B T D"],
    spec: MoESpec,
    plan: LayerPlan = ONE,
    *,
    axes: Axes = HERE,
    key: jax.Array | None = None,
) -> tuple[Float[Array, "B T D"], Info]:
    """Run a mixture-of-experts layer.

    y_n = Σ_j w_nj · expert_{e_nj}(x_n), over those of token n's choices that found a slot, plus the
    shared experts; what is dropped contributes nothing, so add the result to a residual stream.

    Args:
        params: as from `init`; inside `jax.shard_map`, this rank's part of the experts.
        x: this rank's tokens.
        spec: the layer's parts; static under jit.
        plan: its pipeline degrees; C is padded to a multiple of both.
        axes: of the mesh around; none on a single device.
        key: for the gate's noise, this rank's own; None for no noise.

    Returns:
        The output, and what there is to tell.

    Raises:
        UserError: for experts that the axis does not divide, or an axis that is not in the mesh.

    Reference: arXiv 2501.10714 §2-3.

    >>> from jaxsys.moe.experts import swiglu
    >>> from jaxsys.moe.gates import noisy_top_k
    >>> from jaxsys.moe.order import sparse_order
    >>> spec = MoESpec(noisy_top_k(2), sparse_order(), swiglu())
    >>> params = init(jax.random.key(0), spec, Dims(4, 8, 3))
    >>> y, info = apply(params, jnp.ones((1, 5, 4)), spec)
    >>> y.shape, round(info.load.sum().item(), 6)
    ((1, 5, 4), 1.0)
    """
    x, routed = _route(params, x, spec, axes, key)
    if isinstance(routed, TokenChoice) and _is_ragged(spec, axes):
        rows = rows_of(x)
        slots, out = _run_ragged(params["experts"], rows, routed, spec)
        return _finish(params, out, Kept(x, routed, slots), rows.shape[0], spec, axes)
    buffer, kept = _order(x, routed, spec, plan)
    return finish(params, pipelined(params["experts"], buffer, spec, plan, axes), kept, spec, axes)


class Kept(NamedTuple):
    """What the second half of a layer needs of the first.

    Attributes:
        x: the tokens.
        routed: what the gate gave.
        slots: who sits where; None for a gate that mixes.

    >>> Kept._fields
    ('x', 'routed', 'slots')
    """

    x: Float[Array, "B T D"]
    routed: Routed
    slots: Slots | None


def prepare(
    params: dict[str, Any],
    x: Float[Array, "B T D"],
    spec: MoESpec,
    plan: LayerPlan = ONE,
    *,
    axes: Axes = HERE,
    key: jax.Array | None = None,
) -> tuple[Float[Array, "E C D"], Kept]:
    """Run the half of a layer before its experts: hook, gate, slots, order.

    Args:
        params: as in `apply`, as are the others; the experts' are not used.

    Returns:
        The slots' rows, and what `finish` needs.

    >>> from jaxsys.moe.experts import swiglu
    >>> from jaxsys.moe.gates import noisy_top_k
    >>> from jaxsys.moe.order import sparse_order
    >>> spec = MoESpec(noisy_top_k(2), sparse_order(), swiglu())
    >>> params = init(jax.random.key(0), spec, Dims(4, 8, 3))
    >>> prepare(params, jnp.ones((1, 5, 4)), spec)[0].shape
    (3, 5, 4)
    """
    return _order(*_route(params, x, spec, axes, key), spec, plan)


def finish(
    params: dict[str, Any],
    out: Float[Array, "E C D"],
    kept: Kept,
    spec: MoESpec,
    axes: Axes = HERE,
) -> tuple[Float[Array, "B T D"], Info]:
    """Run the half of a layer after its experts: inverse order, shared experts, hook.

    Args:
        params: as in `apply`; the experts' are not used.
        out: what the experts made of the slots' rows.
        kept: from `prepare`.
        spec: the layer's parts.
        axes: of the mesh around.

    Returns:
        As `apply`.

    >>> from jaxsys.moe.experts import swiglu
    >>> from jaxsys.moe.gates import noisy_top_k
    >>> from jaxsys.moe.order import sparse_order
    >>> spec = MoESpec(noisy_top_k(2), sparse_order(), swiglu())
    >>> params = init(jax.random.key(0), spec, Dims(4, 8, 3))
    >>> finish(params, *prepare(params, jnp.ones((1, 5, 4)), spec), spec)[0].shape
    (1, 5, 4)
    """
    return _finish(params, out, kept, out.shape[1], spec, axes)


def _route(params, x: Array, spec: MoESpec, axes: Axes, key) -> tuple[Array, Routed]:
    x = spec.hooks.before_moe_start(x)
    return x, spec.gate.route(params["gate"], x, key, axes.tokens)


def _order(x: Array, routed: Routed, spec: MoESpec, plan: LayerPlan) -> tuple[Array, Kept]:
    multiple = math.lcm(plan.forward, plan.backward)
    if isinstance(routed, Mixing):
        return mix(x, routed, multiple), Kept(x, routed, None)
    rows = rows_of(x)
    slots = _slots(routed, rows.shape[0], spec, multiple)
    return spec.order.forward(rows, slots), Kept(x, routed, slots)


def _finish(params, out: Array, kept: Kept, size: int, spec: MoESpec, axes: Axes):
    x, routed, slots = kept
    rows = rows_of(x)
    if slots is None:
        assert isinstance(routed, Mixing)
        y, dropped = unmix(out, routed), jnp.zeros(())
    else:
        y = spec.order.inverse(out, slots, rows.shape[0]).reshape(x.shape)
        dropped = _dropped(slots, rows.shape[0], axes.tokens)
    if spec.shared is not None:
        y = y + spec.shared.apply(params["shared"], rows[None]).reshape(x.shape)
    return spec.hooks.before_moe_end(y), _info(routed, dropped, size, spec, axes.tokens)


def _slots(routed: TokenChoice | ExpertChoice, n_rows: int, spec: MoESpec, multiple: int) -> Slots:
    if isinstance(routed, ExpertChoice):
        return seats(routed, n_rows, multiple)
    k, n_experts = routed.experts.shape[-1], routed.logits.shape[-1]
    size = slots_per_expert(spec.capacity, n_rows, k, n_experts, multiple)
    return fill_slots(routed, size, spec.capacity.policy)


def _is_ragged(spec: MoESpec, axes: Axes) -> bool:
    here = axes.expert is None and axes.tensor is None
    return spec.capacity.policy == "dropless" and here and spec.experts.ragged is not None


def _run_ragged(
    params: Any, rows: Array, chosen: TokenChoice, spec: MoESpec
) -> tuple[Slots, Array]:
    """Run groups of unequal sizes: one row of slots holds all choices, sorted by expert."""
    assert spec.experts.ragged is not None
    hooks = spec.hooks
    slots, sizes = fill_groups(chosen)
    sent = _through(
        hooks.before_dispatch, hooks.after_dispatch, spec.order.forward(rows, slots), hooks
    )
    out = spec.experts.ragged(params, sent[0], sizes)[None]
    return slots, _through(hooks.before_combine, hooks.after_combine, out, hooks)


def _through(before, after, x: Array, hooks) -> Array:
    if not hooks.straight_through:
        return after(before(x))
    held = jax.lax.stop_gradient(x)
    return after(before(held)) + (x - held)


def _dropped(slots: Slots, n_rows: int, axes: tuple[str, ...]) -> Array:
    if slots.places is None:  # tokens that no expert chose
        chosen = jnp.zeros(n_rows, bool).at[slots.tokens.reshape(-1)].set(True, mode="drop")
        return losses.mean_of_tokens(1.0 - chosen, axes)
    lost = slots.places >= slots.tokens.size
    return losses.mean_of_tokens(jnp.mean(lost.astype(jnp.float32), axis=-1), axes)


def _info(routed: Routed, dropped: Array, size: int, spec: MoESpec, axes: tuple[str, ...]) -> Info:
    weights = spec.losses
    found: dict[str, Array] = {}
    if isinstance(routed, Mixing):
        mass = jnp.sum(routed.combine, axis=-1).reshape(-1, routed.combine.shape[2])
        load, scores = losses.total(jnp.sum(mass, axis=0), axes), mass
        logits = routed.logits.reshape(mass.shape[0], -1)
    else:
        scores, logits = routed.scores, routed.logits
        if isinstance(routed, TokenChoice):
            load = losses.load(routed.experts, logits.shape[-1], axes)
            if weights.balance:
                found["balance"] = losses.balance(routed, axes)
            if weights.importance_load:
                found["importance_load"] = losses.importance_load(routed, axes)
        else:
            load = jnp.ones(logits.shape[-1])
    if weights.z:
        found["z"] = losses.z_loss(logits, axes)
    loss = sum((getattr(weights, name) * value for name, value in found.items()), jnp.zeros(()))
    return Info(
        loss=loss,
        losses=found,
        load=load / jnp.sum(load),
        dropped=dropped,
        capacity=size,
        entropy=losses.entropy(scores, axes),
    )
