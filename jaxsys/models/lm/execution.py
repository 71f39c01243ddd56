"""How the blocks of a model are run in training: what is kept, which attention, scanned or not.

None of it changes what is computed. A tree whose blocks are stacked (`stack`) is scanned: one block
is compiled, whatever the depth.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.models.lm.attention import Fused, place
from jaxsys.models.lm.blocks import default_positions, run_block
from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import join, subtree

Params = Mapping[str, Any]
STACKED = "stacked"  # stands where the numbers of the blocks stood
_POLICIES = jax.checkpoint_policies
POLICIES = {
    "full": _POLICIES.nothing_saveable,
    "dots": _POLICIES.dots_saveable,
    "weight_dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "host_dots": _POLICIES.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


@dataclass(frozen=True)
class Execution:
    """Say how blocks are run; hashable, so static under jit.

    Attributes:
        attention: ``plain``, by ``blocks`` of queries (fewer scores, more to compile), or JAX's own
            operation by ``xla`` or ``cudnn`` (FlashAttention).
        recompute: what the backward pass finds: ``none``: everything was kept; ``full``: only what
            each block reads; ``dots``: also the products; ``weight_dots``: of these only the ones
            with weights, not scores and their product with values; ``host_dots``: those, in host
            memory.
        weights_at: where a block's weights are brought before their use, for weights that rest
            split over devices or in host memory; they are brought again for the backward pass
            unless ``recompute`` is ``none``.

    Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174) for
    recomputing.

    >>> Execution(recompute="full").attention
    'plain'
    """

    attention: Literal["plain", "blocks", "xla", "cudnn"] = "plain"
    recompute: Literal["none", "full", "dots", "weight_dots", "host_dots"] = "none"
    weights_at: NamedSharding | None = None


PLAIN = Execution()


def bring(tree: Any, where: NamedSharding | None) -> Any:
    """Bring weights to where they are used: gather them, or copy them from the host.

    Args:
        tree: arrays, inside jit.
        where: the place; None leaves them.

    Returns:
        The same values there; their gradient goes back the same way.

    >>> bring({"w": jnp.ones(2)}, None)["w"].tolist()
    [1.0, 1.0]
    """
    if where is None:
        return tree
    if where.memory_kind is not None:  # copied between memories, and the gradient back
        tree = jax.device_put(tree, where)
    return jax.lax.with_sharding_constraint(tree, where)


def run_blocks(
    params: Params,
    config: LMConfig,
    x: Float[Array, "B T D"],
    execution: Execution = PLAIN,
) -> Float[Array, "B T D"]:
    """Run all blocks on whole sequences, without cache or taps.

    Args:
        params: the whole model; stacked blocks are scanned.
        config: the model.
        x: residual stream before the first block.
        execution: how.

    Returns:
        The residual stream after the last block.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params, x = init(jax.random.key(0), config), jnp.ones((1, 3, 32))
    >>> plain = run_blocks(params, config, x)
    >>> scanned = run_blocks(stack(params, config), config, x, Execution(recompute="full"))
    >>> bool(jnp.allclose(plain, scanned, atol=1e-5))
    True
    """
    positions = default_positions(x[..., 0])
    windows = {config.window(i) for i in range(config.layers)}
    places = {window: place(config, positions, window=window) for window in windows}
    blocks = subtree(params, join(config.prefix, layout_of(config).blocks))
    if STACKED in blocks:
        one = _one_block(config, 0, places, execution)
        return jax.lax.scan(lambda x, own: (one(own, x), None), x, blocks[STACKED])[0]
    for i in range(config.layers):
        x = _one_block(config, i, places, execution)(blocks[str(i)], x)
    return x


def _one_block(config: LMConfig, i: int, places: Mapping[int, Any], execution: Execution):
    window = config.window(i)
    kind = execution.attention
    fused = None if kind == "plain" else Fused(kind, window)
    run = partial(run_block, config=config, sparse=config.is_sparse(i), fused=fused)

    def one(own: Any, x: Array) -> Array:
        return run(bring(own, execution.weights_at), x, places[window])[0]

    if execution.recompute == "none":
        return one
    return jax.checkpoint(one, policy=POLICIES[execution.recompute])


def why_not_stacked(config: LMConfig) -> str | None:
    """Say why a model's blocks cannot be scanned, or None where they can.

    >>> why_not_stacked(LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)) is None
    True
    """
    kinds = {(config.window(i), config.is_sparse(i)) for i in range(config.layers)}
    if len(kinds) == 1:
        return None
    return "its blocks differ (sliding windows, or dense blocks among mixtures)"


def stack(params: Params, config: LMConfig) -> dict[str, Any]:
    """Stack the blocks' tensors along a new first axis L, so that `run_blocks` scans them.

    Args:
        params: the whole model, also with quantised weights or adapters in it; arrays or, in
            `jax.eval_shape`, abstract.
        config: the model.

    Returns:
        The tree with ``…layers.stacked.…`` in the place of ``…layers.0.…`` and the rest.

    Raises:
        UserError: for a model whose blocks differ.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> tree = stack(init(jax.random.key(0), config), config)
    >>> tree["model"]["layers"]["stacked"]["mlp"]["up_proj"]["weight"].shape
    (2, 48, 32)
    """
    reason = why_not_stacked(config)
    if reason:
        raise UserError(
            f"the blocks of this {config.model_type} model cannot be stacked: {reason}; expected "
            "blocks that are all alike; run them one by one"
        )
    path = join(config.prefix, layout_of(config).blocks)
    blocks = subtree(params, path)
    ordered = [blocks[str(i)] for i in range(config.layers)]
    return _replaced(params, path, {STACKED: jax.tree.map(lambda *xs: jnp.stack(xs), *ordered)})


def unstack(params: Params, config: LMConfig) -> dict[str, Any]:
    """Part stacked blocks again, the inverse of `stack`.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params = init(jax.random.key(0), config)
    >>> list(unstack(stack(params, config), config)["model"]["layers"])
    ['0', '1']
    """
    path = join(config.prefix, layout_of(config).blocks)
    stacked = subtree(params, path)[STACKED]
    blocks = {str(i): jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(config.layers)}
    return _replaced(params, path, blocks)


def _replaced(tree: Params, path: str, node: Any) -> dict[str, Any]:
    first, _, rest = path.partition(".")
    return {**tree, first: _replaced(tree[first], rest, node) if rest else node}
