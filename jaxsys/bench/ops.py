"""Single operators beside the roofline: how long each takes, and the least that it could take.

The floor counts what an operator must compute, and reads its inputs and writes its result once.

Reference: Zhang et al., "Dissecting the Runtime Performance of the Training, Fine-tuning, and
Inference of Large Language Models" (arXiv 2311.03687), section on operators.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.bench.records import figure_of, record
from jaxsys.bench.roofline import against_floor, peaks
from jaxsys.core.errors import UserError
from jaxsys.core.measure import interleaved
from jaxsys.models.lm.attention import attend
from jaxsys.models.lm.linear import normalise

GROUPS = ("matmul", "attention", "norm", "softmax", "elementwise", "gather")


@dataclass(frozen=True)
class Sweep:
    """Say which operators are timed.

    Attributes:
      groups: of `GROUPS`.
      sizes: n of products of n × n matrices; each also misaligned, with n + 1.
      rows: rows of products with a matrix of the largest size, as when few tokens are decoded.
      lengths: T of attention over 8 heads of 64, two sequences.
      elements: of the arrays of operators bound by memory; beyond the caches.
      dtypes: of all; int8 is added to products.

    >>> Sweep(groups=("matmul",), sizes=(64,)).lengths
    (128, 512)
    """

    groups: tuple[str, ...] = GROUPS
    sizes: tuple[int, ...] = (256, 512, 1024)
    rows: tuple[int, ...] = (1, 16, 128)
    lengths: tuple[int, ...] = (128, 512)
    elements: int = 2**24
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


ON_GPU = Sweep(
    sizes=(1024, 2048, 4096, 8192), rows=(1, 16, 128, 1024), lengths=(512, 2048), elements=2**28
)
SMOKE = Sweep(sizes=(64,), rows=(1,), lengths=(32,), elements=2**14, dtypes=("float32",))


class Operator(NamedTuple):
    """An operator to time.

    Attributes:
      group: one of `GROUPS`.
      name: what it is.
      shape: of what it reads, as text.
      dtype: likewise.
      flops: that it must compute.
      n_bytes: that it must read and write.
      make: puts the inputs on a device and gives the call.

    >>> [o.name for o in operators(Sweep(("softmax",), elements=64, dtypes=("float32",)))]
    ['softmax']
    """

    group: str
    name: str
    shape: str
    dtype: str
    flops: float
    n_bytes: float
    make: Callable[[Any], Callable[[], Any]]


def operators(sweep: Sweep) -> tuple[Operator, ...]:
    """List the operators of a sweep; nothing is allocated.

    Args:
      sweep: which.

    Returns:
      The operators, by group.

    Raises:
      UserError: an unknown group, or a size below 1.

    >>> len(operators(SMOKE)) >= len(GROUPS)
    True
    """
    unknown = set(sweep.groups) - set(GROUPS)
    numbers = (*sweep.sizes, *sweep.rows, *sweep.lengths, sweep.elements)
    if unknown or min(numbers, default=1) < 1:
        raise UserError(
            f"the sweep has groups {', '.join(sweep.groups)} and sizes {numbers}; expected groups "
            f"of {', '.join(GROUPS)} and sizes of at least 1; correct it"
        )
    makers = {"matmul": _products, "attention": _attentions, "norm": _norms, "softmax": _softmax,
              "elementwise": _elementwise, "gather": _gathers}  # fmt: skip
    return tuple(o for group in sweep.groups for o in makers[group](sweep))


def _arrays(shapes: Sequence[tuple[int, ...]], dtype: str, device: Any) -> list[Any]:
    rng = np.random.default_rng(0)
    return [
        jax.device_put(jnp.asarray(rng.integers(-4, 5, shape, np.int8), dtype), device)
        for shape in shapes
    ]


def _of(
    group: str,
    name: str,
    function: Callable[..., Any],
    shapes: Sequence[tuple[int, ...]],
    dtype: str,
    flops: float,
    written: int,
) -> Operator:
    """Make an operator that reads arrays of one dtype and writes so many numbers of it."""

    def make(device: Any) -> Callable[[], Any]:
        return partial(jax.jit(function), *_arrays(shapes, dtype, device))

    numbers = sum(math.prod(shape) for shape in shapes) + written
    text = " · ".join("×".join(map(str, shape)) for shape in shapes)
    return Operator(group, name, text, dtype, flops, numbers * _width(dtype), make)


def _width(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def _products(sweep: Sweep) -> Iterable[Operator]:
    largest = max(sweep.sizes)
    shapes = [("square", n, n) for n in sweep.sizes]
    shapes += [("misaligned", n + 1, n + 1) for n in sweep.sizes]
    shapes += [("rows", m, largest) for m in sweep.rows]
    for dtype in (*sweep.dtypes, "int8"):
        wide = jnp.int32 if dtype == "int8" else jnp.dtype(dtype)
        product = partial(jnp.matmul, preferred_element_type=wide)
        for name, m, n in shapes:
            written = m * n * jnp.dtype(wide).itemsize // _width(dtype)
            given = ((m, n), (n, n))
            yield _of("matmul", name, product, given, dtype, 2.0 * m * n * n, written)


def _attentions(sweep: Sweep) -> Iterable[Operator]:
    def plain(q: Any, k: Any, v: Any) -> Any:
        keep = jnp.tril(jnp.ones((q.shape[1],) * 2, bool))
        return attend(
            q, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.broadcast_to(keep, (2, *keep.shape))
        )

    causal = partial(jax.nn.dot_product_attention, is_causal=True)
    for dtype in sweep.dtypes:
        for length in sweep.lengths:
            shape = (2, length, 8, 64)
            # Causal: half of the scores are needed; two products of 2 · C each.
            flops = 4.0 * 64 * 2 * 8 * length * (length + 1) / 2
            for name, function in (("attention plain", plain), ("attention xla", causal)):
                written = math.prod(shape)
                yield _of("attention", name, function, [shape] * 3, dtype, flops, written)


def _rows(sweep: Sweep, width: int = 1024) -> tuple[int, int]:
    return max(1, sweep.elements // width), min(width, sweep.elements)


def _norms(sweep: Sweep) -> Iterable[Operator]:
    shape = _rows(sweep)
    n = math.prod(shape)
    for dtype in sweep.dtypes:
        for name, flops in (("rms", 4.0 * n), ("layer", 6.0 * n)):

            def run(x: Any, weight: Any, name: str = name) -> Any:
                return normalise({"weight": weight}, x, name, 1e-5)

            yield _of("norm", f"{name} norm", run, [shape, shape[1:]], dtype, flops, n)


def _softmax(sweep: Sweep) -> Iterable[Operator]:
    shape = _rows(sweep)
    n = math.prod(shape)
    for dtype in sweep.dtypes:
        yield _of("softmax", "softmax", jax.nn.softmax, [shape], dtype, 5.0 * n, n)


def _elementwise(sweep: Sweep) -> Iterable[Operator]:
    shape = _rows(sweep)
    n = math.prod(shape)
    for dtype in sweep.dtypes:
        yield _of("elementwise", "add", jnp.add, [shape] * 2, dtype, 1.0 * n, n)
        gated = [shape] * 2
        yield _of("elementwise", "silu · up", _gated, gated, dtype, 3.0 * n, n)
        yield _of("elementwise", "sum", jnp.sum, [shape], dtype, 1.0 * n, 1)


def _gated(gate: Any, up: Any) -> Any:
    return jax.nn.silu(gate) * up


def _gathers(sweep: Sweep) -> Iterable[Operator]:
    rows, width = _rows(sweep)
    taken = max(1, rows // 2)

    def make(dtype: str, device: Any) -> Callable[[], Any]:
        (table,) = _arrays([(rows, width)], dtype, device)
        drawn = np.random.default_rng(1).permutation(rows)[:taken].astype(np.int32)
        return partial(jax.jit(lambda t, i: t[i]), table, jax.device_put(drawn, device))

    for dtype in sweep.dtypes:
        n_bytes = 2.0 * taken * width * _width(dtype) + 4 * taken
        shape = f"{taken} of {rows}×{width}"
        yield Operator("gather", "embedding", shape, dtype, 0.0, n_bytes, partial(make, dtype))


def measure(
    sweep: Sweep,
    *,
    device: Any = None,
    runs: int = 10,
    on_event: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time the operators of a sweep, group by group, in turns.

    Args:
      sweep: which.
      device: on which; the first by default.
      runs: timed rounds, after two that warm up.
      on_event: told what is being timed.

    Returns:
      A row of kind ``ops`` for each: ``time``, ``flops``, ``bytes``, ``floor_s``,
      ``percent_of_floor``, ``bound``, ``flops_per_s``, ``bytes_per_s`` and ``peak``.

    Raises:
      UserError: as `operators`.

    >>> rows = measure(Sweep(("softmax",), elements=4096, dtypes=("float32",)), runs=2)
    >>> rows[0]["flags"]["operator"], rows[0]["time"]["runs"], rows[0]["percent_of_floor"] > 0
    ('softmax', 2, True)
    """
    device = jax.devices()[0] if device is None else device
    found = operators(sweep)
    rows = []
    for group in sweep.groups:
        for dtype in dict.fromkeys(o.dtype for o in found if o.group == group):
            chosen = [o for o in found if (o.group, o.dtype) == (group, dtype)]
            on_event(f"{group}, {dtype}: {len(chosen)} operators on {device}")
            rows += _timed(chosen, device, runs)
    return rows


def _timed(chosen: Sequence[Operator], device: Any, runs: int) -> list[dict[str, Any]]:
    calls: dict[str, Callable[[], Any]] = {}
    broken: dict[str, str] = {}
    for i, operator in enumerate(chosen):
        call = operator.make(device)
        try:
            jax.block_until_ready(call())
        except jax.errors.JaxRuntimeError as error:  # such as a dtype that the backend lacks
            broken[str(i)] = str(error).splitlines()[0]
        else:
            calls[str(i)] = call
    times = interleaved(calls, runs=runs) if calls else {}
    rows = []
    for i, operator in enumerate(chosen):
        flags = _flags(operator, device)
        if str(i) in broken:
            rows.append(record("ops", 0, flags, status="not here", why=broken[str(i)]))
            continue
        time = figure_of(times[str(i)])
        peak = peaks(device, operator.dtype)
        seconds = time["median_s"]
        rows.append(
            record(
                "ops",
                0,
                flags,
                time=time,
                **against_floor(operator.flops, operator.n_bytes, seconds, peak),
                flops_per_s=operator.flops / seconds,
                bytes_per_s=operator.n_bytes / seconds,
                peak=peak.to_dict(),
            )
        )
    return rows


def _flags(operator: Operator, device: Any) -> Mapping[str, Any]:
    return {
        "group": operator.group,
        "operator": operator.name,
        "shape": operator.shape,
        "dtype": operator.dtype,
        "device": device.device_kind,
    }
