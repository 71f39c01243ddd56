"""Fitted costs of the five operations that a schedule is made of."""

import json
from dataclasses import asdict, dataclass, fields
from math import isfinite

from jaxsys.core.cost import LinearCost, PoorFitError
from jaxsys.core.errors import UserError


@dataclass(frozen=True)
class Costs:
    """Hold one line ``t(n) = α + β·n`` for each operation; hashable, so static under jit.

    Args:
        all_to_all: seconds over elements of the exchanged buffer (between nodes).
        all_gather: seconds over elements of the gathered buffer (inside a node).
        reduce_scatter: seconds over elements of the summed buffer (inside a node).
        all_reduce: seconds over elements of the gradient (between nodes).
        expert: seconds over multiply-adds.

    Raises:
        UserError: for a coefficient that is negative or not finite.

    >>> Costs(*[LinearCost(0.1, 2.0, 1.0, 0.0, 3)] * 5).expert(1.0)
    2.1
    """

    all_to_all: LinearCost
    all_gather: LinearCost
    reduce_scatter: LinearCost
    all_reduce: LinearCost
    expert: LinearCost

    def __post_init__(self):
        for field in fields(self):
            line = getattr(self, field.name)
            for name in ("alpha_s", "beta_s_per_unit"):
                value = getattr(line, name)
                if not (isfinite(value) and value >= 0):
                    raise UserError(
                        f"{name} of {field.name} is {value}; it must be finite and not negative; "
                        "fit the line again"
                    )

    def check_fit(self, min_r2: float | int = 0.9) -> None:
        """Refuse lines that explain too little of what was measured.

        Args:
            min_r2: least r².

        Raises:
            PoorFitError: for a line below it.

        >>> Costs(*[LinearCost(0.1, 2.0, 0.5, 0.0, 3)] * 5).check_fit()
        Traceback (most recent call last):
        ...
        jaxsys.core.cost.PoorFitError: the line of all_to_all has r² 0.5; ...
        """
        for field in fields(self):
            r2 = getattr(self, field.name).r2
            if not r2 >= min_r2:
                raise PoorFitError(
                    f"the line of {field.name} has r² {r2}; a plan needs at least {min_r2}; "
                    "profile again with more or larger sizes, or on a quieter machine"
                )

    def to_json(self) -> str:
        """Write the lines as one JSON object that `from_json` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Costs":
        """Read what `to_json` wrote, checking it as a foreign file.

        Args:
            text: JSON.

        Raises:
            UserError: for other text, a missing or unknown operation, or a bad number.

        >>> costs = Costs(*[LinearCost(0.1, 2.0, 1.0, 0.0, 3)] * 5)
        >>> Costs.from_json(costs.to_json()) == costs
        True
        """
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"the costs are not JSON ({error}); expected what `jaxsys moe profile` wrote; "
                "profile again"
            ) from error
        names = [field.name for field in fields(cls)]
        if not isinstance(found, dict) or set(found) != set(names):
            got = sorted(found) if isinstance(found, dict) else type(found).__name__
            raise UserError(
                f"the costs hold {got}; expected the lines of {', '.join(names)}; pass what "
                "`jaxsys moe profile` wrote"
            )
        for name, line in found.items():
            if not isinstance(line, dict):
                raise UserError(
                    f"{name} is a {type(line).__name__}; expected the five fields of a line; pass "
                    "what `jaxsys moe profile` wrote"
                )
        return cls(**{name: LinearCost.from_dict(found[name]) for name in names})


def from_ms(**lines: tuple[float, float]) -> Costs:
    """Make costs from coefficients in milliseconds, as papers print them.

    Args:
        **lines: operation to (α in ms, β in ms per unit).

    Returns:
        Costs in seconds, with r² 1: what is given counts as true.

    >>> zero = {name: (0.0, 0.0) for name in ("all_gather", "reduce_scatter", "all_reduce")}
    >>> from_ms(all_to_all=(1.0, 0.0), expert=(0.0, 1.0), **zero).all_to_all(5)
    0.001
    """
    return Costs(
        **{name: LinearCost(a * 1e-3, b * 1e-3, 1.0, 0.0, 0) for name, (a, b) in lines.items()}
    )


# Published fits of Testbed-B: 8 nodes of 4 RTX 2080 Ti, 100 Gb/s (arXiv 2501.10714).
TESTBED_B = from_ms(
    all_to_all=(0.175, 3.06e-7),
    all_gather=(0.0320, 1.68e-7),
    reduce_scatter=(0.0391, 1.67e-7),
    all_reduce=(0.0837, 5.99e-7),
    expert=(9.24e-2, 4.42e-11),
)

# What the paper's released script uses if nothing is given.
RELEASED = from_ms(
    all_to_all=(0.23515350484, 1.8543323833e-6),
    all_gather=(0.0549, 6.72388e-7),
    reduce_scatter=(0.0688, 6.70433e-7),
    all_reduce=(0.34099276392, 3.4950701465e-6),
    expert=(0.59194353200, 5.6847387697e-11),
)
