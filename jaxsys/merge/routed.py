"""What all routed merges store and how they are served: shared leaves, and parts that are added.

θ(w) = shared + Σ_n w_n part_n. Mediator, EMR, TALL masks, Twin-Merging and WEMoE differ in what
they put there, and in where the weights w come from.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.core.tree import unflatten
from jaxsys.merge.sparse import Part, choose, decode, experts_of, stored_bytes


class Routed(NamedTuple):
    """Hold a family of experts in parts; a pytree.

    Attributes:
      shared: path to leaf: what every request begins with.
      parts: path to the experts' parts of that leaf; other leaves are the same for all requests.

    >>> Routed({"w": jnp.ones(2)}, {}).parts
    {}
    """

    shared: dict[str, Any]
    parts: dict[str, Part]


class Cost(NamedTuple):
    """Say what a routed family takes.

    Attributes:
      stored_bytes: of all its arrays.
      model_bytes: of one model in the dtype of the shared leaves.
      ratio: the first over the second.
      routed_fraction: share of the parameters that have parts (f).
      request_flops: additions and products to make one request's weights from one expert's parts;
        a blend of m experts takes m times as many.

    >>> cost(Routed({"w": jnp.ones(4)}, {})).ratio
    1.0
    """

    stored_bytes: int
    model_bytes: int
    ratio: float
    routed_fraction: float
    request_flops: int


def count_experts(routed: Routed) -> int:
    """Count the experts; without parts there is one, the shared model.

    Raises:
      UserError: if the parts disagree.

    >>> count_experts(Routed({"w": jnp.ones(4)}, {}))
    1
    """
    counts = {experts_of(part) for part in routed.parts.values()}
    if len(counts) > 1:
        raise UserError(f"parts hold {sorted(counts)} experts; all must hold as many; mend them")
    return counts.pop() if counts else 1


def cost(routed: Routed) -> Cost:
    """Account for bytes and work.

    >>> from jaxsys.merge.sparse import encode
    >>> part = encode(np.ones((2, 80), np.float32), 0.1, bits=16)
    >>> cost(Routed({"w": jnp.ones(80, jnp.bfloat16)}, {"w": part})).stored_bytes
    212
    """
    sizes = {path: math.prod(leaf.shape) for path, leaf in routed.shared.items()}
    in_parts = sum(sizes[path] for path in routed.parts)
    stored, model = stored_bytes(routed), stored_bytes(routed.shared)
    share = in_parts / max(sum(sizes.values()), 1)
    return Cost(stored, model, stored / max(model, 1), share, 2 * in_parts)


def materialise(
    routed: Routed,
    weights: Float[Array | np.ndarray, "N"] | Mapping[str, Any],
    *,
    dtype: Any = None,
) -> dict[str, Any]:
    """Make the parameters of a request: θ = shared + Σ_n w_n part_n. Pure; jit and vmap do.

    Args:
      routed: the family.
      weights: [N] of the experts, or for each path of a part its own (WEMoE).
      dtype: of all leaves; those of `shared` by default.

    Returns:
      Nested dict of parameters; leaves without parts are those of `shared`.

    >>> from jaxsys.merge.sparse import Dense
    >>> routed = Routed({"w": jnp.ones(2)}, {"w": Dense(jnp.array([[1.0, 0.0], [0.0, 4.0]]))})
    >>> materialise(routed, jnp.array([0.5, 0.5]))["w"].tolist()
    [1.5, 3.0]
    """
    flat = {}
    for path, leaf in routed.shared.items():
        target = leaf.dtype if dtype is None else dtype
        if path in routed.parts:
            w = jnp.asarray(weights[path] if isinstance(weights, Mapping) else weights)
            added = _blend(routed.parts[path], w.astype(jnp.float32), tuple(leaf.shape))
            leaf = jnp.asarray(leaf).astype(jnp.float32) + added
        flat[path] = leaf if leaf.dtype == target else jnp.asarray(leaf).astype(target)
    return unflatten(flat)


def _blend(part: Part, weights: Array, shape: tuple[int, ...]) -> Array:
    # One expert at a time: N dense copies of a large leaf would not fit beside the model.
    def step(total: Array, i: Array) -> tuple[Array, None]:
        return total + weights[i] * decode(choose(part, i[None]), shape)[0], None

    total, _ = jax.lax.scan(step, jnp.zeros(shape), jnp.arange(weights.shape[0]))
    return total


@partial(jax.jit, static_argnames="dtype")
def _served(routed: Routed, experts: Array, weights: Array, dtype: Any) -> dict[str, Any]:
    parts = {path: choose(part, experts) for path, part in routed.parts.items()}
    return materialise(Routed(routed.shared, parts), weights, dtype=dtype)


class Answer(NamedTuple):
    """Say what serves a request.

    Attributes:
      params: nested parameters of the request.
      weights: [N] of the experts, as served.
      uncertainty: U in [0, 1] of the router, or 0 where weights were given.
      cached: whether these parameters stood ready.

    >>> Answer({}, np.ones(1), 0.0, False).cached
    False
    """

    params: dict[str, Any]
    weights: Float[np.ndarray, "N"]
    uncertainty: float
    cached: bool


class Server:
    """Make the parameters of requests, and keep those of the last few.

    Weights are rounded to multiples of 1/levels, so that near requests share their parameters.

    Args:
      routed: the family.
      route: ``route(tokens, mask) -> (weights [N], uncertainty)`` of one request; without it
        weights must be given.
      capacity: how many parameter sets are kept; the shared leaves are counted once.
      levels: steps of a weight.
      dtype: of the parameters served; that of the shared leaves by default.

    >>> from jaxsys.merge.sparse import Dense
    >>> routed = Routed({"w": jnp.ones(2)}, {"w": Dense(jnp.eye(2))})
    >>> server = Server(routed)
    >>> server.serve(weights=[1.0, 0.0]).params["w"].tolist()
    [2.0, 1.0]
    >>> server.serve(weights=[0.999, 0.001]).cached
    True
    """

    def __init__(
        self,
        routed: Routed,
        route: Callable[..., tuple[Any, Any]] | None = None,
        *,
        capacity: int = 4,
        levels: int = 16,
        dtype: Any = None,
    ):
        if capacity < 0 or levels < 1:
            raise UserError(
                f"capacity is {capacity} and levels {levels}; expected at least 0 and 1; raise them"
            )
        self.routed, self.route = routed, route
        self.levels, self.dtype = levels, dtype
        self._capacity, self._kept = capacity, OrderedDict()

    def serve(self, tokens: Any = None, mask: Any = None, *, weights: Any = None) -> Answer:
        """Make one request's parameters.

        Args:
          tokens: [T] of the prompt, for the router.
          mask: [T] which of them are no padding.
          weights: [N], in place of the router's.

        Raises:
          UserError: without weights where there is no router, or with another number of them.

        >>> Server(Routed({"w": jnp.ones(2)}, {})).serve(weights=[1.0]).params["w"].tolist()
        [1.0, 1.0]
        """
        unsure = 0.0
        if weights is None:
            if self.route is None:
                raise UserError("this family has no router; give the weights of its experts")
            weights, unsure = self.route(tokens, mask)
        n = count_experts(self.routed)
        values = np.asarray(weights, np.float64).reshape(-1)
        if values.size != n:
            raise UserError(f"got {values.size} weights; the family has {n} experts; give {n}")
        codes = round_weights(values, self.levels)
        key = tuple(int(c) for c in codes)
        served = codes / self.levels
        cached = key in self._kept
        if cached:
            self._kept.move_to_end(key)
            return Answer(self._kept[key], served, float(unsure), True)
        params = self._make(served)
        self._kept[key] = params
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return Answer(params, served, float(unsure), False)

    def _make(self, weights: np.ndarray) -> dict[str, Any]:
        if not self.routed.parts:
            return materialise(self.routed, jnp.ones(1), dtype=self.dtype)
        # Only the experts that take part are decoded.
        active = np.flatnonzero(weights)
        active = active if active.size else np.zeros(1, np.int64)
        picked = jnp.asarray(weights[active], jnp.float32)
        return _served(self.routed, jnp.asarray(active), picked, self.dtype)


def round_weights(weights: np.ndarray, levels: int) -> np.ndarray:
    """Round weights to whole numbers of 1/levels that keep their sum, by largest remainder.

    Args:
      weights: [N].
      levels: steps of a weight.

    Returns:
      [N] whole numbers whose sum is that of the weights times levels, rounded.

    >>> round_weights(np.array([0.34, 0.33, 0.33]), 8).tolist()
    [3, 3, 2]
    """
    scaled = np.asarray(weights, np.float64) * levels
    codes = np.floor(scaled + 1e-9)
    left = round(float(scaled.sum())) - int(codes.sum())
    order = np.argsort(-(scaled - codes), kind="stable")
    codes[order[: max(left, 0)]] += 1
    return codes.astype(np.int64)
