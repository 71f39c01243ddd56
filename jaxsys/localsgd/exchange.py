"""The pieces of a synchronisation: messages, their mean, and how a layer takes it over.

Axis letters: `R` replicas, `L` layers in backward order.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsys.core import tree
from jaxsys.core.mesh import REPLICA
from jaxsys.core.tree import Layer
from jaxsys.localsgd.codec import mean_over
from jaxsys.localsgd.strategy import Strategy


def messages(strategy: Strategy, send: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Group the layers of a step into messages: one each, or one in all when sent afterwards.

    >>> messages(Strategy(), (0, 1)), messages(Strategy(schedule="full", launch="after"), (0, 1))
    (((0,), (1,)), ((0, 1),))
    """
    if strategy.launch == "after":
        return (tuple(send),) if send else ()
    return tuple((i,) for i in send)


def join(leaves: Sequence[Any], layers: Sequence[Layer]) -> jax.Array:
    """Lay the leaves of some layers end to end as one vector, which is one message.

    >>> join([jnp.ones((2, 2)), jnp.zeros(3)], [Layer("all", (1, 0))]).shape
    (7,)
    """
    return jnp.concatenate([jnp.ravel(leaves[i]) for layer in layers for i in layer.leaves])


def split(vector: jax.Array, leaves: Sequence[Any], layers: Sequence[Layer]) -> dict[int, Any]:
    """Cut a message back into leaves, the inverse of `join`.

    >>> sorted(split(jnp.ones(7), [jnp.ones((2, 2)), jnp.zeros(3)], [Layer("all", (1, 0))]))
    [0, 1]
    """
    out, offset = {}, 0
    for layer in layers:
        for i in layer.leaves:
            out[i] = vector[offset : offset + leaves[i].size].reshape(leaves[i].shape)
            out[i] = out[i].astype(leaves[i].dtype)
            offset += leaves[i].size
    return out


def gather(vectors: Sequence[jax.Array], group: Sequence[int]) -> jax.Array | None:
    """Lay the flat vectors of a message's layers end to end; None where none are kept.

    >>> gather([jnp.ones(1), jnp.zeros(2)], (1, 0)).tolist(), gather((), (0,))
    ([0.0, 0.0, 1.0], None)
    """
    return jnp.concatenate([vectors[i] for i in group]) if vectors else None


def exchange(
    message: jax.Array,
    anchor: jax.Array | None,
    residual: jax.Array | None,
    key: jax.Array,
    *,
    codec: str,
    axis_name: str,
) -> tuple[jax.Array, jax.Array | None]:
    """Average one message over the replicas.

    With an anchor a, the change a - x is what travels: mean(x) = a - mean(Q(a - x + e)), where Q is
    the codec and e what it lost last time.

    Args:
      message: the replica's vector x, [n].
      anchor: the vector last agreed on, or None to send x itself.
      residual: e, or None without error feedback.
      key: random key, equal on all replicas.
      codec: form on the wire, see `jaxsys.localsgd.codec`.
      axis_name: the replica axis.

    Returns:
      The mean, equal on all replicas, and the new e.

    >>> f = lambda x: exchange(x, None, None, jax.random.key(0), codec="f32", axis_name="r")[0]
    >>> jax.vmap(f, axis_name="r")(jnp.array([[1.0], [3.0]])).tolist()
    [[2.0], [2.0]]
    """
    value = message if anchor is None else anchor - message
    if residual is not None:
        value = value + residual
    mean, sent = mean_over(axis_name, value, codec, key)
    lost = None if residual is None else value - sent
    return (mean if anchor is None else anchor - mean), lost


def message_key(key_data: jax.Array, step: Any, group: Sequence[int]) -> jax.Array:
    """Derive the random key of one message, the same whichever driver runs the step.

    >>> k = jax.random.key_data(jax.random.key(0))
    >>> bool((message_key(k, 3, (0,)) == message_key(k, 3, (0, 1))).all())
    True
    """
    key = jax.random.wrap_key_data(key_data)
    return jax.random.fold_in(jax.random.fold_in(key, step), group[0])


def agree(
    mean: jax.Array, anchor: jax.Array | None, outer_state: Any, strategy: Strategy
) -> tuple[jax.Array, Any]:
    """Turn an averaged layer into the agreed one: by itself, or through the outer optimiser.

    DiLoCo (2311.08105): a' = a + OuterOpt(a - mean(x)).

    >>> agree(jnp.ones(2), None, (), Strategy())[0].tolist()
    [1.0, 1.0]
    """
    outer = strategy.outer_optimizer()
    if outer is None or anchor is None:
        return mean, outer_state
    updates, outer_state = outer.update(anchor - mean, outer_state, anchor)
    return optax.apply_updates(anchor, updates), outer_state  # pyright: ignore[reportReturnType]


def blend(agreed: Any, params: Any, updates: Any, strategy: Strategy) -> Any:
    """Put an agreed leaf in place by the update rule.

    ``pre``: w' = (1 - m) agreed + m w - U;  ``post``: w' = (1 - m) agreed + m (w - U), with m the
    mixing share. ``updates`` already carries its sign, as in optax.

    >>> float(blend(1.0, 3.0, -0.5, Strategy()))
    0.5
    """
    own = params if strategy.rule == "pre" else params + updates
    value = agreed if strategy.mixing == 0.0 else _mix(agreed, own, strategy.mixing)
    return value + updates if strategy.rule == "pre" else value


def _mix(agreed: Any, own: Any, share: float) -> Any:
    return (1.0 - share) * agreed + share * own


def divergence(
    params: Any, layers: Sequence[Layer], axis_name: str = REPLICA, sample: int | None = None
) -> jax.Array:
    """Measure how far the replicas have drifted apart, per layer.

    Γ_l = sqrt(mean_k ||x̄_l - x_l^k||² / n_l). The released code takes rank 0's term only; the mean
    over replicas has the same expectation and less noise.

    Args:
      params: this replica's parameters.
      layers: layers in backward order.
      axis_name: the replica axis.
      sample: estimate from about that many evenly spaced elements of each layer, to send less.

    Returns:
      Γ, [L], equal on all replicas.

    Reference: DreamDDP, arXiv 2502.11058 (the divergence Γ_r).

    >>> f = lambda w: divergence({"w": w}, [Layer("w", (0,))])
    >>> jax.vmap(f, axis_name="replica")(jnp.array([[1.0], [3.0]]))[0].tolist()
    [1.0]
    """
    leaves = jax.tree.leaves(params)

    def one(layer: Layer) -> jax.Array:
        x = join(leaves, [layer]).astype(jnp.float32)
        if sample is not None:
            x = x[:: max(1, x.size // sample)]
        return jnp.mean(jnp.square(jax.lax.pmean(x, axis_name) - x))

    return jnp.sqrt(jax.lax.pmean(jnp.stack([one(layer) for layer in layers]), axis_name))


def average_moments(opt_state: Any, globs: Sequence[str], axis_name: str) -> Any:
    """Average the optimiser moments whose paths match (DES-LOC, arXiv 2505.22549).

    >>> f = lambda m: average_moments({"mu": m, "nu": m}, ("mu",), "r")
    >>> jax.vmap(f, axis_name="r")(jnp.array([1.0, 3.0]))["mu"].tolist()
    [2.0, 2.0]
    """
    leaves, treedef = jax.tree.flatten(opt_state)
    names = tree.paths(opt_state)
    for glob in globs:
        for i in tree.match(names, glob):
            leaves[i] = jax.lax.pmean(leaves[i], axis_name).astype(leaves[i].dtype)
    return jax.tree.unflatten(treedef, leaves)
