"""Methods as data: a metric or a solver, a pattern, and what refines or makes up for the mask."""

import fnmatch
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsys.core.errors import UserError
from jaxsys.prune.alps import alps
from jaxsys.prune.dsnot import dsnot
from jaxsys.prune.expression import parse
from jaxsys.prune.metrics import METRICS, Metric, check_finite
from jaxsys.prune.patterns import Pattern, mask_of
from jaxsys.prune.permute import permute_channels, permuted_nm_mask
from jaxsys.prune.sparsegpt import reconstruct, sparsegpt
from jaxsys.prune.stats import Stats

# These choose mask and weights together, from H.
SOLVERS = ("sparsegpt", "alps")


@dataclass(frozen=True)
class Method:
    """Combine the parts of a pruning method.

    Attributes:
        metric: a name in `METRICS`, ``sparsegpt``, ``alps``, or an expression such as
            ``W*sqrt(X)``.
        ratios: how the sparsity is spread over the model: the same everywhere, by outliers (OWL),
            or learnt block by block (after BESA).
        refine: exchange removed and kept weights afterwards (DSnoT).
        refine_skip: globs of layers that are not refined; DSnoT's code leaves out the feed-forward
            blocks.
        update: let the weights that stay make up for the others (SparseGPT's sweep).
        permute: with N:M, permute input channels first (RIA).
        damping: λ of the solvers and the update, of the mean of H's diagonal.

    Raises:
        UserError: for a solver together with parts that need a metric.

    >>> Method("wanda", refine="dsnot").needs == {"X", "mean", "var"}
    True
    """

    metric: str = "wanda"
    ratios: Literal["uniform", "owl", "besa"] = "uniform"
    refine: Literal["none", "dsnot"] = "none"
    refine_skip: tuple[str, ...] = ("*.mlp.*",)
    update: Literal["none", "sparsegpt"] = "none"
    permute: bool = False
    damping: float = 0.01

    def __post_init__(self):
        if self.metric in SOLVERS and (self.refine, self.update, self.permute) != (
            "none",
            "none",
            False,
        ):
            raise UserError(
                f"{self.metric} chooses mask and weights by itself and is combined here with "
                "refining, updating or permuting; use a metric such as wanda for that"
            )
        if self.metric not in SOLVERS:
            find_metric(self.metric)

    @property
    def needs(self) -> frozenset[str]:
        """Name the fields of `Stats` that the method reads."""
        if self.metric in SOLVERS:
            found = {"H"}
        else:
            found = set(find_metric(self.metric).needs)
        if self.refine == "dsnot":
            found |= {"X", "mean", "var"}
        if self.update == "sparsegpt":
            found |= {"H"}
        return frozenset(found | ({"X"} if self.ratios != "uniform" else set()))


def find_metric(text: str) -> Metric:
    """Find a metric by name, or read it as an expression over W, X, G.

    Args:
        text: a name in `METRICS` or an expression.

    Raises:
        UserError: if it is neither, with the position of what is not understood.

    >>> find_metric("wanda").scope
    'row'
    """
    if text in METRICS:
        return METRICS[text]
    expression = parse(text)
    # W and its sums come from the tree.
    return Metric(expression, expression.needs & frozenset(Stats._fields))


METHODS: dict[str, Method] = {
    "magnitude": Method("magnitude"),
    "wanda": Method("wanda"),
    "wanda_alpha": Method("wanda_alpha"),
    "sparsegpt": Method("sparsegpt"),
    "ria": Method("ria"),
    "ria_permuted": Method("ria", permute=True),
    "gradient": Method("gradient"),
    "gblm": Method("gblm"),
    "pruner_zero": Method("pruner_zero"),
    "dsnot": Method("wanda", refine="dsnot"),
    "alps": Method("alps"),
    "owl": Method("wanda", ratios="owl"),
    "besa": Method("wanda", ratios="besa"),
    "wanda_update": Method("wanda", update="sparsegpt"),
}


def find_method(text: str) -> Method:
    """Find a method by name, or make one of a metric or an expression.

    >>> find_method("dsnot").refine
    'dsnot'
    """
    return METHODS[text] if text in METHODS else Method(text)


class PrunedLinear(NamedTuple):
    """Hold a pruned layer.

    Attributes:
        weight: [O, I] in the dtype that came, zero where removed.
        mask: True kept.
        permutation: of the input channels under which the mask is N:M, or None for the identity.

    >>> PrunedLinear(jnp.zeros((1, 1)), jnp.zeros((1, 1), bool), None).permutation is None
    True
    """

    weight: Float[Array, "O I"]
    mask: Bool[Array, "O I"]
    permutation: Any


def prune_linear(
    weight: Float[Array, "O I"],
    stats: Stats,
    method: Method,
    pattern: Pattern,
    where: str = "the layer",
    count: int | None = None,
) -> PrunedLinear:
    """Prune one linear layer.

    Args:
        weight: W, [O, I].
        stats: with the fields that ``method.needs`` names.
        method: see `Method`; its ratios have been put into the pattern already.
        pattern: how much and in which form.
        where: the layer's name, for messages and for ``refine_skip``.
        count: weights (or blocks) to remove, exactly, in place of the pattern's share.

    Returns:
        Weights, mask and permutation.

    Raises:
        UserError: for a pattern that does not fit, missing statistics, or scores that are not
            finite.

    >>> found = prune_linear(jnp.array([[1.0, -3.0]]), Stats(), Method("magnitude"), Pattern(0.5))
    >>> found.weight.tolist()
    [[0.0, -3.0]]
    """
    pattern.check(weight.shape, where)
    for field in sorted(method.needs):
        if getattr(stats, field) is None:
            raise UserError(
                f"the metric {method.metric!r} needs the statistic {field} of {where}, which was "
                "not gathered; gather it, or choose another metric"
            )
    wide = weight.astype(jnp.float32)
    if method.metric in SOLVERS:
        new, mask = _solve(wide, stats, method, pattern, where, count)
        return PrunedLinear(new.astype(weight.dtype), mask, None)
    mask, permutation = choose_mask(wide, stats, method, pattern, where, count)
    if method.refine == "dsnot" and not _skipped(where, method.refine_skip):
        if permutation is not None or pattern.block is not None:
            raise UserError(
                "DSnoT is asked for with permuted channels or blocks, whose form its exchanges "
                "would break; leave one of them out"
            )
        mask = dsnot(wide, mask, stats, nm=pattern.nm)
    if method.update == "sparsegpt":
        wide = reconstruct(wide, stats.H, mask, damping=method.damping)[0]
    return PrunedLinear(jnp.where(mask, wide, 0.0).astype(weight.dtype), mask, permutation)


def choose_mask(
    weight: Float[Array, "O I"],
    stats: Stats,
    method: Method,
    pattern: Pattern,
    where: str = "the layer",
    count: int | None = None,
) -> tuple[Bool[Array, "O I"], Any]:
    """Score a layer and apply the pattern.

    Args:
        weight: W in float32.
        stats: what the metric reads.
        method: its metric and ``permute`` count here.
        pattern: how much and in which form.
        where: for messages.
        count: as in `prune_linear`.

    Returns:
        Mask, and the permutation of channels or None.

    Raises:
        UserError: for scores that are not finite.

    >>> choose_mask(jnp.array([[1.0, 3.0]]), Stats(), Method("magnitude"), Pattern(0.5))[1] is None
    True
    """
    metric = find_metric(method.metric)
    scores = metric.apply(weight, stats)
    check_finite(scores, method.metric, where)
    if method.permute and pattern.nm:
        permutation = permute_channels(scores, *pattern.nm)
        return permuted_nm_mask(scores, permutation, *pattern.nm), permutation
    return mask_of(scores, pattern, metric.scope, count), None


def _solve(
    weight: Array, stats: Stats, method: Method, pattern: Pattern, where: str, count: int | None
) -> tuple[Array, Array]:
    if pattern.block or pattern.scope == "global":
        raise UserError(
            f"{method.metric} is asked for with {'blocks' if pattern.block else 'a global scope'}; "
            "it removes single weights or N:M of one layer at a time; choose another pattern"
        )
    scope = "row" if pattern.scope == "row" else "matrix"
    check_finite(stats.H, method.metric, f"{where} (its input's Hessian)")
    solver = sparsegpt if method.metric == "sparsegpt" else alps
    new, mask, _ = solver(
        weight,
        stats.H,
        pattern.sparsity,
        scope=scope,
        nm=pattern.nm,
        count=count,
        damping=method.damping,
    )
    check_finite(new, method.metric, where)
    return new, mask


def _skipped(where: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(where, pattern) for pattern in globs)
