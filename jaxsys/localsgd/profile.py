"""What a plan is made from: measured seconds of each layer's forward, backward and message."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsys.core.cost import LinearCost
from jaxsys.core.errors import UserError
from jaxsys.core.tree import Layer
from jaxsys.localsgd.codec import codec_bytes
from jaxsys.localsgd.plan import SyncPlan
from jaxsys.localsgd.strategy import Strategy, make_plan

_MEASURED_LATER = {"note", "jitter_s", "sharing"}  # a profile may lack them


class Weather(NamedTuple):
    """What a step that sends nothing, and an exchange of the whole model, take at one time.

    Attributes:
      compute_s: seconds of a step of the slowest worker.
      exchange_s: seconds of the exchange, the median of the workers.
      jitter_s: see `Profile`.
    """

    compute_s: float
    exchange_s: float
    jitter_s: float = 0.0


class Compute(NamedTuple):
    """Times of a step that sends nothing.

    Attributes:
      forward_s: seconds of each layer's forward pass, nearest the loss first, [L].
      backward_s: seconds of each layer's backward pass, in the same order, [L].
      tail_s: seconds of the optimiser step.
      jitter_s: see `Profile`.
    """

    forward_s: np.ndarray
    backward_s: np.ndarray
    tail_s: float
    jitter_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a plan is made from: measured times of one job, layers in backward order.

    Attributes:
      layers: names.
      elements: number of parameters of each layer.
      forward_s: seconds of each layer's forward pass.
      backward_s: seconds of each layer's backward pass.
      tail_s: seconds of the optimiser step.
      link: seconds of one exchange as a line over the bytes that a worker sends.
      workers: number of workers R.
      note: what a reader of its predictions should know.
      jitter_s: seconds that a step loses if its workers wait for each other in every step and not
        only now and then: the mean of the slowest worker's step, less the step of the worker that
        is slowest over several.
      sharing: seconds of compute lost by each second of communication that hides behind it, since
        the processor that computes also carries messages.

    >>> p = Profile(("w",), (10,), (1.0,), (2.0,), 0.1, LinearCost(0.01, 0.001, 1.0, 0.0, 3), 4)
    >>> p.plan(Strategy(period=1)).compute_s
    3.1
    """

    layers: tuple[str, ...]
    elements: tuple[int, ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    tail_s: float
    link: LinearCost
    workers: int
    note: str = ""
    jitter_s: float = 0.0
    sharing: float = 0.0

    @property
    def compute_s(self) -> float:
        """Seconds of a step that sends nothing."""
        return sum(self.forward_s) + sum(self.backward_s) + self.tail_s

    def message_s(self, elements: int, codec: str = "f32") -> float:
        """Predict the seconds of one exchange of that many parameters."""
        return float(self.link(codec_bytes(elements, codec, self.workers)))

    def plan(
        self, strategy: Strategy, phases: tuple[tuple[int, ...], ...] | None = None
    ) -> SyncPlan:
        """Plan a strategy with these times, or predict the given phases with them."""
        slower = 1.0
        if strategy.waits_always and self.compute_s:
            slower += self.jitter_s / self.compute_s
        plan = make_plan(
            strategy,
            [slower * s for s in self.backward_s],
            [self.message_s(n, strategy.codec) for n in self.elements],
            forward_s=slower * sum(self.forward_s),
            tail_s=slower * self.tail_s,
            merged_s=self.message_s(sum(self.elements), strategy.codec),
            phases=phases,
        )
        hidden_s = (sum(plan.comm_s) - sum(plan.wait_s)) / plan.period
        return dataclasses.replace(plan, compute_s=plan.compute_s + self.sharing * hidden_s)

    def rescaled(self, weather: "Weather") -> "Profile":
        """Scale all compute and all communication to what a run met on the way.

        >>> link = LinearCost(0.0, 0.001, 1.0, 0.0, 3)
        >>> p = Profile(("w",), (10,), (1.0,), (2.0,), 0.0, link, 2)
        >>> p.rescaled(Weather(6.0, 2 * p.message_s(10))).plan(Strategy(period=1)).compute_s
        6.0
        """
        slower = weather.compute_s / self.compute_s
        whole_s = self.message_s(sum(self.elements))
        link = weather.exchange_s / whole_s if whole_s else 1.0  # one worker alone sends nothing
        return dataclasses.replace(
            self,
            forward_s=tuple(slower * s for s in self.forward_s),
            backward_s=tuple(slower * s for s in self.backward_s),
            tail_s=slower * self.tail_s,
            jitter_s=weather.jitter_s,
            link=dataclasses.replace(
                self.link,
                alpha_s=link * self.link.alpha_s,
                beta_s_per_unit=link * self.link.beta_s_per_unit,
            ),
        )

    def to_json(self) -> str:
        """Write the profile as one JSON object."""
        return json.dumps(dataclasses.asdict(self) | {"link": self.link.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> "Profile":
        """Read a profile, checking it as a foreign file.

        Raises:
          UserError: it is not what `to_json` wrote.
        """
        try:
            found = json.loads(text)
            fields = {f.name for f in dataclasses.fields(cls)}
            if set(found) - fields or not fields - _MEASURED_LATER <= set(found):
                raise KeyError(", ".join(sorted(set(found) ^ fields)))
            vectors = {
                name: tuple(kind(x) for x in found.pop(name))
                for name, kind in (
                    ("layers", str),
                    ("elements", int),
                    ("forward_s", float),
                    ("backward_s", float),
                )
            }
            if len({len(v) for v in vectors.values()}) != 1:
                raise ValueError("its lists have different lengths")
            link = LinearCost.from_dict(found.pop("link"))
            return cls(**vectors, link=link, **found)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"the profile cannot be read ({error}); expected the JSON object that a run wrote "
                "as profile.json; pass that file"
            ) from error


def make_profile(
    layers: Sequence[Layer],
    params: Any,
    compute: Compute,
    link: LinearCost,
    workers: int,
    note: str = "",
) -> Profile:
    """Put measured times together.

    >>> cost = LinearCost(0.01, 0.001, 1.0, 0.0, 3)
    >>> times = Compute(np.ones(1), np.ones(1), 0.5)
    >>> make_profile([Layer("w", (0,))], [np.ones(3)], times, cost, 2).elements
    (3,)
    """
    sizes = [int(x.size) for x in jax.tree.leaves(params)]
    return Profile(
        layers=tuple(layer.name for layer in layers),
        elements=tuple(sum(sizes[i] for i in layer.leaves) for layer in layers),
        forward_s=tuple(map(float, compute.forward_s)),
        backward_s=tuple(map(float, compute.backward_s)),
        tail_s=compute.tail_s,
        jitter_s=compute.jitter_s,
        link=link,
        workers=workers,
        note=note,
    )
