"""The backward pass as an explicit loop, with gradient all-reduce in the gaps between all-to-alls.

While experts compute, the link between nodes has nothing to do: the dispatches are done and the
combines wait. The gradients of dense parameters that later layers have finished are reduced there,
in slices whose sizes a plan gives, and what is left is reduced at the end. The sums are those of
``jax.grad`` and one all-reduce; only when they are formed differs.

Reference: FSMoE, arXiv 2501.10714, section 5.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.core.mesh import replicated_over, vary
from jaxsys.moe.contract import Axes, LayerPlan, MoEPlan, MoESpec
from jaxsys.moe.pipelined import Saved, backward, forward, pipelined


class Stages(NamedTuple):
    """A model cut at its experts; i counts the mixture layers.

    Losses are this rank's shares: their sum over all ranks is what is minimised.

    Attributes:
        first: ``(first params, batch) -> x``, up to the first layer that `before` takes.
        before: ``(i, dense params, x) -> (buffer [E, C, D], kept)``: all from the last experts to
            these; ``kept`` is any tree.
        after: ``(i, dense params, y [E, C, D], kept) -> (x, loss, told)``: ``told`` is diagnostics.
        last: ``(last params, first params, x, batch) -> loss``: the first ones for a tied head.

    >>> Stages._fields
    ('first', 'before', 'after', 'last')
    """

    first: Callable[..., Any]
    before: Callable[..., Any]
    after: Callable[..., Any]
    last: Callable[..., Any]


class Parts(NamedTuple):
    """The parameters of a model cut at its experts, or their gradients.

    Attributes:
        first: of what comes before the first layer.
        dense: of each layer's `before` and `after`; equal on all ranks.
        experts: of each layer's experts, as `pipelined` takes them.
        last: of what comes after the last layer.

    >>> Parts(0, (1,), (2,), 3).experts
    (2,)
    """

    first: Any
    dense: tuple[Any, ...]
    experts: tuple[Any, ...]
    last: Any


def check_layers(plan: MoEPlan, layers: int) -> tuple[LayerPlan, ...]:
    """Give one plan to each layer: the plan's own, or its only one to all.

    Raises:
        UserError: if it has another number of layers.

    >>> len(check_layers(MoEPlan(), 3))
    3
    """
    if len(plan.layers) not in (1, layers):
        raise UserError(
            f"the plan has {len(plan.layers)} layers and the model {layers}; expected one plan for "
            "each layer, or one for all; plan this model again"
        )
    return plan.layers * (layers if len(plan.layers) == 1 else 1)


def loss_of(
    stages: Stages, parts: Parts, batch: Any, spec: MoESpec, plan: MoEPlan, axes: Axes
) -> tuple[Float[Array, ""], tuple[Any, ...]]:
    """Run the model forward, for `jax.grad`.

    Args:
        stages: the model.
        parts: its parameters.
        batch: what the first and the last part read.
        spec: of all mixture layers.
        plan: their degrees.
        axes: of the mesh.

    Returns:
        This rank's share of the loss, and what each layer told.

    >>> stages = Stages(lambda p, b: p * b, lambda i, p, x: (x, None),
    ...                 lambda i, p, y, kept: (y + p, 0.0, None), lambda p, first, x, b: x.sum())
    >>> parts = Parts(jnp.ones(()), (), (), None)
    >>> from jaxsys.moe.contract import Experts, Gate, Order
    >>> spec = MoESpec(Gate(None, None, 1), Order(None, None), Experts(None, None, None, {}, 2))
    >>> loss_of(stages, parts, jnp.ones(3), spec, MoEPlan(()), Axes())[0].item()
    3.0
    """
    x, shares, told = stages.first(parts.first, batch), [], []
    plans = check_layers(plan, len(parts.dense))
    for i, (dense, experts) in enumerate(zip(parts.dense, parts.experts, strict=True)):
        buffer, kept = stages.before(i, dense, x)
        y = pipelined(experts, buffer, spec, plans[i], axes)
        x, share, tell = stages.after(i, dense, y, kept)
        shares.append(share)
        told.append(tell)
    return sum(shares, stages.last(parts.last, parts.first, x, batch)), tuple(told)


def value_and_grad(
    stages: Stages, parts: Parts, batch: Any, spec: MoESpec, plan: MoEPlan, axes: Axes
) -> tuple[Float[Array, ""], Parts, tuple[Any, ...]]:
    """Compute the loss and its gradients, reducing dense gradients between all-to-alls.

    Layer i's backward pass takes ``plan.layers[i].gradient_bytes`` from the front of the queue of
    finished gradients (at most what is there) and sums them over ``axes.tokens`` after its
    dispatches and before its combines.

    Args:
        stages: the model.
        parts: its parameters.
        batch: what the first and the last part read.
        spec: of all mixture layers; their inner hooks must be straight-through.
        plan: degrees, and bytes of gradient for each gap.
        axes: of the mesh.

    Returns:
        The loss summed over all ranks, the gradients as `jax.grad` gives them, and what each
        layer told.

    Raises:
        UserError: for a plan of another model, or dense parameters that are not equal on all ranks.

    >>> stages = Stages(lambda p, b: p * b, lambda i, p, x: (x, None),
    ...                 lambda i, p, y, kept: (y + p, 0.0, None), lambda p, first, x, b: x.sum())
    >>> parts = Parts(jnp.ones(()), (), (), None)
    >>> from jaxsys.moe.contract import Experts, Gate, Order
    >>> spec = MoESpec(Gate(None, None, 1), Order(None, None), Experts(None, None, None, {}, 2))
    >>> value_and_grad(stages, parts, jnp.ones(3), spec, MoEPlan(()), Axes())[1].first.item()
    3.0
    """
    plans = check_layers(plan, len(parts.dense))
    for leaf in jax.tree.leaves(parts.dense):
        if replicated_over(leaf, axes.tokens) != axes.tokens:
            raise UserError(
                "dense parameters differ between ranks; expected them on every rank, with experts "
                "alone sharded; correct the in_specs of jax.shard_map"
            )
    own = vary(parts, axes.tokens)  # gradients of this rank alone, to be summed by hand
    x, pull_first = jax.vjp(lambda p: stages.first(p, batch), own.first)
    tapes, loss, told = [], jnp.zeros(()), []
    for i, plan_i in enumerate(plans):
        x, tape = _forward(stages, i, own, x, spec, plan_i, axes)
        loss, told = loss + tape.share, [*told, tape.told]
        tapes.append(tape)
    end, pull_last = jax.vjp(lambda p, q, x: stages.last(p, q, x, batch), own.last, own.first, x)
    one = vary(jnp.ones_like(end), axes.tokens)
    d_last, d_first, dx = pull_last(one)
    queue = _Queue(axes.tokens, jnp.result_type(*jax.tree.leaves(parts.dense), jnp.bfloat16))
    d_experts: list[Any] = [None] * len(tapes)
    for i in reversed(range(len(tapes))):
        d_after, dy, d_kept = tapes[i].pull_after((dx, one))
        cut = queue.take(plans[i].gradient_bytes)
        between = None if cut is None else (queue.reduce, cut)
        d_experts[i], d_buffer, sums = backward(
            tapes[i].saved, dy, spec, plans[i], axes, between=between
        )
        queue.reduced(sums)
        d_before, dx = tapes[i].pull_before((d_buffer, d_kept))
        queue.put(jax.tree.map(jnp.add, d_after, d_before))
    d_first = jax.tree.map(jnp.add, d_first, pull_first(dx)[0])
    dense = queue.flush(parts.dense)
    ends = _sum_replicas((d_first, d_last, tuple(d_experts)), parts, axes)
    total = lax.psum(loss + end, axes.tokens) if axes.tokens else loss + end
    return total, Parts(ends[0], dense, ends[2], ends[1]), tuple(told)


class _Tape(NamedTuple):
    share: Array
    told: Any
    saved: Saved
    pull_before: Callable[..., Any]
    pull_after: Callable[..., Any]


def _forward(stages, i, own: Parts, x, spec, plan: LayerPlan, axes: Axes) -> tuple[Any, _Tape]:
    (buffer, kept), pull_before = jax.vjp(lambda p, x: stages.before(i, p, x), own.dense[i], x)
    y, saved = forward(own.experts[i], buffer, spec, plan, axes)

    def after(p: Any, y: Array, kept: Any) -> tuple[Any, Any]:
        x, share, told = stages.after(i, p, y, kept)
        return (x, vary(jnp.asarray(share), axes.tokens)), told

    (x, share), pull_after, told = jax.vjp(after, own.dense[i], y, kept, has_aux=True)
    return x, _Tape(share, told, saved, pull_before, pull_after)


def _sum_replicas(grads: tuple[Any, Any, Any], parts: Parts, axes: Axes) -> tuple[Any, Any, Any]:
    """Sum gradients over the axes on which their parameters are equal."""

    def total(leaf: Any, grad: Array) -> Array:
        missing = replicated_over(leaf, axes.tokens)
        return lax.psum(grad, missing) if missing else grad

    return jax.tree.map(total, (parts.first, parts.last, parts.experts), grads)


class _Queue:
    """Dense gradients end to end, those of the last layer first: some reduced, the rest not."""

    def __init__(self, names: Sequence[str], dtype: Any) -> None:
        self._names, self._dtype = tuple(names), dtype
        self._waiting: list[Array] = []
        self._reduced: list[Array] = []

    def put(self, grads: Any) -> None:
        self._waiting += [g.astype(self._dtype).reshape(-1) for g in jax.tree.leaves(grads)]

    def take(self, n_bytes: int) -> Array | None:
        """Take from the front; None if that is nothing."""
        count, cut = n_bytes // self._dtype.itemsize, []
        while count > 0 and self._waiting:
            head = self._waiting.pop(0)
            cut.append(head[:count])
            if head.size > count:
                self._waiting.insert(0, head[count:])
            count -= cut[-1].size
        return jnp.concatenate(cut) if cut else None

    def reduce(self, vector: Array) -> Array:
        return lax.psum(vector, self._names) if self._names else vector

    def reduced(self, vector: Array | None) -> None:
        if vector is not None:
            self._reduced.append(vector)

    def flush(self, like: tuple[Any, ...]) -> tuple[Any, ...]:
        """Reduce what is left and cut everything into gradients like the parameters."""
        if self._waiting:
            self._reduced.append(self.reduce(jnp.concatenate(self._waiting)))
        vector = jnp.concatenate(self._reduced) if self._reduced else jnp.zeros(0, self._dtype)
        grads: list[Any] = [None] * len(like)
        start = 0
        for i in reversed(range(len(like))):
            leaves, treedef = jax.tree.flatten(like[i])
            found = []
            for leaf in leaves:
                part = vector[start : start + leaf.size]
                found.append(part.reshape(leaf.shape).astype(leaf.dtype))
                start += leaf.size
            grads[i] = jax.tree.unflatten(treedef, found)
        return tuple(grads)
