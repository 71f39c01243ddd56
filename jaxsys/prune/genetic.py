"""The genetic search for a pruning metric: a generation is one jitted step over one pytree.

Axes: ``P`` population, ``L`` length of a program, ``K`` entries of the archive.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt32

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.core.tree import fingerprint
from jaxsys.prune.population import NOT_PROMOTED, Known, Layers, Scoring, evaluate, stack_layers
from jaxsys.prune.stats import Stats
from jaxsys.search import evolve
from jaxsys.search.evolve import EvolveConfig
from jaxsys.search.programs import Grammar, random_programs, to_string
from jaxsys.search.shard import replicate

SAVE_EVERY_S = 20


EVOLVE = EvolveConfig(
    population=64, crossover=0.7, mutation=0.7, node_rate=0.3, mode="steady", oos="sound"
)


@dataclass(frozen=True)
class GeneticConfig:
    """Describe a search.

    Reconstruction: Pruner-Zero names the steps of its search (tournament, crossover, node mutation,
    simplification, offspring added to the population) and no figures.

    Attributes:
      evolve: the evolution; by default children are added to the population, of which the best
        remain.
      generations: the first population counts as one.
      strategy: ``evolution``, or ``random`` for programs drawn anew each time (to compare with).
      archive: K, how many of the best distinct individuals are kept.
      seed: of everything random.

    >>> GeneticConfig().evolve.oos
    'sound'
    """

    evolve: EvolveConfig = EVOLVE
    generations: int = 20
    strategy: str = "evolution"
    archive: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in ("evolution", "random"):
            raise UserError(f"strategy is {self.strategy!r}; expected evolution or random")
        if self.generations < 1 or self.archive < 1:
            raise UserError(
                f"{self.generations} generations and an archive of {self.archive} are asked for; "
                "expected at least one of each"
            )


class Archive(NamedTuple):
    """Hold the best individuals of different masks, best first.

    Attributes:
      programs: of those with equal masks the shortest, [K, L].
      fingerprints: [K, 2].
      fitness: [K]; infinite behind the last.

    >>> Archive._fields
    ('programs', 'fingerprints', 'fitness')
    """

    programs: Int[Array, "K L"]
    fingerprints: UInt32[Array, "K 2"]
    fitness: Float[Array, "K"]


class SearchState(NamedTuple):
    """The whole state of a search, a pytree.

    >>> SearchState._fields
    ('population', 'fingerprints', 'archive')
    """

    population: evolve.State
    fingerprints: UInt32[Array, "P 2"]
    archive: Archive


class Info(NamedTuple):
    """What a generation did.

    Attributes:
      best: loss of the best individual so far.
      median: loss of the children, those without a finite one being infinite.
      fresh: children whose loss was computed, not looked up.
      finite: children with finite scores and loss.

    >>> Info._fields[0]
    'best'
    """

    best: Float[Array, ""]
    median: Float[Array, ""]
    fresh: Int[Array, ""]
    finite: Int[Array, ""]


class Found(NamedTuple):
    """What a search found.

    Attributes:
      state: the last.
      history: one dict for each generation.
      grammar: to read the programs with.

    >>> Found._fields
    ('state', 'history', 'grammar')
    """

    state: SearchState
    history: list[dict[str, Any]]
    grammar: Grammar

    def best(self, n: int) -> list[dict[str, Any]]:
        """Give the n best expressions of different masks: text and loss.

        >>> Found._fields.index("state")
        0
        """
        archive = jax.device_get(self.state.archive)
        return [
            {"expression": to_string(self.grammar, program), "loss": float(fitness)}
            for program, fitness in zip(archive.programs[:n], archive.fitness[:n], strict=True)
            if np.isfinite(fitness)
        ]


def first_state(grammar: Grammar, config: GeneticConfig) -> SearchState:
    """Draw the first population; its fitness comes with the first step.

    >>> first_state(Grammar(("W",)), GeneticConfig(archive=8)).archive.fitness.shape
    (8,)
    """
    size, k = config.evolve.population, config.archive
    population = evolve.State(
        evolve.first_programs(grammar, config.evolve, config.seed),
        jnp.full(size, jnp.inf, jnp.float32),
        jax.random.key(config.seed),
        jnp.zeros((), jnp.int32),
    )
    archive = Archive(
        jnp.zeros((k, grammar.length), jnp.int32),
        jnp.zeros((k, 2), jnp.uint32),
        jnp.full(k, jnp.inf, jnp.float32),
    )
    return SearchState(population, jnp.zeros((size, 2), jnp.uint32), archive)


@partial(jax.jit, static_argnames=("config", "scoring", "random", "mesh"))
def step(
    state: SearchState,
    proposals: Int[Array, "P L"],
    layers: Layers,
    params: Any,
    tokens: Any,
    *,
    config: EvolveConfig,
    scoring: Scoring,
    random: bool = False,
    mesh: Mesh | None = None,
) -> tuple[SearchState, Info]:
    """Take one generation, the first or any other; compiled once.

    A child whose masks are those of an individual that stays, or of an earlier child, does not
    enter the population.

    Args:
      state: the last.
      proposals: children of a random search, else not looked at.
      layers: from `population.stack_layers`.
      params: the dense model.
      tokens: for ``scoring.loss_fn``.
      config: the evolution.
      scoring: how expressions are scored.
      random: take the proposals as children.
      mesh: spread individuals over its devices.

    Returns:
      The next state and `Info`.

    >>> params, config = {"a": {"weight": jnp.array([[1.0, 2.0]])}}, EvolveConfig(population=4)
    >>> scoring = Scoring(lambda p, t: -jnp.sum(p["a"]["weight"]), Grammar(("W",)))
    >>> layers = stack_layers(params, {"a": Stats()}, scoring)
    >>> state = first_state(scoring.grammar, GeneticConfig(config, archive=4))
    >>> arrays = (state.population.programs, layers, params, None)
    >>> float(step(state, *arrays, config=config, scoring=scoring)[1].best)
    -2.0
    """
    old = state.population
    first = old.generation == 0
    key, children = evolve.offspring(scoring.grammar, config, old)
    children = jnp.where(first, old.programs, proposals if random else children)
    known = Known(state.archive.fingerprints, state.archive.fitness)
    found = evaluate(children, layers, params, tokens, known, scoring, mesh)
    scored = found.fitness < NOT_PROMOTED
    again = _repeats(config, state, found.fingerprints, scored)
    scores = jnp.where(again, jnp.inf, found.fitness)
    keep = evolve.survivors(config, old.fitness, scores)
    keep = jnp.where(first, config.population + jnp.arange(keep.shape[0]), keep)
    pairs = (
        (old.programs, children),
        (old.fitness, scores),
        (state.fingerprints, found.fingerprints),
    )
    programs, fitness, prints = (jnp.concatenate(pair)[keep] for pair in pairs)
    finite = jnp.where(scored, found.fitness, jnp.inf)
    archive = _archived(state.archive, children, found.fingerprints, finite)
    info = Info(
        archive.fitness[0],
        jnp.median(found.fitness),
        jnp.sum(found.fresh),
        jnp.sum(jnp.isfinite(found.fitness)),
    )
    population = evolve.State(programs, fitness, key, old.generation + 1)
    return SearchState(population, prints, archive), info


def _repeats(config: EvolveConfig, state: SearchState, prints: Any, scored: Any) -> Any:
    """Tell which children have the masks of one that stays or came before."""
    fitness = state.population.fitness
    stays = fitness < NOT_PROMOTED
    if config.mode == "generational":
        elites = jnp.argsort(fitness)[: config.elites]
        stays &= jnp.zeros_like(stays).at[elites].set(True)
    n = prints.shape[0]
    old = jnp.all(prints[:, None] == state.fingerprints[None], -1) & stays[None]
    new = jnp.all(prints[:, None] == prints[None], -1) & scored[None]
    earlier = jnp.arange(n)[None] < jnp.arange(n)[:, None]
    return scored & (jnp.any(old, 1) | jnp.any(new & earlier, 1))


def _archived(archive: Archive, programs: Any, prints: Any, fitness: Any) -> Archive:
    """Add individuals, keeping one for each mask and the best of all."""
    all_ = Archive(
        *(jnp.concatenate(p) for p in zip(archive, (programs, prints, fitness), strict=True))
    )
    # Equal masks next to each other, the finite and the shortest first.
    size = jnp.sum(all_.programs > 0, axis=1)
    order = jnp.lexsort((size, all_.fitness, all_.fingerprints[:, 1], all_.fingerprints[:, 0]))
    all_ = Archive(*(x[order] for x in all_))
    prints = all_.fingerprints
    same = jnp.all(prints[1:] == prints[:-1], axis=1)
    alone = jnp.concatenate([jnp.ones(1, bool), ~same])
    fitness = jnp.where(alone, all_.fitness, jnp.inf)
    best = jnp.argsort(fitness)[: archive.fitness.shape[0]]
    return Archive(all_.programs[best], prints[best], fitness[best])


def search(
    params: Any,
    stats: Mapping[str, Stats],
    tokens: Any,
    scoring: Scoring,
    config: GeneticConfig | None = None,
    *,
    out: Path | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """Search for the expression whose pruned model has the smallest loss.

    Args:
      params: the dense model.
      stats: of the layers to prune, from calibration text.
      tokens: for ``scoring.loss_fn``; calibration text as well, never a test set.
      scoring: see `Scoring`.
      config: see `GeneticConfig`.
      out: folder for the state; a search that was stopped goes on there, and one with more
        generations is continued.
      mesh: spread individuals over its devices; all processes get the same result.
      progress: called with (generations done, in all).

    Returns:
      State, history and how to read them.

    Raises:
      UserError: if the folder holds another search, or no individual has a finite loss.

    Reference: arXiv 2406.02924.

    >>> params = {"a": {"weight": jnp.array([[1.0, 2.0, 3.0, 4.0]])}}
    >>> loss = lambda p, tokens: -jnp.sum(p["a"]["weight"])
    >>> config = GeneticConfig(EvolveConfig(population=8), generations=2, archive=8)
    >>> search(params, {"a": Stats()}, None, Scoring(loss, Grammar(("W",))), config).best(1)
    [{'expression': ..., 'loss': -7.0}]
    """
    config = config or GeneticConfig()
    layers = stack_layers(params, stats, scoring)
    state, history = first_state(scoring.grammar, config), []
    store = None if out is None else RunStore(out / "state", keep=1)
    settings = {} if store is None else _settings(config, scoring, params, stats, tokens)
    state, layers, params, tokens = replicate((state, layers, params, tokens), mesh)
    if store is not None and (latest := store.latest()) is not None:
        state, meta = store.restore(latest, state)
        history = list(meta["history"])
        _check(settings, meta["settings"], out)
    random, size = config.strategy == "random", config.evolve.population
    saved_s = time.monotonic()
    for generation in range(len(history), config.generations):
        proposals = state.population.programs
        if random:
            seed = _mixed(config.seed, generation)
            proposals = jnp.asarray(random_programs(scoring.grammar, size, seed=seed))
        state, info = step(
            state,
            proposals,
            layers,
            params,
            tokens,
            config=config.evolve,
            scoring=scoring,
            random=random,
            mesh=mesh,
        )
        history.append(_entry(history, info, size, _text(scoring.grammar, state)))
        last = generation + 1 == config.generations
        if store is not None and (last or time.monotonic() - saved_s > SAVE_EVERY_S):
            store.save(generation + 1, state, {"history": history, "settings": settings})
            saved_s = time.monotonic()
        if progress:
            progress(generation + 1, config.generations)
    if not np.isfinite(np.asarray(state.archive.fitness[0])):
        raise UserError(
            "no expression has a finite loss; expected a model whose loss is finite when pruned; "
            "look at its weights, or lower the sparsity"
        )
    return Found(state, history, scoring.grammar)


def _entry(
    history: list[dict[str, Any]], info: Info, size: int, expression: str | None
) -> dict[str, Any]:
    before = history[-1] if history else {"evaluations": 0, "fresh": 0}
    return {
        "generation": len(history) + 1,
        "evaluations": before["evaluations"] + size,
        "fresh": before["fresh"] + int(info.fresh),
        "finite": int(info.finite),
        "best": float(info.best),
        "median": float(info.median),
        "expression": expression,
    }


def _mixed(seed: int, generation: int) -> int:
    return int(np.random.SeedSequence([seed, generation]).generate_state(1)[0])


def _text(grammar: Grammar, state: SearchState) -> str | None:
    """Write the best expression so far."""
    if not np.isfinite(np.asarray(state.archive.fitness[0])):
        return None
    return to_string(grammar, np.asarray(state.archive.programs[0]))


def _settings(
    config: GeneticConfig, scoring: Scoring, params: Any, stats: Any, tokens: Any
) -> dict[str, str]:
    """Say what must be the same when a search goes on."""
    plain = dataclasses.asdict(config)
    plain.pop("generations")
    grammar = scoring.grammar
    return {
        **{name: str(value) for name, value in plain.items()},
        "symbols": " ".join(grammar.symbols),
        "length and height": f"{grammar.length} {grammar.height}",
        "pattern": str(scoring.pattern),
        "promote": str(scoring.promote),
        "model": _digest(params),
        "statistics": _digest(dict(stats)),
        "tokens": _digest({"tokens": tokens}),
    }


def _digest(tree: Any) -> str:
    return hashlib.blake2b(str(fingerprint(tree)).encode(), digest_size=8).hexdigest()


def _check(settings: dict[str, str], saved: dict[str, str], out: Any) -> None:
    for name, value in settings.items():
        if saved.get(name) != value:
            raise UserError(
                f"{out} holds another search: its {name} is {saved.get(name)} and this one's "
                f"{value}; give the same settings or another folder"
            )
