"""Merges by geometry or importance: model stock, SCE, RAM, nearswap and Arcee's fusion."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.merge.contract import Blocks, Method
from jaxsys.merge.linear import combine, f32, whole
from jaxsys.merge.sphere import gram
from jaxsys.merge.views import View


@dataclass(frozen=True)
class ModelStock:
    """Options of model stock: t · mean + (1 − t) · θ_0 with t = N c / (1 + (N − 1) c).

    c is the mean cosine of pairs of differences (arXiv 2403.19522, equation 9; the mean over pairs
    is mergekit's reading for N > 2).

    Attributes:
      filter_wise: one c for each vector along the last axis instead of one for the tensor.

    >>> ModelStock().filter_wise
    False
    """

    filter_wise: bool = False


@dataclass(frozen=True)
class Sce:
    """Options of SCE: select, calculate, erase (arXiv 2408.07990, section 3.2).

    Keep the entries whose variance over models is among the largest, weigh each model by its mean
    square difference, elect signs, and average what agrees.

    Attributes:
      select_topk: share kept of the entries that vary.

    >>> Sce().select_topk
    1.0
    """

    select_topk: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.select_topk, float | int) and not 0 <= self.select_topk <= 1:
            raise UserError(
                f"select_topk is {self.select_topk}; it is the share of entries selected and must "
                "lie in [0, 1]; correct it"
            )


@dataclass(frozen=True)
class Ram:
    """Options of RAM: entries that one model changed are kept, shared ones averaged.

    Reference: arXiv 2601.13572.

    Attributes:
      epsilon: a difference above it is a change.

    >>> Ram().epsilon
    1e-05
    """

    epsilon: float = 1e-5


@dataclass(frozen=True)
class RamPlus:
    """Options of RAM+ within tensors: what one model changed alone is scaled up.

    By 1 + r · clip(ρ, 0, α), ρ its changes shared with others over those of its own.

    Attributes:
      r: r.
      alpha: α.
      epsilon: a difference above it is a change.

    >>> RamPlus().r
    0.1
    """

    r: float = 0.1
    alpha: float = 0.2
    epsilon: float = 1e-5


@dataclass(frozen=True)
class NearSwap:
    """Options of nearswap: go from θ_0 to θ_1 by min(1, t / |θ_1 − θ_0|).

    Attributes:
      t: the largest step of an entry, in the unit of the parameters.

    >>> NearSwap().t
    0.001
    """

    t: Any = 0.001


@dataclass(frozen=True)
class ArceeFusion:
    """Options of Arcee's fusion: take over the entries of the model that matter most.

    Importance is |θ_1 − θ_0| times the KL divergence of the softmax of the row; entries with at
    least median + 1.5 · interquartile range are taken. mergekit estimates the quantiles of tensors
    above a million entries from a random million; here all are ranked.

    >>> ArceeFusion()
    ArceeFusion()
    """


def _ratio(xp: Any, cos: Any, n: int) -> Any:
    return n * cos / (1 + (n - 1) * cos)


def _stock(config: ModelStock, view: View, weights: Any, key: Any) -> dict[str, Any]:
    xp, n = view.xp, view.n
    if config.filter_wise:
        return {}
    g = gram(view)
    norms = xp.sqrt(xp.diagonal(g))
    cos = xp.clip(g / xp.maximum(norms[:, None] * norms[None, :], 1e-6), -1, 1)
    mean = xp.sum(cos[np.triu_indices(n, 1)]) / (n * (n - 1) / 2)
    return {"coefficients": f32(xp, xp.full(n, _ratio(xp, mean, n) / n))}


def _stock_block(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> Any:
    if flags != ("rows",):
        return combine((), numbers, base, stack, place)
    n = len(stack)
    taus = [x - base for x in stack]
    norms = [jnp.sqrt(jnp.sum(t * t, axis=-1, keepdims=True)) for t in taus]
    total = jnp.zeros_like(norms[0])
    for i in range(n):
        for j in range(i + 1, n):
            product = jnp.sum(taus[i] * taus[j], axis=-1, keepdims=True)
            total = total + jnp.clip(product / jnp.maximum(norms[i] * norms[j], 1e-6), -1, 1)
    t = _ratio(jnp, total / (n * (n - 1) / 2), n)
    return base + (t / n) * sum(taus)


def _variance(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> tuple[Any]:
    taus = [x - base for x in stack]
    mean = sum(taus) / len(taus)
    return (sum((t - mean) ** 2 for t in taus) / len(taus),)


def _varying(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> tuple[Any]:
    return (_variance((), (), base, stack, place)[0] != 0,)


def _selected(numbers: Any, base: Any, stack: Any) -> list[Any]:
    taus = [x - base for x in stack]
    if "least" not in numbers:
        return taus
    (variance,) = _variance((), (), base, stack, None)
    return [jnp.where(variance >= numbers["least"], t, 0.0) for t in taus]


def _squares(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> tuple[Any, ...]:
    return tuple(t * t for t in _selected(numbers, base, stack))


def _sce(config: Sce, view: View, weights: Any, key: Any) -> dict[str, Any]:
    xp = view.xp
    numbers: dict[str, Any] = {}
    if config.select_topk < 1:
        count = xp.floor(view.sums(_varying)[0] * config.select_topk)
        rank = xp.maximum(count, 1).astype(xp.int32)
        least = view.ranked(_variance, xp.stack([rank]))[0]
        numbers["least"] = f32(xp, xp.where(count > 0, least, xp.inf))
    squares = view.sums(_squares, (), numbers) / max(1, view.size)
    total = xp.sum(squares)
    none = xp.abs(total) < 1e-6
    share = xp.where(none, 1 / view.n, squares / xp.where(none, 1.0, total))
    return numbers | {"share": f32(xp, share)}


def _sce_block(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> Any:
    taus = _selected(numbers, base, stack)
    positive = sum(taus) >= 0
    agree = [jnp.where(positive, t > 0, t < 0) for t in taus]
    share = numbers["share"]
    mixed = sum(jnp.where(a, share[i] * taus[i], 0.0) for i, a in enumerate(agree))
    total = sum(jnp.where(a, share[i], 0.0) for i, a in enumerate(agree))
    return base + mixed / jnp.maximum(total, 1e-6)


def _changes(epsilon: Any, base: Any, stack: Any) -> tuple[list[Any], list[Any], Any]:
    """Give differences, whether they are changes, and how many models changed each entry."""
    taus = [x - base for x in stack]
    changed = [jnp.abs(t) > epsilon for t in taus]
    return taus, changed, sum(c.astype(jnp.int32) for c in changed)


def _counts(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> tuple[Any, ...]:
    _, changed, count = _changes(numbers["epsilon"], base, stack)
    return (*(c & (count > 1) for c in changed), *(c & (count == 1) for c in changed))


def _ram(config: Any, view: View, weights: Any, key: Any) -> dict[str, Any]:
    xp = view.xp
    numbers = {"epsilon": f32(xp, config.epsilon), "factor": f32(xp, xp.ones(view.n))}
    if isinstance(config, RamPlus):
        counts = view.sums(_counts, (), numbers)
        shared, unique = counts[: view.n], counts[view.n :]
        ratio = shared / xp.maximum(unique, config.epsilon)
        numbers["factor"] = f32(xp, 1 + config.r * xp.clip(ratio, 0, config.alpha))
    return numbers


def _ram_block(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> Any:
    taus, changed, count = _changes(numbers["epsilon"], base, stack)
    merged = sum(
        jnp.where(c, jnp.where(count == 1, numbers["factor"][i] * t, t / jnp.maximum(count, 1)), 0)
        for i, (t, c) in enumerate(zip(taus, changed, strict=True))
    )
    return base + merged


def _near(config: NearSwap, view: View, weights: Any, key: Any) -> dict[str, Any]:
    return {"t": f32(view.xp, config.t)}


def _near_block(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> Any:
    tau = stack[0] - base
    share = jnp.clip(numbers["t"] / jnp.maximum(jnp.abs(tau), 1e-6), 0, 1)
    # Both products, as mergekit has it: with a share of 1 the model comes out to the last bit.
    return share * stack[0] + (1 - share) * base


def _importance(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> tuple[Any]:
    model = stack[0]
    p = jax.nn.softmax(model, axis=-1) + 1e-8
    q = jax.nn.softmax(base, axis=-1) + 1e-8
    divergence = jnp.sum(p * jnp.log(p / q), axis=-1, keepdims=True)
    return (jnp.abs(model - base) * divergence,)


def _fusion(config: ArceeFusion, view: View, weights: Any, key: Any) -> dict[str, Any]:
    xp = view.xp
    # Ascending places ⌊q (size − 1)⌋, as ranks from above.
    ranks = [view.size - int(q * (view.size - 1)) for q in (0.25, 0.5, 0.75)]
    low, middle, high = view.ranked(_importance, ranks)
    return {"least": f32(xp, middle + 1.5 * (high - low))}


def _fusion_block(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> Any:
    (importance,) = _importance((), (), base, stack, place)
    return jnp.where(importance >= numbers["least"], stack[0], base)


def _rows(_: Any) -> str:
    return "rows"


def _method(config: type, blocks: Blocks, models: tuple[int, int | None]) -> Method:
    return Method(partial(whole, blocks), config, "needed", models, blocks=blocks)


METHODS = {
    "model_stock": _method(
        ModelStock,
        Blocks(
            _stock,
            _stock_block,
            lambda c: ("rows",) if c.filter_wise else (),
            lambda c: "rows" if c.filter_wise else "elements",
        ),
        (2, None),
    ),
    "sce": _method(Sce, Blocks(_sce, _sce_block), (1, None)),
    "ram": _method(Ram, Blocks(_ram, _ram_block), (1, None)),
    "ramplus_tl": _method(RamPlus, Blocks(_ram, _ram_block), (1, None)),
    "nearswap": _method(NearSwap, Blocks(_near, _near_block), (1, 1)),
    "arcee_fusion": _method(ArceeFusion, Blocks(_fusion, _fusion_block, unit=_rows), (1, 1)),
}
