"""Merges on a sphere: SLERP, NuSLERP, multi-SLERP and the Karcher mean.

Over flat tensors each is a linear combination whose coefficients follow from the inner products of
the models alone, so a leaf is read twice and nothing of its size is kept. The inner products are
gathered in float64 on a host.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxsys.core.errors import UserError
from jaxsys.merge.contract import Blocks, Method
from jaxsys.merge.linear import combine, divide_by_sum, f32, whole
from jaxsys.merge.views import View


@dataclass(frozen=True)
class Slerp:
    """Options of SLERP from the base θ_0 to the one model θ_1.

    sin((1−t)Ω)/sin Ω · θ_0 + sin(tΩ)/sin Ω · θ_1, Ω the angle between them; a straight line where
    |cos Ω| > 0.9995.

    Attributes:
      t: 0 gives the base, 1 the model.

    >>> Slerp().t
    0.5
    """

    t: Any = 0.5


@dataclass(frozen=True)
class NuSlerp:
    """Options of NuSLERP: SLERP of two models with t = w_2 / (w_1 + w_2), about a base if given.

    Attributes:
      nuslerp_flatten: take the tensor as one vector, else each row by itself.
      nuslerp_row_wise: without flattening: vectors along the first axis instead of the last.

    >>> NuSlerp().nuslerp_flatten
    True
    """

    nuslerp_row_wise: bool = False
    nuslerp_flatten: bool = True


@dataclass(frozen=True)
class MultiSlerp:
    """Options of barycentric interpolation on a sphere, about a base if given.

    Unit vectors are carried to the tangent space at their normalised mean, averaged there, carried
    back, and given the mean norm.

    Attributes:
      normalize_weights: make the weights add up to one.
      eps: added to norms.

    >>> MultiSlerp().eps
    1e-08
    """

    normalize_weights: bool = True
    eps: float = 1e-8


@dataclass(frozen=True)
class Karcher:
    """Options of the Karcher mean: the point with least summed squared angle to all models.

    u ← exp_u(Σ a_n θ_n / sin θ_n · (u_n − cos θ_n · u)), then times Σ a_n ‖θ_n‖; the weights a are
    equal in mergekit.

    Attributes:
      max_iter: most steps.
      tol: angles and steps below it count as zero.

    >>> Karcher().max_iter
    10
    """

    max_iter: int = 10
    tol: float = 1e-5


def _products(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> tuple[Any, ...]:
    if flags[0] == "points":
        vectors = [*stack] if base is None else [base, *stack]
    else:
        vectors = [*stack] if base is None else [x - base for x in stack]
    return tuple(a * b for i, a in enumerate(vectors) for b in vectors[i:])


def gram(view: View, *, points: bool = False) -> Any:
    """Gather inner products of the differences to the base, or of base and models as ``points``.

    >>> from jaxsys.merge.views import HostView
    >>> gram(HostView(None, [np.array([1.0, 2.0], np.float32)])).tolist()
    [[5.0]]
    """
    xp = view.xp
    n = view.n + (points and view.has_base)
    upper = view.sums(_products, ("points" if points else "differences",))
    place = np.zeros((n, n), np.int32)
    place[np.triu_indices(n)] = np.arange(n * (n + 1) // 2)
    return xp.asarray(upper)[np.maximum(place, place.T)]


def _slerp(config: Slerp, view: View, weights: Any, key: Any) -> dict[str, Any]:
    xp, t = view.xp, config.t
    g = gram(view, points=True)
    norms = xp.sqrt(xp.stack([g[0, 0], g[1, 1]]))
    # A vector as good as zero is left as it is.
    norms = xp.where(norms > 1e-8, norms, 1.0)
    cos = g[0, 1] / (norms[0] * norms[1])
    straight = xp.abs(cos) > 0.9995
    angle = xp.arccos(xp.where(straight, 0.0, cos))
    c0 = xp.where(straight, 1 - t, xp.sin((1 - t) * angle) / xp.sin(angle))
    c1 = xp.where(straight, t, xp.sin(t * angle) / xp.sin(angle))
    return {"coefficients": f32(xp, xp.stack([c0, c1]))}


def _share(xp: Any, weights: Any) -> Any:
    total = xp.sum(weights)
    near = xp.abs(total) < 1e-6
    return xp.where(near, 0.5, weights[1] / xp.where(near, 1.0, total))


def _arc(xp: Any, t: Any, cos: Any) -> tuple[Any, Any]:
    """Give NuSLERP's two coefficients for a cosine."""
    angle = xp.arccos(xp.clip(cos, -1, 1))
    sine = xp.sin(angle)
    straight = xp.abs(sine) < 1e-8
    safe = xp.where(straight, 1.0, sine)
    return (
        xp.where(straight, 1 - t, xp.sin((1 - t) * angle) / safe),
        xp.where(straight, t, xp.sin(t * angle) / safe),
    )


def _nuslerp(config: NuSlerp, view: View, weights: Any, key: Any) -> dict[str, Any]:
    xp, t = view.xp, _share(view.xp, weights)
    if not config.nuslerp_flatten:
        return {"t": f32(xp, t)}
    g = gram(view)
    norms = xp.maximum(xp.sqrt(xp.stack([g[0, 0], g[1, 1]])), 1e-7)
    return {"coefficients": f32(xp, xp.stack(_arc(xp, t, g[0, 1] / (norms[0] * norms[1]))))}


def _nuslerp_block(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> Any:
    if flags == ("flat",):
        return combine((), numbers, base, stack, place)
    axis = 0 if flags == ("columns",) else -1
    a, b = stack if base is None else [x - base for x in stack]

    def norm(x: Any) -> Any:
        return jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True)), 1e-7)

    cos = jnp.sum((a / norm(a)) * (b / norm(b)), axis=axis, keepdims=True)
    c0, c1 = _arc(jnp, numbers["t"], cos)
    mixed = c0 * a + c1 * b
    return mixed if base is None else base + mixed


def _nuslerp_flags(config: NuSlerp) -> tuple:
    if config.nuslerp_flatten:
        return ("flat",)
    return ("columns",) if config.nuslerp_row_wise else ("rows",)


def _nuslerp_unit(config: NuSlerp) -> str:
    return {"flat": "elements", "rows": "rows", "columns": "whole"}[_nuslerp_flags(config)[0]]


def _multislerp(config: MultiSlerp, view: View, weights: Any, key: Any) -> dict[str, Any]:
    """Work in the span of the unit vectors: a vector is its coefficients, a product is via U."""
    xp, eps = view.xp, config.eps
    if view.n == 1:
        return {"coefficients": f32(xp, xp.ones(1))}
    w = divide_by_sum(xp, weights) if config.normalize_weights else weights
    g = gram(view)
    norms = xp.sqrt(xp.diagonal(g))
    inverse = 1 / (norms + eps)
    u = g * inverse[:, None] * inverse[None, :]
    mean_norm = xp.sqrt(xp.maximum(w @ u @ w, 0))
    zero = mean_norm < eps
    if view.n != 2 and not isinstance(zero, Tracer) and bool(zero):
        raise UserError(
            "the weighted unit vectors of a tensor add up to zero, which leaves multislerp no "
            "direction to merge about; change the weights"
        )
    mean = w / xp.where(zero, 1.0, mean_norm)
    dots = u @ mean
    tangent = w - (w @ dots) * mean
    length = xp.sqrt(xp.maximum(tangent @ u @ tangent, 0)) + eps
    point = xp.cos(length) * mean + (xp.sin(length) / length) * tangent
    found = point * (norms @ w) * inverse
    # Two opposite vectors: a straight line.
    return {"coefficients": f32(xp, xp.where(zero, w, found))}


def _karcher(config: Karcher, view: View, weights: Any, key: Any) -> dict[str, Any]:
    xp, tol = view.xp, config.tol
    if view.n == 1:
        return {"coefficients": f32(xp, xp.ones(1))}
    a = weights / xp.sum(weights)
    g = gram(view)
    norms = xp.sqrt(xp.diagonal(g))
    valid = norms > tol
    inverse = xp.where(valid, 1 / xp.where(valid, norms, 1.0), 0.0)
    u = g * inverse[:, None] * inverse[None, :]
    own = xp.where(valid, a, 0.0)
    own = own / xp.where(xp.any(valid), xp.sum(own), 1.0)

    def length(c: Any) -> Any:
        return xp.sqrt(xp.maximum(c @ u @ c, 0))

    first = xp.where(xp.arange(view.n) == xp.argmax(valid), 1.0, 0.0)
    start = length(own)
    c = xp.where(start < tol, first, own / xp.where(start < tol, 1.0, start))
    going = xp.asarray(True)
    for _ in range(config.max_iter):
        cos = xp.clip(u @ c, -1, 1)
        angle = xp.arccos(cos)
        near = angle < tol
        factor = xp.where(near | ~valid, 0.0, own * angle / xp.sin(xp.where(near, 1.0, angle)))
        step = factor - (factor @ cos) * c
        size = length(step)
        going = going & (size >= tol)
        moved = xp.cos(size) * c + xp.sin(size) * step / xp.where(size > 0, size, 1.0)
        norm = length(moved)
        moved = moved / xp.where(norm > tol, norm, 1.0)
        c = xp.where(going, moved, c)
    return {"coefficients": f32(xp, (a @ norms) * c * inverse)}


def _method(config: type, blocks: Blocks, base: str, models: tuple[int, int | None]) -> Method:
    return Method(partial(whole, blocks), config, base, models, blocks=blocks)


METHODS = {
    "slerp": _method(Slerp, Blocks(_slerp, combine, lambda _: ("points",)), "needed", (1, 1)),
    "nuslerp": _method(
        NuSlerp, Blocks(_nuslerp, _nuslerp_block, _nuslerp_flags, _nuslerp_unit), "optional", (2, 2)
    ),
    "multislerp": _method(MultiSlerp, Blocks(_multislerp, combine), "optional", (1, None)),
    "karcher": _method(Karcher, Blocks(_karcher, combine), "unused", (1, None)),
}
