"""Dispatch, experts and combine in chunks of the capacity axis, with two degrees.

The ranks of the expert axis hold E/W experts each, those of the tensor axis a part of each expert's
hidden width (expert-sharding parallelism, ESP). A chunk [E, c, D] goes through

    all-to-all → all-gather (tensor) → experts → reduce-scatter (tensor) → all-to-all

and chunks do not depend on one another, so one's communication can hide behind another's products.
The backward pass runs the same five steps on gradients, in a number of chunks of its own: with
degrees r_f and r_b a step has 2·(r_f + r_b) all-to-alls and r_f + r_b of each of the other two.

Reference: FSMoE, arXiv 2501.10714, sections 3 and 4.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.core.mesh import vary
from jaxsys.moe.contract import Axes, LayerPlan, MoESpec, unchanged
from jaxsys.moe.dispatch import axis_size

Between = Callable[[Any], Any]


class Saved(NamedTuple):
    """What a forward pass keeps for its backward pass.

    Attributes:
        params: the experts'.
        rows: what they read, [E/W, ranks, C, D], so that it can be cut into other chunks; None
            where ``pullbacks`` are kept.
        pullbacks: of each chunk's experts where both degrees are equal, else None: then experts
            are run again.

    >>> Saved._fields
    ('params', 'rows', 'pullbacks')
    """

    params: Any
    rows: Array | None
    pullbacks: tuple[Any, ...] | None


def pipelined(
    params: Any,
    buffer: Float[Array, "E C D"],
    spec: MoESpec,
    plan: LayerPlan,
    axes: Axes,
    *,
    serial: bool = False,
) -> Float[Array, "E C D"]:
    """Run the experts of all ranks on this rank's slots, in chunks.

    Hooks that are not `straight_through` are differentiated as they are, chunk by chunk, which
    needs equal degrees.

    Args:
        params: of this rank's experts, as `Experts.init` makes them: E/W in front, and of the
            hidden width this rank's part. A leaf without a hidden axis is added to the output;
            each rank of the tensor axis adds its share.
        buffer: this rank's slots for all experts.
        spec: its dispatch, combine, experts and inner hooks are used.
        plan: the degrees.
        axes: mesh axes of the `jax.shard_map` around; none on a single device.
        serial: let no chunk begin before the one before has ended: a control, to tell the gain of
            overlapping from the cost of cutting.

    Returns:
        The experts' outputs, in the slots' places.

    Raises:
        UserError: if a degree does not divide C, or an axis is not in the mesh.

    >>> from jaxsys.moe.contract import Experts, Gate, Order
    >>> double = Experts(None, lambda p, rows: p["w"] * rows, None, {"w": None}, 1)
    >>> spec = MoESpec(Gate(None, None, 1), Order(None, None), double)
    >>> w = {"w": jnp.full((2, 1, 1), 2.0)}
    >>> pipelined(w, jnp.ones((2, 4, 1)), spec, LayerPlan(4, 2), Axes()).sum().item()
    16.0
    """
    check_degrees(plan, buffer.shape[1])
    for name in axes.tokens:
        axis_size(name)
    params, buffer = vary((params, buffer), axes.tokens)
    hooks = spec.hooks
    inner = (hooks.before_dispatch, hooks.after_dispatch, hooks.before_combine, hooks.after_combine)
    if any(hook is not unchanged for hook in inner) and not hooks.straight_through:
        if plan.forward != plan.backward:
            raise UserError(
                f"the pipeline degrees are {plan.forward} and {plan.backward} around hooks that "
                "are not straight-through; expected equal ones; change the plan, or set "
                "straight_through"
            )
        return forward(params, buffer, spec, plan, axes, serial=serial)[0]

    @jax.custom_vjp
    def run(params: Any, buffer: Array) -> Array:
        return forward(params, buffer, spec, plan, axes, serial=serial)[0]

    run.defvjp(
        lambda params, buffer: forward(params, buffer, spec, plan, axes, serial=serial),
        lambda saved, dy: backward(saved, dy, spec, plan, axes, serial=serial)[:2],
    )
    return run(params, buffer)


def check_degrees(plan: LayerPlan, capacity: int) -> None:
    """Refuse degrees that do not divide the capacity.

    Raises:
        UserError: naming the next capacity that would do.

    >>> check_degrees(LayerPlan(4, 2), 6)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: capacity 6 cannot be cut into 4 and 2 equal chunks; ...
    """
    both = math.lcm(plan.forward, plan.backward)
    if capacity % both:
        raise UserError(
            f"capacity {capacity} cannot be cut into {plan.forward} and {plan.backward} equal "
            f"chunks; expected a multiple of {both}; pad it to {-(-capacity // both) * both} or "
            "change the plan"
        )


def forward(
    params: Any,
    buffer: Float[Array, "E C D"],
    spec: MoESpec,
    plan: LayerPlan,
    axes: Axes,
    *,
    serial: bool = False,
) -> tuple[Float[Array, "E C D"], Saved]:
    """Run the r_f chunks of a forward pass and keep what `backward` needs.

    Args:
        params: as in `pipelined`, as are the others; all marked as varying (`core.mesh.vary`).

    Returns:
        The outputs, and what to keep.

    >>> from jaxsys.moe.contract import Experts, Gate, Order
    >>> double = Experts(None, lambda p, rows: p["w"] * rows, None, {"w": None}, 1)
    >>> spec = MoESpec(Gate(None, None, 1), Order(None, None), double)
    >>> w = {"w": jnp.full((2, 1, 1), 2.0)}
    >>> _, saved = forward(w, jnp.ones((2, 4, 1)), spec, LayerPlan(4, 2), Axes())
    >>> saved.rows.shape
    (2, 1, 4, 1)
    """
    hooks, keep = spec.hooks, plan.forward == plan.backward
    rows, outs, pullbacks, done = [], [], [], []
    for chunk in jnp.split(buffer, plan.forward, axis=1):
        if serial and rows:
            chunk, _ = lax.optimization_barrier((chunk, done[-1]))
        moved = spec.dispatch(hooks.before_dispatch(chunk), axes)
        rows.append(_gathered(hooks.after_dispatch(moved), axes))
        if serial:
            outs.append(_experts(spec, axes, params, rows[-1], pullbacks if keep else None))
            done.append(_returned(outs[-1], spec, axes))
    if not serial:
        outs = [_experts(spec, axes, params, r, pullbacks if keep else None) for r in rows]
        done = [_returned(out, spec, axes) for out in outs]
    y = jnp.concatenate(done, axis=1)
    if keep:
        return y, Saved(params, None, tuple(pullbacks))
    slots = buffer.shape[1] // plan.forward
    cut = [r.reshape(r.shape[0], -1, slots, r.shape[-1]) for r in rows]
    return y, Saved(params, jnp.concatenate(cut, axis=2), None)


def backward(
    saved: Saved,
    dy: Float[Array, "E C D"],
    spec: MoESpec,
    plan: LayerPlan,
    axes: Axes,
    *,
    between: tuple[Between, Any] | None = None,
    serial: bool = False,
) -> tuple[Any, Float[Array, "E C D"], Any]:
    """Run the r_b chunks of a backward pass.

    Args:
        saved: from `forward`.
        dy: gradient of the outputs.
        spec: as there, as are plan and axes.
        between: a collective and its operand, to run when the dispatches are done and before the
            combines start: there the link between nodes waits for the experts.
        serial: see `pipelined`.

    Returns:
        Gradients of the parameters (of this rank's slots and those gathered, not summed over the
        data axis) and of the buffer, and what ``between`` gave.

    >>> from jaxsys.moe.contract import Experts, Gate, Order
    >>> double = Experts(None, lambda p, rows: p["w"] * rows, None, {"w": None}, 1)
    >>> spec = MoESpec(Gate(None, None, 1), Order(None, None), double)
    >>> w, plan = {"w": jnp.full((2, 1, 1), 2.0)}, LayerPlan(4, 2)
    >>> _, saved = forward(w, jnp.ones((2, 4, 1)), spec, plan, Axes())
    >>> dw, dx, _ = backward(saved, jnp.ones((2, 4, 1)), spec, plan, Axes())
    >>> dw["w"].ravel().tolist(), dx.sum().item()
    ([4.0, 4.0], 16.0)
    """
    pullbacks = saved.pullbacks
    if pullbacks is None:
        assert saved.rows is not None
        read = jnp.split(saved.rows, plan.backward, axis=2)
        flat = [r.reshape(r.shape[0], -1, r.shape[-1]) for r in read]
    else:
        flat = [None] * plan.backward

    def experts(g: Array, j: int) -> tuple[Any, Array]:
        if pullbacks is not None:
            return pullbacks[j](g)
        return jax.vjp(lambda p, r: _apply(spec, axes, p, r), saved.params, flat[j])[1](g)

    # The transpose of a combine is a dispatch, of a reduce-scatter an all-gather, and vice versa.
    grads, done, found = [], [], None
    sent: list[Array] = []
    for g in jnp.split(dy, plan.backward, axis=1):
        if serial and done:
            g, _ = lax.optimization_barrier((g, done[-1]))
        sent.append(_gathered(spec.dispatch(g, axes), axes))
        if serial:
            grads.append(experts(sent[-1], len(grads)))
            done.append(spec.combine(_scattered(grads[-1][1], axes), axes))
    if between is not None:
        run, operand = between
        operand, sent[-1] = lax.optimization_barrier((operand, sent[-1]))
        found = run(operand)
    if not serial:
        grads = [experts(g, j) for j, g in enumerate(sent)]
        rows = [_scattered(dr, axes) for _, dr in grads]
        if between is not None:
            # The sums themselves go around the barrier, which would forget that all ranks agree.
            _, rows[0] = lax.optimization_barrier((found, rows[0]))
        done = [spec.combine(r, axes) for r in rows]
    summed = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *[dp for dp, _ in grads])
    return summed, jnp.concatenate(done, axis=1), found


def _gathered(rows: Array, axes: Axes) -> Array:
    if axes.tensor is None:
        return rows
    return lax.all_gather(rows, axes.tensor, axis=1, tiled=True)


def _scattered(parts: Array, axes: Axes) -> Array:
    if axes.tensor is None:
        return parts
    return lax.psum_scatter(parts, axes.tensor, scatter_dimension=1, tiled=True)


def _apply(spec: MoESpec, axes: Axes, params: Any, rows: Array) -> Array:
    if axes.tensor is not None:
        share = 1.0 / axis_size(axes.tensor)
        params = {
            name: leaf if spec.experts.hidden_axis[name] is not None else leaf * share
            for name, leaf in params.items()
        }
    return spec.experts.apply(params, rows)


def _experts(spec: MoESpec, axes: Axes, params: Any, rows: Array, keep: list | None) -> Array:
    if keep is None:
        return _apply(spec, axes, params, rows)
    out, pullback = jax.vjp(lambda p, r: _apply(spec, axes, p, r), params, rows)
    keep.append(pullback)
    return out


def _returned(out: Array, spec: MoESpec, axes: Axes) -> Array:
    moved = spec.combine(spec.hooks.before_combine(_scattered(out, axes)), axes)
    return spec.hooks.after_combine(moved)
