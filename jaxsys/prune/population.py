"""Score a population of pruning metrics in one compiled program: masks, then the model's loss.

Axes: ``P`` population, ``L`` length of a program, ``N`` layers of one shape, ``O`` outputs, ``I``
inputs, ``K`` individuals that are known already.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.prune.expression import terminals
from jaxsys.prune.patterns import Pattern, mask_of
from jaxsys.prune.stats import Stats
from jaxsys.search.interpret import assemble, run
from jaxsys.search.programs import Grammar
from jaxsys.search.shard import over_individuals

GRAMMAR = Grammar(("W", "G", "X"))  # Pruner-Zero's terminals and operators
HALF = Pattern(0.5)
# Added to the layer error of an individual that is not promoted: worse than any sensible loss.
NOT_PROMOTED = 1e4


@dataclass(frozen=True)
class Scoring:
    """Say how an expression is scored; static under jit.

    Attributes:
      loss_fn: (params, tokens) to the mean loss of the next token.
      grammar: terminals out of `expression.TERMINALS`, and operators.
      pattern: what is removed: in rows unless it says otherwise; not ``global``.
      promote: share of the individuals, those with the smallest layer error, whose loss is
        computed; 1 for all.
      in_out: matrices are [I, O] in the tree (GPT-2's Conv1D).

    >>> Scoring(lambda params, tokens: 0.0).grammar.terminals
    ('W', 'G', 'X')
    """

    loss_fn: Callable[[Any, Any], Any]
    grammar: Grammar = GRAMMAR
    pattern: Pattern = HALF
    promote: float = 1.0
    in_out: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.promote <= 1:
            raise UserError(
                f"promote is {self.promote}; it is the share of individuals whose loss is computed "
                "and lies in (0, 1]; correct it"
            )
        if self.pattern.scope == "global":
            raise UserError("a search compares weights within a layer; choose row or matrix")


@partial(jax.tree_util.register_dataclass, data_fields=["groups"], meta_fields=["paths"])
@dataclass(frozen=True)
class Layers:
    """Hold the linear layers, those of one shape stacked.

    Attributes:
      groups: for each shape the weights [N, O, I] and their statistics, stacked too.
      paths: for each shape the paths of the weights in the tree.

    >>> Layers((), ()).paths
    ()
    """

    groups: tuple[tuple[Any, Stats], ...]
    paths: tuple[tuple[str, ...], ...]


class Known(NamedTuple):
    """Hold individuals whose loss is known, by fingerprint.

    Attributes:
      fingerprints: [K, 2].
      fitness: [K]; infinite where there is none.

    >>> none_known().fitness.shape
    (0,)
    """

    fingerprints: UInt32[Array, "K 2"]
    fitness: Float[Array, "K"]


def none_known() -> Known:
    """Know nothing.

    >>> none_known().fingerprints.shape
    (0, 2)
    """
    return Known(jnp.zeros((0, 2), jnp.uint32), jnp.zeros(0, jnp.float32))


class Evaluated(NamedTuple):
    """Hold what the evaluation of a population found.

    Attributes:
      fitness: mean loss of the pruned model; infinite where scores or loss are not finite.
      fingerprints: hashes of all masks together.
      fresh: whether the loss was computed, and not looked up.
      errors: mean over layers of the share of Σ W² X, the output's energy, that is removed; None
        where all are promoted.

    >>> Evaluated._fields[0]
    'fitness'
    """

    fitness: Float[Array, "P"]
    fingerprints: UInt32[Array, "P 2"]
    fresh: Bool[Array, "P"]
    errors: Float[Array, "P"] | None = None


def stack_layers(params: Any, stats: Mapping[str, Stats], scoring: Scoring) -> Layers:
    """Collect the layers to prune and stack those of one shape.

    Args:
      params: nested dict of tensors.
      stats: by path of the layer (or of its weight), dense statistics, [O, I] in any case; these
        layers are pruned.
      scoring: see `Scoring`.

    Raises:
      UserError: for a layer that the tree lacks, that the pattern does not divide, or that lacks a
        statistic.

    >>> params = {"a": {"weight": jnp.ones((2, 4))}, "b": {"weight": jnp.ones((2, 4))}}
    >>> scoring = Scoring(lambda p, t: 0.0, Grammar(("W", "X")))
    >>> layers = stack_layers(params, {k: Stats(X=jnp.ones(4)) for k in params}, scoring)
    >>> layers.paths, layers.groups[0][0].shape
    ((('a.weight', 'b.weight'),), (2, 2, 4))
    """
    flat = flatten(params)
    wanted = [name for name in ("G", "X", "G1") if name in scoring.grammar.terminals]
    if scoring.promote < 1 and "X" not in wanted:
        wanted.append("X")
    by_shape: dict[tuple[int, ...], list[tuple[str, Any, Stats]]] = {}
    for name, found in stats.items():
        path = name if name in flat else f"{name}.weight"
        if path not in flat:
            raise UserError(f"the tree has no layer {name!r}, for which there are statistics")
        weight = jnp.asarray(flat[path])
        weight = weight.T if scoring.in_out else weight
        scoring.pattern.check(weight.shape, name)
        lacking = [field for field in wanted if getattr(found, field) is None]
        if lacking:
            raise UserError(f"layer {name!r} lacks the statistic {lacking[0]}; gather it")
        own = Stats(**{k: jnp.asarray(getattr(found, k), jnp.float32) for k in wanted})
        by_shape.setdefault(weight.shape, []).append((path, weight, own))
    if not by_shape:
        raise UserError("there are no layers to prune; give statistics of at least one")
    groups = tuple(
        (
            jnp.stack([w for _, w, _ in g]),
            jax.tree.map(lambda *s: jnp.stack(s), *(s for *_, s in g)),
        )
        for g in by_shape.values()
    )
    return Layers(groups, tuple(tuple(p for p, _, _ in g) for g in by_shape.values()))


def mask_fingerprint(
    mask: Bool[Array, "..."], salt: int | Int[Array, ""] = 0
) -> UInt32[Array, "2"]:
    """Hash a mask into two numbers: the sums of random numbers that belong to what is kept.

    Sums of several masks, each with a salt of its own, are a hash of them together.

    Args:
      mask: any shape.
      salt: another one gives unrelated numbers.

    >>> a, b = jnp.array([True, False]), jnp.array([False, True])
    >>> bool((mask_fingerprint(a) == mask_fingerprint(b)).any())
    False
    """
    place = jax.lax.iota(jnp.uint32, mask.size).reshape(mask.shape)
    seed = place * jnp.uint32(0x9E3779B1) + jnp.asarray(salt).astype(jnp.uint32) * jnp.uint32(
        0x85EBCA77
    )

    def total(key: int) -> Array:
        # The finaliser of MurmurHash3.
        x = seed ^ jnp.uint32(key)
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return jnp.sum(jnp.where(mask, x ^ (x >> 16), jnp.uint32(0)), dtype=jnp.uint32)

    return jnp.stack([total(0x1B873593), total(0xCC9E2D51)])


class _Pruned(NamedTuple):
    weights: tuple[Any, ...]  # one stack for each group
    fingerprint: Any
    finite: Any


def _prune(program: Any, layers: Layers, scoring: Scoring) -> _Pruned:
    """Mask every layer by one program, layers of a shape one after another."""

    def one(layer: Any) -> Any:
        weight, stats, salt = layer
        wide = weight.astype(jnp.float32)
        scores = run(scoring.grammar, code, terminals(wide, stats, scoring.grammar.terminals))
        mask = mask_of(scores, scoring.pattern, "row")
        kept = jnp.where(mask, weight, jnp.zeros((), weight.dtype))
        return kept, mask_fingerprint(mask, salt), jnp.isfinite(scores).all()

    code = assemble(scoring.grammar, program)
    weights, prints, finite, first = [], [], [], 0
    for weight, stats in layers.groups:
        salts = first + jnp.arange(weight.shape[0])
        first += weight.shape[0]
        kept, fingerprint, fine = jax.lax.map(one, (weight, stats, salts))
        weights.append(kept)
        prints.append(jnp.sum(fingerprint, 0, dtype=jnp.uint32))
        finite.append(fine.all())
    return _Pruned(tuple(weights), sum(prints[1:], prints[0]), jnp.stack(finite).all())


def _layer_error(weights: tuple[Any, ...], layers: Layers) -> Any:
    """Average over layers the share of Σ W² X that is removed."""

    def energy(stack: Any, stats: Stats) -> Any:
        return jnp.einsum("noi,ni->n", jnp.square(stack.astype(jnp.float32)), stats.X)

    shares = [
        energy(stack - kept, stats) / jnp.maximum(energy(stack, stats), 1e-30)
        for kept, (stack, stats) in zip(weights, layers.groups, strict=True)
    ]
    return jnp.mean(jnp.concatenate(shares))


def _loss(weights: tuple[Any, ...], layers: Layers, params: Any, tokens: Any, scoring: Scoring):
    """Put masked weights into the tree and compute the loss."""
    flat = flatten(params)
    for stack, paths in zip(weights, layers.paths, strict=True):
        for i, path in enumerate(paths):
            flat[path] = stack[i].T if scoring.in_out else stack[i]
    masked = jax.tree.unflatten(jax.tree.structure(params), list(flat.values()))
    return jnp.asarray(scoring.loss_fn(masked, tokens), jnp.float32)


def _share(
    programs: Any, layers: Layers, params: Any, tokens: Any, known: Known, scoring: Scoring
) -> Evaluated:
    """Evaluate one device's individuals in turn; a mask met before is not run again."""
    n = programs.shape[0]

    def one(seen: Known, item: Any) -> Any:
        i, program = item
        pruned = _prune(program, layers, scoring)
        # What is infinite lends itself to nobody: it may stand for scores that were not finite.
        table = Known(*(jnp.concatenate(pair) for pair in zip(known, seen, strict=True)))
        same = jnp.all(table.fingerprints == pruned.fingerprint[None], 1)
        value = jnp.min(jnp.where(same, table.fitness, jnp.inf))
        fresh = ~jnp.isfinite(value) & pruned.finite
        fitness = jax.lax.cond(
            fresh,
            lambda: _loss(pruned.weights, layers, params, tokens, scoring),
            lambda: jnp.where(pruned.finite, value, jnp.inf),
        )
        fitness = jnp.where(jnp.isfinite(fitness), fitness, jnp.inf)
        found = Evaluated(fitness, pruned.fingerprint, fresh)
        seen = Known(
            seen.fingerprints.at[i].set(pruned.fingerprint), seen.fitness.at[i].set(fitness)
        )
        return seen, found

    start = Known(jnp.zeros((n, 2), jnp.uint32), jnp.full(n, jnp.inf, jnp.float32))
    return jax.lax.scan(one, start, (jnp.arange(n), programs))[1]


@partial(jax.jit, static_argnames=("scoring", "mesh"))
def evaluate(
    programs: Int[Array, "P L"],
    layers: Layers,
    params: Any,
    tokens: Any,
    known: Known,
    scoring: Scoring,
    mesh: Mesh | None = None,
) -> Evaluated:
    """Prune the model by every program and compute its loss; compiled once for all populations.

    An individual whose masks are those of one before, here or in ``known``, shares its fitness.
    With ``promote`` below 1 the layer error of all comes first; it is blind to all but W and X, for
    which Wanda's score is the best in every row, so it sorts out the useless and no more. Those who
    are not promoted have 1e4 and their error as fitness.

    Args:
      programs: postfix opcodes.
      layers: from `stack_layers`.
      params: the dense model.
      tokens: for ``loss_fn``.
      known: fitness by fingerprint.
      scoring: see `Scoring`.
      mesh: spread individuals over its devices; the fitness is the same as without.

    Returns:
      See `Evaluated`.

    >>> params = {"a": {"weight": jnp.array([[1.0, 2.0, 3.0, 4.0]])}}
    >>> scoring = Scoring(lambda p, t: jnp.sum(p["a"]["weight"]), Grammar(("W",)))
    >>> layers = stack_layers(params, {"a": Stats()}, scoring)
    >>> programs = jnp.stack([jnp.zeros(31, int).at[0].set(1)] * 2)
    >>> found = evaluate(programs, layers, params, None, none_known(), scoring)
    >>> found.fitness.tolist(), found.fresh.tolist()
    ([7.0, 7.0], [True, False])
    """
    share = over_individuals(partial(_share, scoring=scoring), mesh)
    if scoring.promote == 1:
        return share(programs, layers, params, tokens, known)

    def layer_errors(programs: Any, layers: Layers) -> Any:
        def one(program: Any) -> Any:
            pruned = _prune(program, layers, scoring)
            return jnp.where(pruned.finite, _layer_error(pruned.weights, layers), jnp.inf)

        return jax.lax.map(one, programs)

    errors = over_individuals(layer_errors, mesh)(programs, layers)
    n = programs.shape[0]
    promoted = jnp.sort(jnp.argsort(errors)[: math.ceil(scoring.promote * n)])
    found = share(programs[promoted], layers, params, tokens, known)
    others = Evaluated(NOT_PROMOTED + errors, jnp.zeros((n, 2), jnp.uint32), jnp.zeros(n, bool))
    placed = jax.tree.map(lambda all_, own: all_.at[promoted].set(own), others, found)
    return placed._replace(errors=errors)


def population_fitness(
    programs: Int[Array | np.ndarray, "P L"],
    params: Any,
    stats: Mapping[str, Stats],
    tokens: Any,
    scoring: Scoring,
    mesh: Mesh | None = None,
) -> Float[Array, "P"]:
    """Prune a model by each of many expressions and give the loss of each pruned model.

    Statistics are those of the dense model; the sequential protocol, which gathers them anew behind
    pruned blocks, is for finalists. The masks are those of `masks.row_mask`, exact in number, whose
    threshold is found by bisection on the bits of the scores.

    Args:
      programs: postfix opcodes of ``scoring.grammar``.
      params: the dense model.
      stats: by layer.
      tokens: for ``scoring.loss_fn``.
      scoring: see `Scoring`.
      mesh: spread individuals over its devices.

    Returns:
      Mean loss; infinite where scores or loss are not finite.

    Raises:
      UserError: see `stack_layers`.

    Reference: arXiv 2406.02924.

    >>> params = {"a": {"weight": jnp.array([[1.0, 2.0, 3.0, 4.0]])}}
    >>> scoring = Scoring(lambda p, t: jnp.sum(p["a"]["weight"]), Grammar(("W",)))
    >>> programs = jnp.zeros((1, 31), int).at[0, 0].set(1)
    >>> population_fitness(programs, params, {"a": Stats()}, None, scoring).tolist()
    [7.0]
    """
    layers = stack_layers(params, stats, scoring)
    found = evaluate(jnp.asarray(programs), layers, params, tokens, none_known(), scoring, mesh)
    return found.fitness
