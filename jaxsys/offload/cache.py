"""Which experts stay on the accelerator: caches as pure functions of a state and what happened.

A policy says how much each expert of a layer is worth; the cache keeps the most valuable ones. Each
layer has its own slots. An expert enters when its weights have crossed the link, for a token or
ahead of one, and the least valuable expert of its layer leaves.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxsys.core.errors import UserError
from jaxsys.offload.traces import Trace

Values = Float[np.ndarray, "E"]


class Event(NamedTuple):
    """Say what a router chose for a token.

    Attributes:
        layer: index of the mixture layer.
        experts: chosen ones.
        scores: the router's probabilities, [E].
        sequence: number of the token's sequence.

    >>> Event(0, (1, 3), np.ones(4) / 4, 0).experts
    (1, 3)
    """

    layer: int
    experts: Sequence[int]
    scores: np.ndarray
    sequence: int = 0


class Policy(NamedTuple):
    """Hold the functions of a cache policy; its memory is whatever they make of it.

    Attributes:
        name: for tables.
        init: (layers, experts) -> memory.
        observe: (memory, event) -> memory; the old one is left as it was.
        values: (memory, layer) -> what each expert is worth, [E]; the least valuable leaves.
        adaptive: whether what is resident ever changes.

    >>> lru().name
    'LRU'
    """

    name: str
    init: Callable[[int, int], Any]
    observe: Callable[[Any, Event], Any]
    values: Callable[[Any, int], Values]
    adaptive: bool = True


class CacheState(NamedTuple):
    """Hold what is resident, and what the policy remembers.

    Attributes:
        resident: [L, E].
        memory: the policy's.

    >>> CacheState(np.zeros((1, 2), bool), None).resident.shape
    (1, 2)
    """

    resident: Bool[np.ndarray, "L E"]
    memory: Any


def init_cache(policy: Policy, resident: Bool[np.ndarray, "L E"]) -> CacheState:
    """Start with what a plan keeps resident; each layer has as many slots for good.

    >>> init_cache(lru(), np.eye(2, dtype=bool)).resident.sum()
    np.int64(2)
    """
    return CacheState(resident.copy(), policy.init(*resident.shape))


def observe(policy: Policy, state: CacheState, event: Event) -> CacheState:
    """Let the policy learn what a router chose; what is resident stays.

    >>> state = init_cache(lru(), np.eye(2, dtype=bool))
    >>> observe(lru(), state, Event(0, (1,), np.ones(2) / 2)).resident.tolist()
    [[True, False], [False, True]]
    """
    return state._replace(memory=policy.observe(state.memory, event))


def admit(
    policy: Policy,
    state: CacheState,
    layer: int,
    experts: Sequence[int],
    *,
    pinned: Sequence[int] = (),
    force: bool = False,
) -> CacheState:
    """Take experts in whose weights have come, each in the place of the least valuable one.

    Args:
        policy: of the cache.
        state: before.
        layer: whose experts.
        experts: that have come, most valuable first.
        pinned: experts that may not leave (those in use).
        force: they enter even in the place of more valuable ones, as in a cache that every expert
            must pass.

    Returns:
        The state after; without slots, or where nothing less valuable may leave, unchanged.

    >>> state = init_cache(lru(), np.array([[True, False, False]]))
    >>> state = observe(lru(), state, Event(0, (2,), np.ones(3) / 3))
    >>> admit(lru(), state, 0, [2]).resident.tolist()
    [[False, False, True]]
    """
    if not policy.adaptive:
        return state
    resident = state.resident.copy()
    values = policy.values(state.memory, layer)
    for e in experts:
        held = [x for x in np.flatnonzero(resident[layer]) if x not in pinned]
        if resident[layer, e] or not held:
            continue
        worst = min(held, key=lambda x: values[x])
        if force or values[worst] < values[e]:
            resident[layer, worst], resident[layer, e] = False, True
    return state._replace(resident=resident)


def prefetch(
    predicted: Values, resident: Bool[np.ndarray, "E"], k: int, most: int = 1
) -> list[int]:
    """Choose which of a layer's experts to copy ahead of its router.

    Args:
        predicted: what each is expected to be worth to the next token in this layer: an early
            look of the layer's router, or a policy's values, [E].
        resident: which are there already, [E].
        k: experts of a token: only the k best predicted are wanted.
        most: copies.

    Returns:
        Experts, best first.

    >>> prefetch(np.array([0.1, 0.6, 0.3]), np.array([False, True, False]), 2)
    [2]
    """
    best = np.argsort(-predicted, kind="stable")[:k]
    return [int(e) for e in best if not resident[e]][:most]


def static() -> Policy:
    """Never change what is resident: llama.cpp's and Fiddler's cache.

    >>> static().adaptive
    False
    """
    return Policy("static", _zeros, lambda memory, event: memory, lambda m, layer: m[layer], False)


def lru() -> Policy:
    """Value an expert by when it was last used, as mixtral-offloading's cache does.

    Reference: arXiv 2312.17238.

    >>> policy = lru()
    >>> memory = policy.observe(policy.init(1, 3), Event(0, (1,), np.ones(3) / 3))
    >>> int(np.argmax(policy.values(memory, 0)))
    1
    """

    def observe(memory, event: Event):
        last, clock = memory
        last = last.copy()
        last[event.layer, list(event.experts)] = clock
        return last, clock + 1

    def init(n_layers: int, n_experts: int):
        return np.full((n_layers, n_experts), -1.0), 0

    return Policy("LRU", init, observe, lambda memory, layer: memory[0][layer])


def frequency(decay: float | int = 1.0) -> Policy:
    """Value an expert by how often it was used, old uses fading by ``decay`` a token if below 1.

    >>> policy = frequency()
    >>> memory = policy.observe(policy.init(1, 3), Event(0, (1, 2), np.ones(3) / 3))
    >>> policy.values(memory, 0).tolist()
    [0.0, 1.0, 1.0]
    """

    def observe(memory, event: Event):
        memory = memory.copy()
        memory[event.layer] *= decay
        memory[event.layer, list(event.experts)] += 1.0
        return memory

    return Policy("frequency", _zeros, observe, lambda memory, layer: memory[layer])


def score(alpha: float | int = 0.5, width: int = 2) -> Policy:
    """Value an expert by HybriMoE's running score.

    ``S ← α·s + (1 − α)·S`` for the router's p highest probabilities s, ``S ← (1 − α)·S`` for the
    rest, with p = width · k.

    Args:
        alpha: weight of the newest token; 0.5 in the released code.
        width: p / k; 2 in the released code.

    Reference: HybriMoE (arXiv 2504.05897), released code.

    >>> policy = score()
    >>> memory = policy.observe(policy.init(1, 3), Event(0, (1,), np.array([0.1, 0.6, 0.3])))
    >>> policy.values(memory, 0).tolist()
    [0.0, 0.3, 0.15]
    """

    def observe(memory, event: Event):
        memory = memory.copy()
        memory[event.layer] *= 1 - alpha
        best = np.argsort(-event.scores, kind="stable")[: width * len(event.experts)]
        memory[event.layer, best] += alpha * event.scores[best]
        return memory

    return Policy("HybriMoE score", _zeros, observe, lambda memory, layer: memory[layer])


class _Matched(NamedTuple):
    """Memory of `nearest_trace`: counts of this sequence, of all, and where the token is."""

    own: np.ndarray
    overall: np.ndarray
    sequence: int
    layer: int


def nearest_trace(stored: Float[np.ndarray, "M L E"]) -> Policy:
    """Value an expert by the stored sequence that is most like this one, as MoE-Infinity does.

    A sequence is its L × E matrix of counts. The stored one with the largest mean cosine over the
    layers predicts layer l from layer c as its row l scaled by ``1 − (l − c)/(L + 1)`` (layers that
    the token has passed are met in the next token); that times the sequence's own and the overall
    frequency (each plus one) is the value.

    Reconstruction: how the three factors are smoothed.

    Args:
        stored: count matrices of M sequences; `count_matrices` makes them from a trace.

    Returns:
        The policy.

    Raises:
        UserError: nothing stored.

    Reference: MoE-Infinity (arXiv 2401.14361).

    >>> policy = nearest_trace(np.eye(2)[:, None])  # one sequence used expert 0, the other 1
    >>> memory = policy.observe(policy.init(1, 2), Event(0, (1,), np.ones(2) / 2))
    >>> int(np.argmax(policy.values(memory, 0)))
    1
    """
    stored = np.asarray(stored, np.float64)
    if stored.ndim != 3 or not len(stored):
        raise UserError(
            f"the stored matrices have shape {stored.shape}; expected at least one sequence's "
            "counts, [M, L, E]; record a trace first"
        )
    unit = stored / np.maximum(np.linalg.norm(stored, axis=-1, keepdims=True), 1e-12)
    rows = stored / np.maximum(stored.sum(-1, keepdims=True), 1e-12)
    n_layers = stored.shape[1]

    def init(n_layers: int, n_experts: int):
        zeros = np.zeros((n_layers, n_experts))
        return _Matched(zeros, zeros, -1, 0)

    def observe(memory: _Matched, event: Event):
        new = event.sequence != memory.sequence
        own = np.zeros_like(memory.own) if new else memory.own.copy()
        overall = memory.overall.copy()
        own[event.layer, list(event.experts)] += 1
        overall[event.layer, list(event.experts)] += 1
        return _Matched(own, overall, event.sequence, event.layer)

    def values(memory: _Matched, layer: int) -> Values:
        norm = np.maximum(np.linalg.norm(memory.own, axis=-1, keepdims=True), 1e-12)
        alike = np.einsum("le,mle->m", memory.own / norm, unit)
        row = rows[int(np.argmax(alike)), layer]
        ahead = (layer - memory.layer) % n_layers
        depth = 1 - ahead / (n_layers + 1)
        own, overall = memory.own[layer], memory.overall[layer]
        share = (own + 1) / (own.sum() + len(own))
        return depth * row * share * (overall + 1) / (overall.sum() + len(own))

    return Policy("nearest trace", init, observe, values)


def count_matrices(trace: Trace) -> Float[np.ndarray, "M L E"]:
    """Count, for each sequence of a trace, how often each layer used each expert.

    >>> from jaxsys.offload.traces import synthetic_trace
    >>> count_matrices(synthetic_trace(32, 2, 4, 1, sequence_tokens=16)).sum(-1).tolist()
    [[16.0, 16.0], [16.0, 16.0]]
    """
    found = []
    for number in np.unique(trace.sequence):
        own = trace.experts[trace.sequence == number]
        hot = np.eye(trace.n_experts)[own]
        found.append(hot.sum((0, 2)))
    return np.stack(found)


def hits(policy: Policy, trace: Trace, slots: int) -> float:
    """Run a cache over a trace, every miss entering it, and give the share of hits.

    Args:
        policy: of the cache.
        trace: to run over.
        slots: of each layer; the first experts are resident at first.

    Returns:
        Hits per activation. A ``static`` policy keeps the first ``slots`` experts; to judge a
        profile, look up its best ones instead.

    >>> hits(lru(), Trace(np.zeros((9, 1, 1), int), np.zeros(9, int), 4), 1)
    1.0
    """
    n, layers, k = trace.experts.shape
    resident = np.zeros((layers, trace.n_experts), bool)
    resident[:, :slots] = True
    state, found = init_cache(policy, resident), 0
    for t in range(n):
        for layer in range(layers):
            chosen = trace.experts[t, layer].tolist()
            event = Event(layer, chosen, trace.probabilities(t, layer), int(trace.sequence[t]))
            found += int(state.resident[layer, chosen].sum())
            state = observe(policy, state, event)
            state = admit(policy, state, layer, chosen, pinned=chosen, force=True)
    return found / max(1, n * layers * k)


def _zeros(n_layers: int, n_experts: int) -> np.ndarray:
    return np.zeros((n_layers, n_experts))
