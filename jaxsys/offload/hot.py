"""Experts that come and go: a cache of them on the accelerator, run by a policy of `cache`.

Every expert also has its place in the CPU's memory (a view of the file), so one that leaves is
forgotten and not copied back. A layer keeps as many experts as the plan gives it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxsys.offload.cache import CacheState, Event, Policy, admit, init_cache, observe
from jaxsys.offload.types import Plan


class HotExperts:
    """Hold the weights of the experts that a cache keeps on the accelerator.

    Args:
        policy: which of a layer's experts is worth least.
        plan: which experts are there at first, and so how many of each layer.
        weights: (layer, expert) to its tree in the CPU's memory.
        device: the accelerator.

    >>> from jaxsys.offload.cache import lru
    >>> from jaxsys.offload.types import Part
    >>> parts = tuple(Part(0, "expert", 4, 1.0, 4, e, 0.5) for e in range(2))
    >>> plan = Plan(parts, (4, 0), (0, 0), ("accelerator",))
    >>> trees = {(0, e): np.ones(1) * e for e in range(2)}
    >>> hot = HotExperts(lru(), plan, trees, jax.devices()[0])
    >>> hot.get(0, 0).tolist(), hot.get(0, 1)
    ([0.0], None)
    >>> hot.took(0, [1], np.ones((1, 2)), {1: jax.numpy.ones(1)})
    >>> hot.get(0, 0), hot.get(0, 1).tolist()
    (None, [1.0])
    """

    def __init__(
        self, policy: Policy, plan: Plan, weights: Mapping[tuple[int, int], Any], device: Any
    ):
        parts = [part for part in plan.parts if part.kind == "expert"]
        layers = sorted({part.layer for part in parts})
        self._number = {layer: n for n, layer in enumerate(layers)}
        most = max((part.expert for part in parts), default=0)
        resident = np.zeros((len(layers), 1 + most), bool)
        for part, here in zip(plan.parts, plan.resident, strict=True):
            if part.kind == "expert" and here == part.columns:
                resident[self._number[part.layer], part.expert] = True
        self._policy, self._whole = policy, frozenset(weights)
        self.state: CacheState = init_cache(policy, resident)
        self._weights = {
            (layer, e): jax.device_put(tree, device)
            for (layer, e), tree in weights.items()
            if resident[self._number[layer], e]
        }

    def get(self, layer: int, expert: int) -> Any:
        """Give an expert's weights on the accelerator, or None where it is not there."""
        return self._weights.get((layer, expert))

    def took(
        self, layer: int, experts: Sequence[int], scores: np.ndarray, came: Mapping[int, Any]
    ) -> None:
        """Learn what a layer's router chose, and keep of what was copied over what is worth it.

        Args:
            layer: which.
            experts: that were chosen, of all rows.
            scores: router's probabilities of the rows, [N, E].
            came: weights that have crossed the link for this, by expert; of experts that the plan
                cuts they are not all, and are not kept.
        """
        number = self._number[layer]
        came = {e: tree for e, tree in came.items() if (layer, e) in self._whole}
        event = Event(number, tuple(experts), scores.mean(0))
        self.state = observe(self._policy, self.state, event)
        used = [e for e in experts if e not in came and self.get(layer, e) is not None]
        self.state = admit(self._policy, self.state, number, list(came), pinned=used)
        for e in np.flatnonzero(self.state.resident[number]).tolist():
            if (layer, e) not in self._weights:
                self._weights[layer, e] = came[e]
        for e in [e for i, e in self._weights if i == layer]:
            if not self.state.resident[number, e]:
                del self._weights[layer, e]
