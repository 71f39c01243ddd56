"""Tensor- and data-parallel placement: path patterns to partition specs, and nothing else.

The forward pass is not rewritten: with parameters placed by these specs and the batch split over
the mesh's ``data`` axis, XLA inserts the collectives. Projections into heads and feed-forward
width are split by output, those back into the residual stream by input (Megatron's arrangement),
embedding and output matrix by vocabulary.

Reference: Shoeybi et al., "Megatron-LM" (arXiv 1909.08053), section 3.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, match, unflatten
from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families import layout_of

Rules = Sequence[tuple[str, P]]


def rules(config: LMConfig, model: int) -> Rules:
    """List path patterns with the partition of their tensors; the first that matches counts.

    Args:
        config: the model.
        model: size of the mesh's ``model`` axis; heads that it does not divide are kept whole.

    Returns:
        Pairs of glob and spec; the last matches everything and splits nothing.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> rules(config, 2)[0] == ("*embed_tokens.weight", P("model", None))
    True
    """
    layout = layout_of(config)
    by_output, by_input = P("model", None), P(None, "model")
    if layout.in_out:
        by_output, by_input = by_input, by_output
    split: list[tuple[str, P]] = [
        (f"*{layout.embed}.weight", P("model", None)),
        (f"{layout.head}.weight", P("model", None)),
        (f"{layout.head}.bias", P("model")),
    ]
    into: list[str] = []
    if config.kv_heads % model == 0:
        into += [layout.qkv] if layout.qkv else [layout.q, layout.k, layout.v]
    elif config.heads % model == 0 and not layout.qkv:
        into += [layout.q]
    back = [layout.out] if config.heads % model == 0 else []
    into += [name for name in (layout.gate, layout.up) if name]
    back += [layout.down]
    if config.experts:
        into += [f"experts.*.{name}" for name in (layout.expert_gate, layout.expert_up)]
        back += [f"experts.*.{layout.expert_down}"]
    for name in into:
        split += [(f"*.{name}.weight", by_output), (f"*.{name}.bias", P("model"))]
    split += [(f"*.{name}.weight", by_input) for name in back]
    return (*split, ("*", P()))


def specs(shapes: Mapping[str, tuple[int, ...]], pattern_rules: Rules, mesh: Mesh) -> dict[str, P]:
    """Give each tensor the spec of the first pattern that matches it.

    An axis that does not divide its dimension is left out of the spec.

    Args:
        shapes: name to shape.
        pattern_rules: from `rules`, or one's own.
        mesh: its axes' sizes decide what divides.

    Returns:
        Name to spec.

    Raises:
        UserError: when no pattern matches a name, or a spec is longer than the shape.

    >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> tuple(specs({"a.w": (4, 2)}, (("*", P("model")),), mesh)["a.w"])
    ('model', None)
    """
    chosen: dict[str, P] = {}
    for name, shape in shapes.items():
        spec = next((spec for glob, spec in pattern_rules if match((name,), glob)), None)
        if spec is None or len(spec) > len(shape):
            raise UserError(
                f"tensor {name!r} of shape {tuple(shape)} has no fitting partition ({spec}); "
                "expected a pattern with at most as many axes; add a rule before the last"
            )
        axes = (*spec, *(None,) * (len(shape) - len(spec)))
        chosen[name] = P(
            *(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=True))
        )
    return chosen


def shard(params: Mapping[str, Any], config: LMConfig, mesh: Mesh) -> dict[str, Any]:
    """Place parameters over a mesh with axes ``data`` and ``model``.

    Args:
        params: nested dict of arrays.
        config: the model.
        mesh: axes of type Auto, so that jit inserts the collectives.

    Returns:
        The same tree on the mesh.

    >>> from jaxsys.models.lm.init import init
    >>> auto = jax.sharding.AxisType.Auto
    >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(auto, auto))
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> placed = shard(init(jax.random.key(0), config), config, mesh)
    >>> tuple(placed["lm_head"]["weight"].sharding.spec)
    ('model', None)
    """
    flat = flatten(params)
    chosen = specs(
        {name: leaf.shape for name, leaf in flat.items()},
        rules(config, mesh.shape["model"]),
        mesh,
    )
    placements = {name: NamedSharding(mesh, spec) for name, spec in chosen.items()}
    return unflatten({name: jax.device_put(leaf, placements[name]) for name, leaf in flat.items()})


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Split the first axis of every array over the mesh's ``data`` axis.

    >>> auto = jax.sharding.AxisType.Auto
    >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(auto, auto))
    >>> shard_batch(jax.numpy.zeros((4, 3)), mesh).shape
    (4, 3)
    """
    return jax.device_put(batch, NamedSharding(mesh, P("data")))
