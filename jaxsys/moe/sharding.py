"""Where a layer's parameters lie on a mesh."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxsys.core.errors import UserError
from jaxsys.moe.contract import Axes, Experts, MoESpec


def expert_specs(params: Mapping[str, Any], experts: Experts, axes: Axes) -> dict[str, P]:
    """Give the partition of each leaf of the experts: E over ``expert``, F over ``tensor``.

    Args:
        params: of all experts, or their shapes.
        experts: what they are of.
        axes: of the mesh.

    Returns:
        Leaf name to spec.

    >>> from jaxsys.moe.experts import swiglu
    >>> shapes = {"down": jax.ShapeDtypeStruct((2, 4, 3), float)}
    >>> tuple(expert_specs(shapes, swiglu(), Axes(expert="node", tensor="local"))["down"])
    ('node', 'local', None)
    """

    def partition(name: str, leaf: Any) -> P:
        entries = [axes.expert, *(None,) * (leaf.ndim - 1)]
        axis = experts.hidden_axis[name]
        if axis is not None:
            entries[axis] = axes.tensor
        return P(*entries)

    return {name: partition(name, leaf) for name, leaf in params.items()}


def layer_specs(params: Mapping[str, Any], spec: MoESpec, axes: Axes) -> dict[str, Any]:
    """Give the partition of a layer's parameters: experts sharded, the rest on every rank.

    Args:
        params: as from `layer.init`, or their shapes.
        spec: the layer's parts.
        axes: of the mesh.

    Returns:
        A tree of `PartitionSpec` like the parameters.

    >>> from jaxsys.moe.experts import swiglu
    >>> from jaxsys.moe.gates import noisy_top_k
    >>> from jaxsys.moe.order import sparse_order
    >>> spec = MoESpec(noisy_top_k(2), sparse_order(), swiglu())
    >>> tuple(layer_specs({"gate": {"weight": 0}, "experts": {}}, spec, Axes())["gate"]["weight"])
    ()
    """
    replicated = jax.tree.map(lambda _: P(), {k: v for k, v in params.items() if k != "experts"})
    return {**replicated, "experts": expert_specs(params["experts"], spec.experts, axes)}


def check_mesh(mesh: jax.sharding.Mesh, axes: Axes, experts: int, hidden: int) -> None:
    """Refuse a mesh that a layer does not fit, before anything is traced.

    Args:
        mesh: the mesh.
        axes: the names used.
        experts: E.
        hidden: F.

    Raises:
        UserError: for an axis that is not in the mesh, or one that does not divide E or F.

    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> check_mesh(mesh, Axes(expert="expert"), 4, 8)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: axis 'expert' is not in the mesh, ...
    """
    for name in axes.tokens:
        if name not in mesh.shape:
            raise UserError(
                f"axis {name!r} is not in the mesh, which has {', '.join(mesh.shape)}; expected "
                "one of these; correct Axes or make the mesh with it"
            )
    ranks = 1
    for name in Axes(expert=axes.expert).tokens:
        ranks *= mesh.shape[name]
    parts = 1 if axes.tensor is None else mesh.shape[axes.tensor]
    for what, size, over in (("experts", experts, ranks), ("hidden units", hidden, parts)):
        if size % over:
            raise UserError(
                f"{size} {what} cannot be dealt out over {over} ranks; expected a multiple of "
                f"{over}; change the layer or the mesh"
            )
