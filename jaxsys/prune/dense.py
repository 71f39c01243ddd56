"""Pruning any model from statistics that were gathered beforehand (dense-statistics protocol)."""

import time
from collections.abc import Mapping

import jax.numpy as jnp

from jaxsys.core.errors import UserError
from jaxsys.prune import masks as masking
from jaxsys.prune.blocks import Tensors
from jaxsys.prune.methods import Method, find_metric, prune_linear
from jaxsys.prune.metrics import check_finite
from jaxsys.prune.patterns import Pattern
from jaxsys.prune.plan import PrunedBlock, put, shape_of, turn
from jaxsys.prune.stats import Stats


def prune_dense(
    tensors: Tensors,
    stats: Mapping[str, Stats],
    method: Method,
    pattern: Pattern,
    *,
    in_out: bool = False,
) -> PrunedBlock:
    """Prune layers of any model from statistics that were gathered beforehand.

    Args:
        tensors: path to array; each layer has a ``weight``.
        stats: by the layer's path; these layers are pruned. From `stats.collect`, or from
            `dense_stats`, with gradients put in where the method needs them.
        method: what to do; ratios must be uniform.
        pattern: how much and in which form; ``global`` compares all layers' scores.
        in_out: weights are [in, out].

    Returns:
        The pruned tensors and masks of all these layers.

    Raises:
        UserError: for what does not fit.

    >>> w = {"a.weight": jnp.array([[1.0, 2.0]]), "b.weight": jnp.array([[3.0, 4.0]])}
    >>> found = prune_dense(
    ...     w, {"a": Stats(), "b": Stats()}, Method("magnitude"), Pattern(0.5, "global"))
    >>> found.tensors["a.weight"].tolist(), found.tensors["b.weight"].tolist()
    ([[0.0, 0.0]], [[3.0, 4.0]])
    """
    if method.ratios != "uniform":
        raise UserError(
            f"the ratios {method.ratios!r} need the model's blocks; use the sequential protocol, "
            "or the scope global"
        )
    found, rows = PrunedBlock(0, {}, {}, {}, ()), []
    for path in stats:
        shape = shape_of(tensors, f"{path}.weight")
        pattern.check(shape[::-1] if in_out else shape, path)
    if pattern.scope == "global":
        return _prune_global(tensors, stats, method, pattern, in_out)
    for path, own in stats.items():
        begin_s = time.perf_counter()
        turned = turn(jnp.asarray(tensors[f"{path}.weight"]), in_out)
        pruned = prune_linear(turned, own, method, pattern, path)
        put(found, f"{path}.weight", pruned, in_out)
        removed = masking.sparsity_of(pruned.mask)
        rows.append({"layer": path, "sparsity": removed, "s": time.perf_counter() - begin_s})
    return found._replace(rows=tuple(rows))


def _prune_global(
    tensors: Tensors, stats: Mapping[str, Stats], method: Method, pattern: Pattern, in_out: bool
) -> PrunedBlock:
    if method.needs & {"H", "var"} or method.permute:
        raise UserError(
            "a global threshold goes with a metric alone, without solver, refining, updating or "
            "permuting; leave these out"
        )
    metric, found, rows = find_metric(method.metric), PrunedBlock(0, {}, {}, {}, ()), []
    weights = {path: jnp.asarray(tensors[f"{path}.weight"]) for path in stats}
    scores = {}
    for path, weight in weights.items():
        own = metric.apply(turn(weight, in_out), stats[path])
        check_finite(own, method.metric, path)
        scores[path] = turn(own, in_out)
    for path, mask in masking.global_mask(scores, pattern.sparsity).items():
        found.masks[f"{path}.weight"] = mask
        found.tensors[f"{path}.weight"] = jnp.where(mask, weights[path], 0)
        rows.append({"layer": path, "sparsity": masking.sparsity_of(mask)})
    return found._replace(rows=tuple(rows))
