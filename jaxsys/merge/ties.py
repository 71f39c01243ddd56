"""Sparse task vectors: TIES, DARE, DELLA and breadcrumbs, which differ in what they keep.

    θ_0 + λ · Σ w_n τ̂_n [/ Σ w_n]        τ̂_n = what is kept of τ_n = θ_n − θ_0, rescaled

The ``_ties`` forms elect a sign per entry, s = sign Σ w_n τ̂_n, and sum only entries of that sign;
with ``normalize`` they divide by the sum of the weights that took part. Defaults are mergekit's.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.merge.contract import Blocks, Method
from jaxsys.merge.draws import LEVELS, bits16, key_words, levels
from jaxsys.merge.histogram import largest, majority_sign
from jaxsys.merge.linear import f32, whole
from jaxsys.merge.sparsify import (
    Rescale,
    check_density,
    host_ranks,
    in_band,
    kept_ranks,
    l1_scale,
    levels_of_rank,
    magnitude,
    rank_levels,
)
from jaxsys.merge.views import View, term_of

_ZERO = np.zeros(2, np.uint32)
Density = Any  # a number, one for each model as a tuple, or traced


@dataclass(frozen=True)
class Ties:
    """Options of TIES: trim by magnitude, elect signs, merge what agrees.

    The paper's form (arXiv 2306.01708), as FusionBench has it, is ``Ties(density=0.2,
    trim="global", normalize=False, lambda_=0.3, zero_sign="majority")``.

    Attributes:
      density: share of entries kept of each model.
      normalize: divide by the sum of agreeing weights (mean), or leave the sum.
      lambda_: λ.
      rescale: ``l1`` restores Σ|τ| after trimming.
      trim: rank entries within each ``tensor`` (mergekit) or over all (``global``, the paper).
      zero_sign: sign elected where the sum is zero: positive (mergekit) or that of most entries.
      sign: elect by the ``sum`` of differences or by the ``count`` of their signs.
      thresholds: found by the first pass of ``global``.
      majority: found by the first pass of ``majority``.

    >>> Ties(density=0.2).trim
    'tensor'
    """

    density: Density = 1.0
    normalize: bool = True
    lambda_: Any = 1.0
    rescale: Rescale = "none"
    trim: Literal["tensor", "global"] = "tensor"
    zero_sign: Literal["positive", "majority"] = "positive"
    sign: Literal["sum", "count"] = "sum"
    thresholds: tuple[float, ...] | None = None
    majority: float = 1.0

    def __post_init__(self) -> None:
        check_density("density", self.density)
        _no_expected(self.rescale)


@dataclass(frozen=True)
class Dare:
    """Options of DARE: drop entries at random and rescale (arXiv 2311.03099).

    Attributes:
      density: probability to keep an entry, 1 − p.
      normalize: divide by the sum of weights.
      lambda_: λ.
      rescale: ``l1`` restores Σ|τ| (mergekit), ``expected`` divides by the density (the paper).

    >>> Dare(density=0.5).rescale
    'l1'
    """

    density: Density = 1.0
    normalize: bool = False
    lambda_: Any = 1.0
    rescale: Rescale = "l1"

    def __post_init__(self) -> None:
        check_density("density", self.density)


@dataclass(frozen=True)
class Della:
    """Options of DELLA: drop at random, small entries of a row more often (arXiv 2406.11617).

    Attributes:
      density: mean probability to keep an entry.
      epsilon: ε; the probability runs from density − ε to density + ε over the ranks of a row.
      normalize: divide by the sum of agreeing weights.
      lambda_: λ.
      rescale: ``l1`` restores Σ|τ| (mergekit), ``expected`` divides by each probability (the
        paper).

    >>> Della(density=0.5).epsilon
    0.15
    """

    density: Density = 1.0
    epsilon: Any = 0.15
    normalize: bool = True
    lambda_: Any = 1.0
    rescale: Rescale = "l1"

    def __post_init__(self) -> None:
        check_density("density", self.density)
        for d in self.density if isinstance(self.density, tuple) else (self.density,):
            e = self.epsilon
            known = isinstance(d, float | int) and isinstance(e, float | int)
            if known and d < 1 and not (d - e > 0 and d + e < 1):
                raise UserError(
                    f"epsilon is {e} with density {d}; both density - epsilon and density + "
                    "epsilon must lie in (0, 1); lower epsilon"
                )


@dataclass(frozen=True)
class DellaLinear(Della):
    """Options of DELLA without the election of signs.

    >>> DellaLinear().normalize
    False
    """

    normalize: bool = False


@dataclass(frozen=True)
class Breadcrumbs:
    """Options of breadcrumbs: drop the largest entries and the smallest (arXiv 2312.06795).

    mergekit keeps nothing of a tensor with γ · size < 1; here it is trimmed without outliers.

    Attributes:
      density: share of entries kept.
      gamma: γ, share of the largest entries dropped.
      normalize: divide by the sum of weights.
      lambda_: λ.
      rescale: ``l1`` restores Σ|τ|.

    >>> Breadcrumbs(density=0.9).gamma
    0.01
    """

    density: Density = 1.0
    gamma: Any = 0.01
    normalize: bool = False
    lambda_: Any = 1.0
    rescale: Rescale = "none"

    def __post_init__(self) -> None:
        check_density("density", self.density)
        _no_expected(self.rescale)


def _no_expected(rescale: str) -> None:
    if rescale == "expected":
        raise UserError(
            "rescale is expected, which divides by a probability, and this method draws nothing; "
            "use l1 or none"
        )


def _per_model(value: Any, n: int) -> list[Any]:
    if isinstance(value, tuple) and len(value) != n:
        raise UserError(f"{len(value)} values were given for {n} models; give one for each model")
    return list(value) if isinstance(value, tuple) else [value] * n


def _numbers(kind: str, config: Any, view: View, weights: Any, key: Any) -> dict[str, Any]:
    """Gather what the slices need: weights, thresholds or probabilities, and scales."""
    xp, n = view.xp, view.n
    density = _per_model(config.density, n)
    numbers: dict[str, Any] = {"words": key_words(key)}
    if kind == "band":
        bounds = _bounds(config, view, density)
        numbers["low"] = f32(xp, xp.stack([xp.asarray(low) for low, _ in bounds]))
        numbers["high"] = f32(xp, xp.stack([xp.asarray(high) for _, high in bounds]))
    elif kind == "drop":
        numbers["keep"] = xp.stack([xp.asarray(levels(d)) for d in density])
    else:
        numbers["density"] = f32(xp, xp.stack([xp.asarray(d) for d in density]))
        epsilon = _per_model(config.epsilon, n)
        # density 1 keeps everything, whatever ε
        epsilon = [
            xp.where(xp.asarray(d) >= 1, 0, e) for d, e in zip(density, epsilon, strict=True)
        ]
        numbers["epsilon"] = f32(xp, xp.stack(epsilon))
    scale = xp.ones(n)
    if config.rescale == "l1" and not all(isinstance(d, float | int) and d >= 1 for d in density):
        sums = view.sums(_l1_terms, (kind,), numbers)
        scale = l1_scale(xp, sums[:n], sums[n:])
    elif config.rescale == "expected" and kind == "drop":
        scale = LEVELS / numbers["keep"].astype(xp.float32)
    numbers["scaled"] = f32(xp, scale * weights)
    numbers["weights"] = f32(xp, weights)
    total = xp.sum(weights)
    numbers["divisor"] = f32(xp, xp.where(xp.abs(total) < 1e-8, 1.0, total))
    numbers["lambda"] = f32(xp, config.lambda_)
    numbers["majority"] = f32(xp, getattr(config, "majority", 1.0))
    return numbers


def _bounds(config: Any, view: View, density: list[Any]) -> list[tuple[Any, Any]]:
    """Give each model's smallest and largest magnitude that stays."""
    thresholds = getattr(config, "thresholds", None)
    if thresholds is not None:
        return [(low, np.inf) for low in thresholds]
    bounds = []
    for i, gamma in enumerate(_per_model(getattr(config, "gamma", 0.0), view.n)):
        whole_kept = isinstance(density[i], float | int) and density[i] >= 1
        if whole_kept or view.size == 0:
            bounds.append((0.0, np.inf))
            continue
        first, last = kept_ranks(view.size, density[i], gamma)
        if isinstance(first, int) and first == 1:
            bounds.append((view.ranked(magnitude, [last], of=i)[0], np.inf))
        else:
            high, low = view.ranked(magnitude, [first, last], of=i)
            bounds.append((low, high))
    return bounds


def _kept(kind: str, numbers: Any, base: Any, stack: Any, place: Any) -> list[Any]:
    """Give each model's difference with zeros where it is dropped, not yet rescaled."""
    taus = [x - base for x in stack]
    if kind == "band":
        low, high = numbers["low"], numbers["high"]
        return [in_band(tau, low[i], high[i]) for i, tau in enumerate(taus)]
    drawn = numbers.get("drawn") or bits16(numbers["words"], place, base.shape, len(taus))
    if kind == "drop":
        keep = numbers["keep"]
        return [jnp.where(d < keep[i], taus[i], 0.0) for i, d in enumerate(drawn)]
    kept = []
    for i, tau in enumerate(taus):
        density, epsilon = numbers["density"][i], numbers["epsilon"][i]
        if "ranks" in numbers:
            keep = levels_of_rank(numbers["ranks"][i], density, epsilon)
        else:
            keep = rank_levels(tau, density, epsilon)
        # "rank/expected": each entry is divided by its own probability.
        value = tau * (LEVELS / keep) if kind == "rank/expected" else tau
        kept.append(jnp.where(drawn[i] < keep, value, 0.0))
    return kept


def _with_ranks(numbers: dict[str, Any], base: Any, stack: Any) -> dict[str, Any]:
    """Rank a slice's rows with NumPy."""
    sizes = [np.asarray(term_of(magnitude, (), (), base, (x,), _ZERO)) for x in stack]
    return numbers | {"ranks": tuple(host_ranks(size) for size in sizes)}


def _l1_terms(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> tuple[Any, ...]:
    if flags[0] != "band":
        # Each sum is a loop of its own, which would draw anew without a barrier.
        drawn = bits16(numbers["words"], place, base.shape, len(stack))
        numbers = numbers | {"drawn": jax.lax.optimization_barrier(drawn)}
    kept = _kept(flags[0], numbers, base, stack, place)
    return (*(jnp.abs(x - base) for x in stack), *(jnp.abs(tau) for tau in kept))


def _block(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> Any:
    kind, elect, normalize, majority = flags
    kept = _kept(kind, numbers, base, stack, place)
    parts = [numbers["scaled"][i] * tau for i, tau in enumerate(kept)]
    if not elect:
        mixed = sum(parts)
        return base + mixed * (numbers["lambda"] / (numbers["divisor"] if normalize else 1.0))
    votes = sum(parts) if elect == "sum" else sum(jnp.sign(part) for part in parts)
    positive = votes >= 0
    if majority:
        positive = jnp.where(votes == 0, numbers["majority"] >= 0, positive)
    agree = [jnp.where(positive, part > 0, part < 0) for part in parts]
    mixed = sum(jnp.where(a, part, 0.0) for a, part in zip(agree, parts, strict=True))
    if normalize:
        total = sum(jnp.where(a, numbers["weights"][i], 0.0) for i, a in enumerate(agree))
        mixed = mixed / jnp.where(total == 0, 1.0, total)
    return base + numbers["lambda"] * mixed


def _flags(kind: str, elect: bool, config: Any) -> tuple:
    if kind == "rank" and config.rescale == "expected":
        kind = "rank/expected"
    sign = getattr(config, "sign", "sum") if elect else ""
    return kind, sign, config.normalize, getattr(config, "zero_sign", "positive") == "majority"


def _unit(kind: str, config: Any) -> str:
    return "rows" if kind == "rank" else "elements"


def _first_pass(config: Ties, leaves: Any) -> Ties:
    """Find global thresholds and the majority sign, where the options ask for them."""
    if config.trim == "global" and config.thresholds is None:
        config = replace(config, thresholds=largest(leaves, config.density))
    if config.zero_sign == "majority":
        config = replace(config, majority=majority_sign(leaves, config.thresholds))
    return config


def _method(config: type, kind: str, elect: bool, pass_: Any = None) -> Method:
    blocks = Blocks(
        partial(_numbers, kind),
        _block,
        partial(_flags, kind, elect),
        partial(_unit, kind),
        _with_ranks if kind == "rank" else None,
    )
    return Method(partial(whole, blocks), config, "needed", (1, None), pass_, blocks)


METHODS = {
    "ties": _method(Ties, "band", True, _first_pass),
    "dare_linear": _method(Dare, "drop", False),
    "dare_ties": _method(Dare, "drop", True),
    "della": _method(Della, "rank", True),
    "della_linear": _method(DellaLinear, "rank", False),
    "breadcrumbs": _method(Breadcrumbs, "band", False),
    "breadcrumbs_ties": _method(Breadcrumbs, "band", True),
}
