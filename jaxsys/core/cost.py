"""Cost models fitted to measurements or written from formulas: t = α + β·n, all-reduce times."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from jaxsys.core.errors import UserError
from jaxsys.core.fields import check_fields

ALGORITHMS = ("ring", "halving_doubling", "recursive_doubling", "tree", "server")


class PoorFitError(UserError):
    """Report in one sentence that a line explains too little of what was measured.

    >>> issubclass(PoorFitError, UserError)
    True
    """


@dataclass(frozen=True)
class LinearCost:
    """Predict seconds from a size, ``t(n) = α + β·n``.

    Attributes:
        alpha_s: seconds at size 0 (latency, launch), not negative.
        beta_s_per_unit: seconds per unit of size.
        r2: share of the variation of the times that the line explains.
        residual: typical relative error, median of ``|t̂ − t| / t`` over sizes.
        n: number of measurements behind the fit.

    >>> LinearCost(0.5, 2.0, r2=1.0, residual=0.0, n=3)(4)
    8.5
    """

    alpha_s: int | float
    beta_s_per_unit: int | float
    r2: int | float
    residual: int | float
    n: int

    def __call__(self, size):
        """Predict the seconds that this size takes.

        Args:
            size: a number or an array (also a traced one), in the unit of the fit.

        Returns:
            Seconds, of the shape of ``size``.

        >>> LinearCost(1.0, 2.0, 1.0, 0.0, 3)(np.array([0, 1]))
        array([1., 3.])
        """
        return self.alpha_s + self.beta_s_per_unit * size

    def to_dict(self) -> dict[str, float | int]:
        """Turn the line into a dict for JSON.

        >>> LinearCost(1.0, 2.0, 1.0, 0.0, 3).to_dict()["beta_s_per_unit"]
        2.0
        """
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float | int]) -> "LinearCost":
        """Read what `to_dict` wrote.

        Args:
            values: the five fields.

        Raises:
            UserError: a field is missing, unknown or not a finite number, or a cost is negative.

        >>> line = LinearCost(1.0, 2.0, 1.0, 0.0, 3)
        >>> LinearCost.from_dict(line.to_dict()) == line
        True
        """
        for name, value in check_fields(values, cls, "line").items():
            number = isinstance(value, int | float) and np.isfinite(value)
            if not number or (value < 0 and name != "r2"):
                raise UserError(
                    f"{name} is {value!r}; it must be a finite number, not negative; fit the line "
                    "again"
                )
        return cls(**{**values, "n": int(values["n"])})  # type: ignore[arg-type]


def fit_linear(
    sizes, seconds, *, min_r2: int | float = 0.9, max_residual: int | float = 0.3
) -> LinearCost:
    """Fit ``t = α + β·n`` with α ≥ 0 to measured times, refusing a line that explains nothing.

    Repeats of a size are reduced to their median. The line then minimises Huber's loss of the
    relative errors ``(α + β·n − t) / t``, so that small sizes count as much as large ones and a
    stray size does not turn it. r² is taken on the same relative weights and without down-weighting
    anything: a fit that must ignore many points does not pass.

    Args:
        sizes: sizes (bytes, elements, FLOPs), [N]; at least three different ones.
        seconds: measured times, [N], positive.
        min_r2: least share of variation to be explained.
        max_residual: largest median relative error.

    Returns:
        The line and how well it fits.

    Raises:
        UserError: lengths that differ, a size that is negative or not finite, a time that is not
            positive and finite.
        PoorFitError: fewer than three different sizes, times that do not grow with size, or a fit
            beyond the two bounds.

    >>> line = fit_linear([1, 2, 4, 8], [0.3, 0.5, 0.9, 1.7])
    >>> round(line.alpha_s, 6), round(line.beta_s_per_unit, 6), line.n
    (0.1, 0.2, 4)
    >>> fit_linear([1, 2, 4, 8], [0.4, 0.3, 0.2, 0.1])
    Traceback (most recent call last):
    ...
    jaxsys.core.cost.PoorFitError: the times do not grow with the size ...
    """
    sizes, seconds = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
    if sizes.ndim != 1 or sizes.shape != seconds.shape:
        raise UserError(
            f"sizes have shape {sizes.shape} and seconds {seconds.shape}; they must be two lists "
            "of one length; pass one time per size"
        )
    if not (np.all(np.isfinite(sizes)) and np.all(sizes >= 0)):
        raise UserError("a size is negative or not finite; sizes must be 0 or more; mend the list")
    if not (np.all(np.isfinite(seconds)) and np.all(seconds > 0)):
        raise UserError(
            "a measured time is not a positive number; times must be above 0; measure again"
        )
    distinct = np.unique(sizes)
    if len(distinct) < 3:
        raise PoorFitError(
            f"{len(seconds)} points have {len(distinct)} different sizes; a line needs at least 3 "
            "to be checked; measure more sizes"
        )
    medians = np.array([np.median(seconds[sizes == size]) for size in distinct])
    alpha, beta = _huber_line(distinct, medians)
    predicted = alpha + beta * distinct
    residual = float(np.median(np.abs(predicted - medians) / medians))
    weight = medians**-2
    mean = np.average(medians, weights=weight)
    varied = float(np.sum(weight * (medians - mean) ** 2))
    missed = float(np.sum(weight * (medians - predicted) ** 2))
    r2 = 1 - missed / varied if varied > 0 else 0.0
    found = f"r² {r2:.2f}, median error {100 * residual:.0f} %, {len(seconds)} points"
    if beta <= 0:
        raise PoorFitError(
            f"the times do not grow with the size ({found}); a line must; measure larger sizes or "
            "on a quieter machine"
        )
    if r2 < min_r2 or residual > max_residual:
        raise PoorFitError(
            f"a line explains the times poorly ({found}; wanted r² ≥ {min_r2}, error ≤ "
            f"{100 * max_residual:.0f} %); it would mislead a plan; measure more sizes or on a "
            "quieter machine"
        )
    return LinearCost(alpha, beta, r2, residual, len(seconds))


def _huber_line(sizes, seconds) -> tuple[float, float]:
    """Minimise Huber's loss of relative errors over α ≥ 0 by reweighted least squares."""
    trust = np.ones_like(seconds)
    alpha = beta = 0.0
    for _ in range(50):
        weight = trust / seconds**2
        alpha, beta = _weighted_line(sizes, seconds, weight)
        error = np.abs(alpha + beta * sizes - seconds) / seconds
        scale = 1.345 * max(1.4826 * float(np.median(error)), 1e-9)  # Huber's 95 % efficiency
        trust = np.minimum(1.0, scale / np.maximum(error, 1e-300))
    return float(alpha), float(beta)


def _weighted_line(sizes, seconds, weight):
    mean_n, mean_t = np.average(sizes, weights=weight), np.average(seconds, weights=weight)
    centred = sizes - mean_n
    beta = np.sum(weight * centred * (seconds - mean_t)) / np.sum(weight * centred**2)
    alpha = mean_t - beta * mean_n
    if alpha < 0:  # the loss is convex, so the bounded optimum lies on the bound
        return 0.0, np.sum(weight * sizes * seconds) / np.sum(weight * sizes**2)
    return alpha, beta


def _check_algorithm(algorithm: str) -> None:
    if algorithm not in ALGORITHMS:
        raise UserError(
            f"algorithm is {algorithm!r}; it must be one of {', '.join(ALGORITHMS)}; pass one of "
            "them"
        )


def allreduce_steps(workers: ArrayLike, algorithm: str = "ring") -> Float[Array, "*shape"]:
    """Count the messages that follow one another in an all-reduce; each costs one latency.

    With W workers and ``d = ⌈log2 W⌉``: ring ``2(W−1)``; halving_doubling (reduce-scatter by
    recursive halving, all-gather by recursive doubling) ``2d``; recursive_doubling ``d``; tree
    (binomial reduce, then broadcast) ``2d``; server (all send to one, it answers all) ``2``.

    Args:
        workers: W ≥ 1, integers of any shape; may be traced.
        algorithm: one of the five names.

    Returns:
        Numbers of the shape of ``workers``.

    Raises:
        UserError: unknown algorithm.

    Reference: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations
    in MPICH" (2005); Patarasuk and Yuan, "Bandwidth optimal all-reduce" (2009) for the ring.

    >>> allreduce_steps(jnp.array([1, 4, 5]), "tree").tolist()
    [0.0, 4.0, 6.0]
    """
    _check_algorithm(algorithm)
    workers = jnp.asarray(workers, jnp.int32)
    doublings = 32 - lax.clz(workers - 1)  # ⌈log2 W⌉ without rounding; clz(0) is 32
    steps = {
        "ring": 2 * (workers - 1),
        "halving_doubling": 2 * doublings,
        "recursive_doubling": doublings,
        "tree": 2 * doublings,
        "server": jnp.where(workers > 1, 2, 0),
    }[algorithm]
    return steps.astype(jnp.result_type(float))


def allreduce_bytes(
    n_bytes: ArrayLike, workers: ArrayLike, algorithm: str = "ring"
) -> Float[Array, "*shape"]:
    """Count the bytes that pass the busiest link one after another in an all-reduce.

    For n bytes, W workers and ``d = ⌈log2 W⌉``: ring and halving_doubling ``2(W−1)/W · n`` (the
    least possible); recursive_doubling ``d·n``; tree ``2d·n``; server ``2(W−1)·n``.

    Args:
        n_bytes: size of the reduced array; broadcasts against ``workers``.
        workers: W ≥ 1, integers; may be traced.
        algorithm: one of the five names.

    Returns:
        Bytes, of the broadcast shape.

    Raises:
        UserError: unknown algorithm.

    Reference: as `allreduce_steps`.

    >>> allreduce_bytes(1000, jnp.array([1, 2, 4]), "ring").tolist()
    [0.0, 1000.0, 1500.0]
    """
    _check_algorithm(algorithm)
    n_bytes = jnp.asarray(n_bytes, jnp.result_type(float))
    workers = jnp.asarray(workers, jnp.int32)
    spread = 2 * (workers - 1) / workers
    times_n = {
        "ring": spread,
        "halving_doubling": spread,
        "recursive_doubling": allreduce_steps(workers, "recursive_doubling"),
        "tree": allreduce_steps(workers, "tree"),
        "server": 2.0 * (workers - 1),
    }[algorithm]
    shape = jnp.broadcast_shapes(n_bytes.shape, workers.shape)
    return jnp.broadcast_to(n_bytes, shape) * jnp.broadcast_to(times_n, shape)


def allreduce_s(
    n_bytes: ArrayLike,
    workers: ArrayLike,
    *,
    bandwidth_bits_s: ArrayLike,
    latency_s: ArrayLike = 0.0,
    algorithm: str = "ring",
) -> Float[Array, "*shape"]:
    """Model the seconds of one all-reduce, ``steps · α + bytes · β`` with ``β = 8 / bandwidth``.

    For the ring this is ``2(W−1)α + 2(W−1)/W · n·β``. Reduction arithmetic and contention between
    links are left out; measure and use `fit_linear` where the network is at hand.

    Args:
        n_bytes: size of the reduced array.
        workers: W ≥ 1, integers, to thousands; may be traced.
        bandwidth_bits_s: bits per second of a worker's link, each direction.
        latency_s: seconds from the start of a message to its first byte at the receiver.
        algorithm: one of ring, halving_doubling, recursive_doubling, tree, server, with the
            formulas in `allreduce_steps` and `allreduce_bytes`.

    Returns:
        Seconds; all four arguments broadcast.

    Raises:
        UserError: unknown algorithm; workers below 1, a bandwidth that is not above 0 or a negative
            size or latency where these are plain numbers or NumPy arrays.

    >>> allreduce_s(1_000_000, 4, bandwidth_bits_s=1e8, latency_s=0.001).round(4).tolist()
    0.126...
    """
    _check_range("workers", workers, 1)
    _check_range("n_bytes", n_bytes, 0)
    _check_range("latency_s", latency_s, 0)
    _check_range("bandwidth_bits_s", bandwidth_bits_s, 0, above=True)
    rate, latency = (jnp.asarray(x, jnp.result_type(float)) for x in (bandwidth_bits_s, latency_s))
    passed = allreduce_bytes(n_bytes, workers, algorithm)
    steps = allreduce_steps(workers, algorithm)
    shape = jnp.broadcast_shapes(passed.shape, rate.shape, latency.shape)
    passed, steps, rate, latency = (
        jnp.broadcast_to(x, shape) for x in (passed, steps, rate, latency)
    )
    return steps * latency + passed * 8 / rate


def _check_range(name: str, value, low: int | float, *, above: bool = False) -> None:
    if not isinstance(value, int | float | np.ndarray | np.generic):
        return  # JAX arrays may be traced, and reading them would block
    values = np.asarray(value)
    if not np.all(values > low if above else values >= low) or not np.all(np.isfinite(values)):
        bound = "above" if above else "at least"
        raise UserError(f"{name} is {value}; it must be finite and {bound} {low}; mend it")
