"""Reading and changing what passes between the modules of a model while it runs.

A point is a module's path in the checkpoint with ``:in`` or ``:out``, for instance
``model.layers.3.mlp.down_proj:in`` (what that matrix multiplies) or ``model.layers.3:out`` (the
residual stream after block 3).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import block_linears, join


@partial(jax.tree_util.register_dataclass, data_fields=("position", "value"), meta_fields=("name",))
@dataclass(frozen=True)
class Intervention:
    """Add a vector to a point of the model at one token of each row.

    A pytree whose name is static, so ``jax.grad`` reaches ``value`` and jit does not trace again
    when position or value change.

    Args:
        name: the point, ``path:in`` or ``path:out``; a bare path means ``:out``.
        position: index of the token within this call, one for all rows or [B]; -1 for none.
        value: [D] or [B, D] vector to add.

    >>> jax.tree.leaves(Intervention("model.layers.0.mlp", 2, 0.5))
    [2, 0.5]
    """

    name: str
    position: Any  # arrays, or what jax puts in their place when it rebuilds the tree
    value: Any

    @property
    def point(self) -> str:
        """Give the full name of the point, with its side.

        >>> Intervention("h.0.mlp", jnp.int32(2), jnp.ones(8)).point
        'h.0.mlp:out'
        """
        return self.name if ":" in self.name else f"{self.name}:out"


def modules(config: LMConfig, i: int | None = None) -> tuple[str, ...]:
    """List the paths of the modules that can be tapped.

    Args:
        config: the model.
        i: only those of layer i, relative to the block ("" is the block itself).

    Returns:
        Paths; append ``:in`` or ``:out`` for a point.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> "model.layers.1.self_attn.q_proj" in modules(config)
    True
    """
    layout = layout_of(config)
    if i is not None:
        names = ["", layout.attention_norm, layout.mlp_norm, layout.attention, layout.mlp]
        names += [layout.moe] if config.is_sparse(i) else []
        linears = block_linears(layout, config, i)
        return ("", *dict.fromkeys(n for n in (*names, *linears) if n))
    outside = [layout.embed, layout.project_in, layout.project_out, layout.final_norm]
    names = [join(config.prefix, name) for name in outside if name]
    for j in range(config.layers):
        names += [join(config.prefix, layout.blocks, str(j), name) for name in modules(config, j)]
    return (*names, layout.head)


def check_points(config: LMConfig, points: Iterable[str]) -> None:
    """Refuse a point that the model does not have.

    Args:
        config: the model.
        points: full names with ``:in`` or ``:out``.

    Raises:
        UserError: naming the first unknown point.

    >>> check_points(LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64), ["model.layers.1:out"])
    """
    points = tuple(points)
    known = frozenset(modules(config)) if points else frozenset()
    for point in points:
        path, _, side = point.partition(":")
        if path not in known or side not in ("in", "out"):
            example = next(name for name in modules(config) if name.endswith("0"))
            raise UserError(
                f"point {point!r} is not in this {config.model_type} model; expected a module's "
                f"path with ':in' or ':out', such as '{example}:out'; see models.lm.modules"
            )


def local(points: Iterable[str], prefix: str) -> tuple[str, ...]:
    """Keep the points inside a module and name them relative to it.

    >>> local(["h.1:out", "h.1.mlp:in", "h.10:out"], "h.1")
    (':out', 'mlp:in')
    """
    n = len(prefix)
    return tuple(p[n:].removeprefix(".") for p in points if p[:n] == prefix and p[n] in ".:")


def local_changes(changes: Iterable[Intervention], prefix: str) -> tuple[Intervention, ...]:
    """Keep the interventions inside a module and name them relative to it.

    >>> change = Intervention("h.1.mlp", jnp.int32(0), jnp.ones(2))
    >>> local_changes([change], "h.1")[0].name
    'mlp:out'
    """
    pairs = ((change, local([change.point], prefix)) for change in changes)
    return tuple(replace(change, name=names[0]) for change, names in pairs if names)


def add_at(x: Float[Array, "B T D"], position: Array, value: Array) -> Float[Array, "B T D"]:
    """Add a vector to one token of each row.

    >>> add_at(jnp.zeros((1, 3, 2)), jnp.int32(1), jnp.ones(2))[0, :, 0].tolist()
    [0.0, 1.0, 0.0]
    """
    here = jnp.arange(x.shape[1])[None] == jnp.reshape(position, (-1, 1))
    value = value.astype(x.dtype)
    value = value[None, None] if value.ndim == 1 else value[:, None]
    return x + jnp.where(here[..., None], value, jnp.zeros((), x.dtype))


class Probe:
    """Watch the points of one part of a model while it is traced.

    Args:
        taps: points whose activations are wanted.
        changes: additions to make, their names being points.

    >>> probe = Probe(("mlp:out",), ())
    >>> _ = probe("mlp:out", jnp.ones(2))
    >>> sorted(probe.found)
    ['mlp:out']
    """

    def __init__(self, taps: Iterable[str], changes: Iterable[Intervention]):
        self.taps = frozenset(taps)
        self.changes = tuple(changes)
        self.found: dict[str, Array] = {}

    def __call__(self, point: str, x: Array) -> Array:
        """Return x, changed if an intervention says so, and keep it if it is wanted.

        >>> Probe((), ())("mlp:in", jnp.zeros(1)).tolist()
        [0.0]
        """
        for change in self.changes:
            if change.point == point:
                x = add_at(x, change.position, change.value)
        if point in self.taps:
            self.found[point] = x
        return x

    def inside(self, part: str) -> bool:
        """Say whether any point with ``part`` in its name is watched or changed.

        >>> Probe(("moe.experts.0.w1:in",), ()).inside(".experts.")
        True
        """
        return any(part in p for p in (*self.taps, *(c.point for c in self.changes)))
