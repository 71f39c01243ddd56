"""Pruning a whole model: block after block, on recomputed activations."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer

from jaxsys.core.errors import UserError
from jaxsys.core.processes import spread
from jaxsys.core.tree import unflatten
from jaxsys.prune import masks as masking
from jaxsys.prune.blocks import (
    Blocks,
    Tensors,
    block_gradients,
    block_stats,
    dense_stats,
    embed_all,
    load_block,
    run_block,
)
from jaxsys.prune.methods import Method, PrunedLinear, prune_linear
from jaxsys.prune.metrics import wanda
from jaxsys.prune.patterns import Pattern
from jaxsys.prune.plan import PrunedBlock, check_model, layer_units, put, turn
from jaxsys.prune.ratios import allocate, besa, outlier_share, owl
from jaxsys.prune.stats import Stats

Gradients = Mapping[str, tuple[np.ndarray, np.ndarray]]


def sequential(
    blocks: Blocks,
    tensors: Tensors,
    tokens: Integer[np.ndarray, "N T"],
    method: Method,
    pattern: Pattern,
    *,
    gradients: Gradients | None = None,
    batch: int = 1,
    done: Callable[[int], Mapping[str, Any] | None] = lambda i: None,
) -> Iterator[PrunedBlock]:
    """Prune block after block, each on what the pruned blocks before it put out.

    A block's statistics are those of its inputs under its own dense weights; then it is pruned and
    its outputs are computed anew. With ratios that are not uniform every layer has a count of its
    own, and together they remove ⌊sparsity · weights⌋ exactly. One block is on the device at a
    time; activations between blocks stay on the host. The processes of a job share a block's
    layers; everything else each does by itself, and all yield the same.

    Args:
        blocks: the model.
        tensors: by path; memory maps will do.
        tokens: calibration sequences.
        method: what to do.
        pattern: how much and in which form.
        gradients: from `block_gradients`, of the dense model; gathered here where the method needs
            them and they are left out.
        batch: calibration sequences at a time.
        done: i to the pruned tensors of a block that an earlier run finished, by full path, or
            None. Such a block is run but not pruned or given out again.

    Yields:
        Each block that was pruned, in order.

    Raises:
        UserError: for what does not fit, before work starts; for scores that are not finite.

    >>> import jax
    >>> from jaxsys.models import lm
    >>> from jaxsys.core.tree import flatten
    >>> from jaxsys.prune.blocks import lm_blocks
    >>> config = lm.LMConfig("llama", 9, 4, 2, 1, 1, 4, 4, 8)
    >>> params = flatten(lm.init(jax.random.key(0), config))
    >>> run = sequential(lm_blocks(config), params, np.zeros((1, 4), int), Method(), Pattern(0.5))
    >>> [found.index for found in run]
    [0, 1]
    """
    check_model(blocks, tensors, method, pattern)
    if pattern.scope == "global":
        raise UserError(
            "a global threshold needs the scores of all blocks at once, and this protocol has one "
            "block at a time; use the dense protocol"
        )
    if gradients is None and method.needs & {"G", "G1"}:
        gradients = block_gradients(blocks, tensors, tokens)
    shares = [pattern.sparsity] * blocks.count
    if method.ratios == "owl":
        shares = owl_shares(blocks, tensors, tokens, pattern.sparsity, batch=batch)
    units = layer_units(blocks, tensors, pattern)
    sizes = [sum(own.values()) for own in units]
    totals = allocate(shares, sizes, masking.n_removed(sum(sizes), pattern.sparsity))
    xs = embed_all(blocks, tensors, tokens, batch)
    for i in range(blocks.count):
        params = load_block(blocks, tensors, i)
        start = f"{blocks.prefix(i)}."
        finished = done(i)
        if finished is None:
            stats, dense = block_stats(blocks, params, i, xs, outer="H" in method.needs)
            stats = _with_gradients(blocks, i, stats, gradients)
            counts = {}
            if method.ratios != "uniform":
                rates = dict.fromkeys(units[i], totals[i] / sizes[i])
                if method.ratios == "besa":
                    rates = _besa_rates(blocks, params, i, xs, dense, stats, totals[i] / sizes[i])
                found = allocate([rates[n] for n in units[i]], list(units[i].values()), totals[i])
                counts = dict(zip(units[i], found, strict=True))
            found = _prune_block(blocks, params, i, stats, method, pattern, counts)
            finished = found.tensors
            yield found
        params |= {n.removeprefix(start): jnp.asarray(w) for n, w in finished.items()}
        if i + 1 < blocks.count:
            xs = run_block(blocks, params, i, xs)


def _with_gradients(
    blocks: Blocks, i: int, stats: Mapping[str, Stats], gradients: Gradients | None
) -> dict[str, Stats]:
    if gradients is None:
        return dict(stats)
    pairs = {name: gradients[f"{blocks.prefix(i)}.{name}"] for name in stats}
    return {
        name: found._replace(G=jnp.asarray(pairs[name][0]), G1=jnp.asarray(pairs[name][1]))
        for name, found in stats.items()
    }


def _prune_block(
    blocks: Blocks,
    params: Mapping[str, Array],
    i: int,
    stats: Mapping[str, Stats],
    method: Method,
    pattern: Pattern,
    counts: Mapping[str, int],
) -> PrunedBlock:
    def work(name: str) -> dict[str, Any]:
        begin_s = time.perf_counter()
        path = f"{blocks.prefix(i)}.{name}"
        turned = turn(params[f"{name}.weight"], blocks.in_out)
        pruned = prune_linear(turned, stats[name], method, pattern, path, counts.get(name))
        leaves: dict[str, Any] = {"weight": pruned.weight, "mask": pruned.mask}
        if pruned.permutation is not None:
            leaves["permutation"] = np.asarray(pruned.permutation, np.int32)
        return leaves | {"s": np.float32(time.perf_counter() - begin_s)}

    def like(name: str) -> dict[str, Any]:
        turned = turn(params[f"{name}.weight"], blocks.in_out)
        leaves: dict[str, Any] = {
            "weight": jax.ShapeDtypeStruct(turned.shape, turned.dtype),
            "mask": jax.ShapeDtypeStruct(turned.shape, np.bool_),
        }
        if method.permute and pattern.nm:
            leaves["permutation"] = jax.ShapeDtypeStruct(turned.shape[1:], np.int32)
        return leaves | {"s": jax.ShapeDtypeStruct((), np.float32)}

    found = PrunedBlock(i, {}, {}, {}, ())
    rows = []
    # Each layer is pruned by one process of the job.
    for name, leaves in spread(blocks.linears(i), work, like).items():
        path = f"{blocks.prefix(i)}.{name}"
        mask = jnp.asarray(leaves["mask"])
        pruned = PrunedLinear(jnp.asarray(leaves["weight"]), mask, leaves.get("permutation"))
        put(found, f"{path}.weight", pruned, blocks.in_out)
        rows.append({"layer": path, "sparsity": masking.sparsity_of(mask), "s": float(leaves["s"])})
    return found._replace(rows=tuple(rows))


def owl_shares(
    blocks: Blocks,
    tensors: Tensors,
    tokens: Integer[np.ndarray, "N T"],
    sparsity: float,
    *,
    batch: int = 1,
) -> list[float]:
    """Find OWL's sparsity of every block from the dense model's outliers.

    >>> import jax
    >>> from jaxsys.models import lm
    >>> from jaxsys.core.tree import flatten
    >>> from jaxsys.prune.blocks import lm_blocks
    >>> config = lm.LMConfig("llama", 9, 4, 2, 1, 1, 4, 4, 8)
    >>> params = flatten(lm.init(jax.random.key(0), config))
    >>> shares = owl_shares(lm_blocks(config), params, np.zeros((1, 4), int), 0.5)
    >>> round(sum(shares), 6)
    1.0
    """
    found = []
    for stats in dense_stats(blocks, tensors, tokens, batch=batch):
        scores = [
            wanda(turn(jnp.asarray(tensors[f"{path}.weight"]), blocks.in_out), own).reshape(-1)
            for path, own in stats.items()
        ]
        found.append(float(outlier_share(jnp.concatenate(scores)[None])))
    return owl(found, sparsity)


def _besa_rates(
    blocks: Blocks,
    params: Mapping[str, Array],
    i: int,
    xs: Sequence[np.ndarray],
    dense: Sequence[np.ndarray],
    stats: Mapping[str, Stats],
    sparsity: float,
    most_batches: int = 2,
) -> dict[str, float]:
    x = jnp.asarray(np.concatenate(xs[:most_batches]))
    target = jnp.asarray(np.concatenate(dense[:most_batches]))
    weights = {n: turn(params[f"{n}.weight"], blocks.in_out) for n in blocks.linears(i)}
    rest = {name: leaf for name, leaf in params.items() if name[:-7] not in weights}
    scores = {name: wanda(weight, stats[name]) for name, weight in weights.items()}
    error = _output_error(blocks.run, blocks.kind(i), blocks.in_out)
    return besa(error, weights, scores, sparsity, inputs=(rest, x, target))


@lru_cache(maxsize=8)  # the same function for equal blocks, so that BESA compiles once for all
def _output_error(run: Callable[..., Any], kind: int, in_out: bool) -> Callable[..., Array]:
    def error(masked: Mapping[str, Array], rest: Any, x: Array, target: Array) -> Array:
        turned = {f"{n}.weight": turn(w, in_out) for n, w in masked.items()}
        out = run(unflatten(rest | turned), kind, x, ())[0]
        change = jnp.sum(jnp.square(target - x))  # what the block adds, not the stream it adds to
        return jnp.sum(jnp.square(out - target)) / change

    return error
