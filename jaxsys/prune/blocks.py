"""A model as a row of blocks, so that it can be pruned with one block on the device at a time.

Any model can be described by a `Blocks`; `lm_blocks` describes those of `jaxsys.models.lm`. The
tensors stay where they are (a tree in memory, or memory maps of a checkpoint) in a flat mapping
from path to array.
"""

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxsys.core.tree import unflatten
from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import block_linears
from jaxsys.models.quantise import ROUTERS
from jaxsys.prune.stats import (
    Moments,
    Stats,
    add_gradients,
    add_inputs,
    finish,
    init_gradients,
    init_moments,
)

Tensors = Mapping[str, Any]


class Blocks(NamedTuple):
    """Describe a model block by block.

    Attributes:
        count: number of blocks.
        prefix: i to the path of block i.
        linears: i to the paths of its linear layers, relative to the block; each has a ``weight``.
        kind: i to the first block that runs by the same program.
        outside: paths of the tensors outside the blocks.
        embed: (tree of the tensors outside, tokens [B, T]) to x [B, T, D].
        run: (tree of block i, kind, x, taps) to (x, activations by tap); a tap is ``path:in``.
        loss: (tree of the tensors outside, x after the last block, tokens) to the mean next-token
            loss.
        in_out: weights are [in, out] (GPT-2's Conv1D).

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> lm_blocks(config).linears(0)[:2]
    ('self_attn.q_proj', 'self_attn.k_proj')
    """

    count: int
    prefix: Callable[[int], str]
    linears: Callable[[int], tuple[str, ...]]
    kind: Callable[[int], int]
    outside: tuple[str, ...]
    embed: Callable[[Any, Array], Array]
    run: Callable[[Any, int, Array, tuple[str, ...]], tuple[Array, Mapping[str, Array]]]
    loss: Callable[[Any, Array, Array], Array]
    in_out: bool = False


def lm_blocks(config: lm.LMConfig, skip: Sequence[str] = ROUTERS) -> Blocks:
    """Describe a model of `jaxsys.models.lm`.

    The experts of a mixture are tapped on all tokens, not only on those routed to them.

    Args:
        config: the model.
        skip: globs of weights to leave alone; by default the routers of experts.

    Returns:
        Its blocks; embedding and output matrix lie outside and are not pruned.

    >>> blocks = lm_blocks(lm.LMConfig("gpt2", 97, 32, 2, 4, 4, 8, 48, 64, rope=None))
    >>> blocks.count, blocks.in_out, blocks.kind(1)
    (2, True, 0)
    """
    layout = layout_of(config)
    prefixes = tuple(lm.layer_prefix(config, i) for i in range(config.layers))

    def linears(i: int) -> tuple[str, ...]:
        names = block_linears(layout, config, i)
        full = {name: f"{prefixes[i]}.{name}.weight" for name in names}
        return tuple(
            n for n in names if not any(fnmatch.fnmatchcase(full[n], glob) for glob in skip)
        )

    def kind(i: int) -> int:
        same = (config.window(i), config.is_sparse(i))
        return next(j for j in range(i + 1) if (config.window(j), config.is_sparse(j)) == same)

    def run(params: Any, i: int, x: Array, taps: tuple[str, ...]) -> tuple[Array, Any]:
        out, _, found = lm.block(params, config, i, x, taps=taps)
        return out, found

    def loss(outside: Any, x: Array, tokens: Array) -> Array:
        logits = lm.head(outside, config, x[:, :-1]).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    inside = tuple(f"{prefix}." for prefix in prefixes)
    return Blocks(
        count=config.layers,
        prefix=lambda i: prefixes[i],
        linears=linears,
        kind=kind,
        outside=tuple(name for name in lm.shapes(config) if not name.startswith(inside)),
        embed=lambda outside, tokens: lm.embed(outside, config, tokens),
        run=run,
        loss=loss,
        in_out=layout.in_out,
    )


def load_outside(blocks: Blocks, tensors: Tensors) -> dict[str, Any]:
    """Bring the tensors outside the blocks to the device, as a tree.

    >>> config = lm.LMConfig("llama", 9, 4, 1, 1, 1, 4, 4, 8, tied=True)
    >>> zeros = {name: np.zeros(leaf.shape) for name, leaf in lm.shapes(config).items()}
    >>> sorted(load_outside(lm_blocks(config), zeros)["model"])
    ['embed_tokens', 'norm']
    """
    return unflatten({name: jnp.asarray(tensors[name]) for name in blocks.outside})


def load_block(blocks: Blocks, tensors: Tensors, i: int) -> dict[str, Array]:
    """Bring the tensors of block i to the device, by their names inside the block.

    >>> config = lm.LMConfig("llama", 9, 4, 1, 1, 1, 4, 4, 8)
    >>> zeros = {name: np.zeros(leaf.shape) for name, leaf in lm.shapes(config).items()}
    >>> load_block(lm_blocks(config), zeros, 0)["mlp.up_proj.weight"].shape
    (4, 4)
    """
    start = f"{blocks.prefix(i)}."
    return {n[len(start) :]: jnp.asarray(tensors[n]) for n in tensors if n.startswith(start)}


def embed_all(
    blocks: Blocks, tensors: Tensors, tokens: Integer[np.ndarray, "N T"], batch: int
) -> list[Float[np.ndarray, "B T D"]]:
    """Embed all calibration sequences; the activations stay on the host, batch by batch.

    >>> config = lm.LMConfig("llama", 9, 4, 1, 1, 1, 4, 4, 8)
    >>> zeros = {name: np.zeros(leaf.shape) for name, leaf in lm.shapes(config).items()}
    >>> [x.shape for x in embed_all(lm_blocks(config), zeros, np.zeros((3, 5), int), 2)]
    [(2, 5, 4), (1, 5, 4)]
    """
    outside = load_outside(blocks, tensors)
    starts = range(0, len(tokens), batch)
    return [np.asarray(blocks.embed(outside, jnp.asarray(tokens[s : s + batch]))) for s in starts]


def run_block(
    blocks: Blocks, params: Mapping[str, Array], i: int, xs: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Send all batches through a block.

    Args:
        blocks: the model.
        params: from `load_block`.
        i: which.
        xs: activations before it.

    Returns:
        Activations after it, on the host.

    >>> config = lm.LMConfig("llama", 9, 4, 1, 1, 1, 4, 4, 8)
    >>> ones = {name: np.ones(leaf.shape, "f4") for name, leaf in lm.shapes(config).items()}
    >>> blocks = lm_blocks(config)
    >>> run_block(blocks, load_block(blocks, ones, 0), 0, [np.ones((1, 2, 4), "f4")])[0].shape
    (1, 2, 4)
    """
    tree, kind = unflatten(params), blocks.kind(i)
    return [np.asarray(blocks.run(tree, kind, jnp.asarray(x), ())[0]) for x in xs]


def block_stats(
    blocks: Blocks,
    params: Mapping[str, Array],
    i: int,
    xs: Sequence[np.ndarray],
    *,
    outer: bool = False,
) -> tuple[dict[str, Stats], list[np.ndarray]]:
    """Gather the inputs' statistics of a block's linear layers.

    Args:
        blocks: the model.
        params: from `load_block`.
        i: which.
        xs: activations before it, batch by batch.
        outer: gather H too.

    Returns:
        `Stats` by the layer's path in the block, and the activations after the block.

    >>> config = lm.LMConfig("llama", 9, 4, 1, 1, 1, 4, 4, 8)
    >>> ones = {name: np.ones(leaf.shape, "f4") for name, leaf in lm.shapes(config).items()}
    >>> blocks = lm_blocks(config)
    >>> xs = [np.ones((1, 2, 4), "f4")]
    >>> block_stats(blocks, load_block(blocks, ones, 0), 0, xs)[0]["mlp.up_proj"].X.round(3)
    Array([2., 2., 2., 2.], dtype=float32)
    """
    tree, kind = unflatten(params), blocks.kind(i)
    names = blocks.linears(i)
    taps = tuple(f"{name}:in" for name in names)
    sums: dict[str, Moments] = {}
    outputs = []
    for x in xs:
        out, found = blocks.run(tree, kind, jnp.asarray(x), taps)
        outputs.append(np.asarray(out))
        for name in names:
            inputs = found[f"{name}:in"]
            if name not in sums:
                sums[name] = init_moments(inputs.shape[-1], outer=outer)
            sums[name] = add_inputs(sums[name], inputs)
    return {name: finish(total) for name, total in sums.items()}, outputs


def dense_stats(
    blocks: Blocks,
    tensors: Tensors,
    tokens: Integer[np.ndarray, "N T"],
    *,
    outer: bool = False,
    batch: int = 1,
) -> Iterator[dict[str, Stats]]:
    """Gather the statistics of the model as it stands, block after block.

    Args:
        blocks: the model.
        tensors: by path.
        tokens: calibration sequences.
        outer: gather H too.
        batch: sequences at a time.

    Yields:
        For each block `Stats` by the layer's full path.

    >>> config = lm.LMConfig("llama", 9, 4, 2, 1, 1, 4, 4, 8)
    >>> ones = {name: np.ones(leaf.shape, "f4") for name, leaf in lm.shapes(config).items()}
    >>> found = dense_stats(lm_blocks(config), ones, np.zeros((2, 5), int))
    >>> [len(stats) for stats in found]
    [7, 7]
    """
    xs = embed_all(blocks, tensors, tokens, batch)
    for i in range(blocks.count):
        params = load_block(blocks, tensors, i)
        found, xs = block_stats(blocks, params, i, xs, outer=outer)
        yield {f"{blocks.prefix(i)}.{name}": stats for name, stats in found.items()}


def block_gradients(
    blocks: Blocks, tensors: Tensors, tokens: Integer[np.ndarray, "N T"]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Accumulate the gradients of all linear layers with one block on the device at a time.

    The same sums as `jaxsys.prune.stats.gradients`; activations between blocks are kept on the
    host, and each block is run again on the way back.

    Args:
        blocks: the model.
        tensors: by path.
        tokens: calibration sequences, taken one by one.

    Returns:
        (G, G1), [O, I] each, by the layer's full path, on the host.

    >>> config = lm.LMConfig("llama", 9, 4, 1, 1, 1, 4, 4, 8)
    >>> ones = {name: np.ones(leaf.shape, "f4") for name, leaf in lm.shapes(config).items()}
    >>> found = block_gradients(lm_blocks(config), ones, np.zeros((2, 5), int))
    >>> found["model.layers.0.mlp.down_proj"][0].shape
    (4, 4)
    """
    xs = [embed_all(blocks, tensors, tokens, 1)]
    for i in range(blocks.count):
        xs.append(run_block(blocks, load_block(blocks, tensors, i), i, xs[-1]))
    outside = load_outside(blocks, tensors)
    slope = jax.jit(jax.grad(blocks.loss, argnums=1))
    after = [
        np.asarray(slope(outside, jnp.asarray(x), jnp.asarray(row[None])))
        for x, row in zip(xs[-1], tokens, strict=True)
    ]
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    back = jax.jit(partial(_back, blocks.run), static_argnums=0, donate_argnums=2)
    for i in reversed(range(blocks.count)):
        params = load_block(blocks, tensors, i)
        chosen = {f"{name}.weight": params.pop(f"{name}.weight") for name in blocks.linears(i)}
        sums = {name: init_gradients(leaf.shape) for name, leaf in chosen.items()}
        for s, x in enumerate(xs[i]):
            dy = jnp.asarray(after[s])
            sums, dx = back(blocks.kind(i), chosen, sums, params, jnp.asarray(x), dy)
            after[s] = np.asarray(dx)
        for name, (squares, total) in sums.items():
            pair = (np.sqrt(np.asarray(squares)), np.asarray(total))
            if blocks.in_out:
                pair = (pair[0].T, pair[1].T)
            found[f"{blocks.prefix(i)}.{name.removesuffix('.weight')}"] = pair
    return found


def _back(run: Callable, kind: int, chosen: Any, sums: Any, rest: Any, x: Array, dy: Array) -> Any:
    def forward(chosen: Any, x: Array) -> Array:
        return run(unflatten(rest | chosen), kind, x, ())[0]

    _, pull = jax.vjp(forward, chosen, x)
    grads, dx = pull(dy)
    return add_gradients(sums, grads), dx
