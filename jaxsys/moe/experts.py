"""Experts: GPT's and Llama's feed-forward blocks side by side, over one of several products.

Matrices are [E, in, out], which XLA's and Tokamax's grouped products take as they are.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsys.core.errors import UserError
from jaxsys.core.grouped import BACKENDS, available, grouped_matmul
from jaxsys.core.measure import Timing, interleaved
from jaxsys.models.lm.linear import ACTIVATIONS
from jaxsys.moe.contract import Dims, Experts

EINSUM = "einsum"
Product = Callable[[Array, Array], Array]  # (rows, a matrix per expert) -> rows
Spread = Callable[[Array], Array]  # (a vector per expert) -> something to add to rows


def gpt_ffn(activation: str = "gelu_new", backend: str = EINSUM, *, bias: bool = True) -> Experts:
    """Make GPT's experts: down(act(x W_up + b_up)) + b_down.

    Args:
        activation: ``silu``, ``gelu``, ``gelu_new`` or ``relu``.
        backend: ``einsum``, a batched product over equal capacities, or one of
            `core.grouped.BACKENDS`, which also run groups of unequal sizes: with the policy
            ``dropless`` and all experts here, no slot is then padded.
        bias: whether there are biases.

    Returns:
        The experts: ``up`` [E, D, F], ``down`` [E, F, D], ``up_bias`` and ``down_bias``.

    Raises:
        UserError: for an unknown activation or back end.

    >>> experts = gpt_ffn()
    >>> params = experts.init(jax.random.key(0), Dims(4, 8, 3))
    >>> experts.apply(params, jnp.ones((3, 5, 4))).shape
    (3, 5, 4)
    """
    act = _activation(activation)

    def run(params, x: Array, product: Product, spread: Spread) -> Array:
        hidden = product(x, params["up"])
        if bias:
            hidden = hidden + spread(params["up_bias"]).astype(x.dtype)
        y = product(act(hidden), params["down"])
        return y + spread(params["down_bias"]).astype(x.dtype) if bias else y

    shapes = {"up": ("D", "F"), "down": ("F", "D")}
    return _experts(run, shapes | ({"up_bias": "F", "down_bias": "D"} if bias else {}), backend)


def swiglu(activation: str = "silu", backend: str = EINSUM) -> Experts:
    """Make Llama's experts: down(act(x W_gate) · x W_up).

    Args:
        activation: see `gpt_ffn`.
        backend: see `gpt_ffn`.

    Returns:
        The experts: ``gate`` and ``up`` [E, D, F], ``down`` [E, F, D].

    Raises:
        UserError: for an unknown activation or back end.

    >>> sorted(swiglu().init(jax.random.key(0), Dims(4, 8, 3)))
    ['down', 'gate', 'up']
    """
    act = _activation(activation)

    def run(params, x: Array, product: Product, spread: Spread) -> Array:
        del spread
        hidden = act(product(x, params["gate"])) * product(x, params["up"])
        return product(hidden, params["down"])

    return _experts(run, {"gate": ("D", "F"), "up": ("D", "F"), "down": ("F", "D")}, backend)


def _activation(name: str) -> Callable[[Array], Array]:
    if name not in ACTIVATIONS:
        raise UserError(
            f"the activation is {name!r}; expected one of {', '.join(ACTIVATIONS)}; choose one"
        )
    return ACTIVATIONS[name]


def _experts(run: Callable[..., Array], shapes: dict, backend: str) -> Experts:
    if backend not in (EINSUM, *BACKENDS):
        raise UserError(
            f"the experts' back end is {backend!r}; expected one of "
            f"{', '.join((EINSUM, *BACKENDS))}; choose one"
        )

    def init(key: jax.Array, dims: Dims) -> dict[str, Array]:
        sizes = {"D": dims.width, "F": dims.hidden}
        keys = jax.random.split(key, len(shapes))
        params = {}
        for own, (name, axes) in zip(keys, shapes.items(), strict=True):
            shape = (dims.experts, *(sizes[axis] for axis in axes))
            is_matrix = len(axes) == 2
            scale = 1 / math.sqrt(shape[1]) if is_matrix else 0.0
            params[name] = scale * jax.random.normal(own, shape)
        return params

    def ragged(params, rows: Array, sizes: Array) -> Array:
        def spread(vectors: Array) -> Array:
            return jnp.repeat(vectors, sizes, axis=0, total_repeat_length=rows.shape[0])

        return run(params, rows, lambda x, w: grouped_matmul(x, w, sizes, backend), spread)

    def padded(params, buffer: Array) -> Array:
        return run(params, buffer, _batched, lambda vectors: vectors[:, None])

    def as_groups(params, buffer: Array) -> Array:
        sizes = jnp.full(buffer.shape[0], buffer.shape[1], jnp.int32)
        return ragged(params, buffer.reshape(-1, buffer.shape[-1]), sizes).reshape(buffer.shape)

    hidden_axis = {
        name: (-1 if axes == "F" else None) if isinstance(axes, str) else axes.index("F") - 2
        for name, axes in shapes.items()
    }
    matmuls = sum(len(axes) == 2 for axes in shapes.values())
    if backend == EINSUM:
        return Experts(init, padded, None, hidden_axis, matmuls)
    return Experts(init, as_groups, ragged, hidden_axis, matmuls)


def _batched(x: Array, weights: Array) -> Array:
    return jnp.einsum("eci,eio->eco", x, weights.astype(x.dtype))


def time_backends(
    make: Callable[[str], Experts],
    dims: Dims,
    capacity: int,
    *,
    gradient: bool = True,
    dtype: Any = jnp.float32,
    runs: int = 7,
    backends: tuple[str, ...] | None = None,
) -> dict[str, Timing]:
    """Time the back ends in turns on this machine, on full slots.

    Args:
        make: from a back end's name to experts, such as ``lambda b: swiglu(backend=b)``.
        dims: of the layer.
        capacity: C.
        gradient: time the gradient with respect to parameters and rows, not the output.
        dtype: of parameters and rows.
        runs: timed rounds.
        backends: which; by default those that are installed, Pallas only on a GPU.

    Returns:
        Name to timing.

    >>> times = time_backends(lambda b: swiglu(backend=b), Dims(4, 8, 2), 3, runs=1,
    ...                       backends=("einsum",), gradient=False)
    >>> list(times)
    ['einsum']
    """
    if backends is None:
        on_gpu = jax.default_backend() == "gpu"
        backends = (EINSUM, *(b for b in available() if b != "pallas" or on_gpu))
    keys = jax.random.split(jax.random.key(0), 2)
    rows = jax.random.normal(keys[0], (dims.experts, capacity, dims.width), dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), make(EINSUM).init(keys[1], dims))

    def call(backend: str) -> Callable[[], Array]:
        apply = make(backend).apply
        run = jax.jit(apply)
        if gradient:
            run = jax.jit(jax.grad(lambda p, x: jnp.sum(apply(p, x) ** 2), argnums=(0, 1)))
        return lambda: run(params, rows)

    return interleaved({backend: call(backend) for backend in backends}, runs=runs)


def choose_backend(make: Callable[[str], Experts], dims: Dims, capacity: int, **options) -> str:
    """Choose the back end with the least median time; see `time_backends`.

    Returns:
        Its name.

    >>> choose_backend(lambda b: swiglu(backend=b), Dims(4, 8, 2), 3, runs=1,
    ...                backends=("einsum",), gradient=False)
    'einsum'
    """
    times = time_backends(make, dims, capacity, **options)
    return min(times, key=lambda name: times[name].median_s)
