"""The layers of cell networks, written so that they stay fast inside loops and in reverse mode.

Axes: ``B`` images, ``Y`` and ``X`` rows and columns, ``C`` and ``D`` channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxsys.core.mesh import on_cpu

_EPS = 1e-5


def _patches(x: Any, stride: int = 1) -> Any:
    height, width = x.shape[-3:-1]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(shifted, -1)


# XLA's CPU convolution falls off its fast path inside loops, above all for the weight gradient;
# products with patches do not. The two gradients are again products with patches.
@jax.custom_vjp
def _conv3_patches(x: Any, w: Any) -> Any:
    return _patches(x) @ w.reshape(-1, w.shape[-1])


def _conv3_forward(x: Any, w: Any) -> Any:
    return _conv3_patches(x, w), (x, w)


def _conv3_backward(saved: Any, g: Any) -> Any:
    x, w = saved
    rows, columns = _patches(x).reshape(-1, 9 * x.shape[-1]), g.reshape(-1, g.shape[-1])
    turned = w[::-1, ::-1].swapaxes(2, 3)
    return _patches(g) @ turned.reshape(-1, x.shape[-1]), (rows.T @ columns).reshape(w.shape)


_conv3_patches.defvjp(_conv3_forward, _conv3_backward)


def conv3(
    x: Float[Array, "B Y X C"], w: Float[Array, "3 3 C D"], stride: int = 1
) -> Float[Array, "B Y2 X2 D"]:
    """Convolve with a 3×3 kernel and zeros around the image.

    >>> conv3(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)))[0, :2, :2, 0].tolist()
    [[4.0, 6.0], [6.0, 9.0]]
    """
    if on_cpu():
        if stride == 1:
            return _conv3_patches(x, w)
        return _patches(x, stride) @ w.reshape(-1, w.shape[-1])
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def pool3(x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
    """Average 3×3 windows over the pixels that exist.

    >>> float(pool3(jnp.ones((1, 4, 4, 1))).min())
    1.0
    """

    def sums(v: Any, axis: int) -> Any:
        width = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        padded, size = jnp.pad(v, width), v.shape[axis]
        return sum(jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3))

    def counts(size: int) -> np.ndarray:
        place = np.arange(size)
        return 1.0 + (place > 0) + (place < size - 1)

    inverse = 1 / np.outer(counts(x.shape[1]), counts(x.shape[2]))
    return sums(sums(x, 1), 2) * inverse[None, :, :, None].astype(x.dtype)


def max_pool(x: Float[Array, "B Y X C"], size: int, stride: int) -> Float[Array, "B Y2 X2 C"]:
    """Take the largest of each window; of equal ones the first has the gradient, as usual.

    Args:
      x: features.
      size: of the window; 3 is centred on the pixel, 2 begins at it.
      stride: between windows.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 2, 2)[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    before = (size - 1) // 2
    for axis in (2, 1):
        width = [(before, size - 1 - before) if a == axis else (0, 0) for a in range(4)]
        padded, length = jnp.pad(x, width, constant_values=-jnp.inf), x.shape[axis]
        x = jax.lax.slice_in_dim(padded, 0, length, stride, axis)
        for i in range(1, size):
            other = jax.lax.slice_in_dim(padded, i, i + length, stride, axis)
            x = jnp.where(x >= other, x, other)
    return x


def depthwise(
    x: Float[Array, "B Y X C"], w: Float[Array, "K K C"], stride: int = 1, dilation: int = 1
) -> Float[Array, "B Y2 X2 C"]:
    """Convolve each channel with its own kernel of odd size, zeros around the image.

    >>> depthwise(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1)), dilation=2)[0, 0, :, 0].tolist()
    [4.0, 4.0, 4.0, 4.0]
    """
    size, reach = w.shape[0], dilation * (w.shape[0] // 2)
    pad = (reach, reach)
    if not on_cpu():
        return jax.lax.conv_general_dilated(
            x,
            w[:, :, None],
            (stride, stride),
            (pad, pad),
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )
    padded = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))

    # One tap after the other: XLA's grouped convolution is slow on a CPU, and this compiles fast.
    def add(total: Any, tap: Any) -> Any:
        place, weight = tap
        part = jax.lax.dynamic_slice(padded, (0, place[0], place[1], 0), x.shape)
        return total + part[:, ::stride, ::stride] * weight[None, None, None], None

    places = dilation * np.moveaxis(np.indices((size, size)), 0, -1).reshape(-1, 2)
    start = jnp.zeros_like(x[:, ::stride, ::stride])
    return jax.lax.scan(add, start, (jnp.asarray(places), w.reshape(-1, w.shape[-1])))[0]


_BRANCHES: tuple[Callable[[Any, Any, Any], Any], ...] = (
    lambda x, w3, w1: x,
    lambda x, w3, w1: jnp.zeros_like(x),
    lambda x, w3, w1: conv3(jax.nn.relu(x), w3),
    lambda x, w3, w1: jax.nn.relu(x) @ w1,
    lambda x, w3, w1: pool3(x),
)


def lean_switch(branches: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """Make a `lax.switch` whose derivative keeps the inputs alone and runs the branch once more.

    That of `lax.switch` itself keeps what every branch needs, mostly zeros. The branches must not
    take traced values from around them.

    Returns:
      `(index, *inputs) -> outputs` of the branch with that index.

    >>> run = lean_switch([lambda x: x, lambda x: x**2])
    >>> jax.grad(lambda x: run(1, x))(3.0).item()
    6.0
    """

    @jax.custom_vjp
    def run(index: Any, *inputs: Any) -> Any:
        return jax.lax.switch(index, branches, *inputs)

    def forward(index: Any, *inputs: Any) -> Any:
        return run(index, *inputs), (index, *inputs)

    def backward(saved: Any, g: Any) -> Any:
        index, *inputs = saved

        def pulled(branch: Any) -> Any:
            return lambda g, *inputs: jax.vjp(branch, *inputs)[1](g)

        return None, *jax.lax.switch(index, [pulled(b) for b in branches], g, *inputs)

    run.defvjp(forward, backward)
    return run


_mix = lean_switch(_BRANCHES)


def mix(
    op: Integer[Array, ""],
    x: Float[Array, "B Y X C"],
    w3: Float[Array, "3 3 C C"],
    w1: Float[Array, "C C"],
) -> Float[Array, "B Y X C"]:
    """Run the operation with the given number: skip, none, ReLU-conv 3×3, ReLU-conv 1×1, pool.

    >>> x = -jnp.ones((1, 2, 2, 1))
    >>> mix(jnp.array(0), x, jnp.ones((3, 3, 1, 1)), jnp.ones((1, 1))).tolist() == x.tolist()
    True
    """
    return _mix(op, x, w3, w1)


def norm2d(p: dict[str, Any], y: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
    """Normalise with the batch's own statistics, as an untrained network in training mode does.

    >>> p = {"scale": jnp.ones(1), "bias": jnp.zeros(1)}
    >>> norm2d(p, jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)).reshape(-1).round(3).tolist()
    [-1.0, 1.0]
    """
    centred = y - jnp.mean(y, (0, 1, 2), keepdims=True)
    variance = jnp.mean(jnp.square(centred), (0, 1, 2), keepdims=True)
    scale, bias = (p[name][None, None, None] for name in ("scale", "bias"))
    return centred * (scale * jax.lax.rsqrt(variance + _EPS)) + bias


def draw_uniform(key: jax.Array, bounds: Sequence[tuple[tuple[int, ...], Any]]) -> list[Any]:
    """Draw arrays uniformly within ±bound from one stream, which compiles once and not for each.

    Args:
      key: random key.
      bounds: shape and bound of each array; a bound may be an array that broadcasts.

    >>> [v.shape for v in draw_uniform(jax.random.key(0), [((2, 3), 1.0), ((4,), 0.5)])]
    [(2, 3), (4,)]
    """
    sizes = [int(np.prod(shape)) for shape, _ in bounds]
    stream = jax.random.uniform(key, (sum(sizes),), minval=-1, maxval=1)
    stream = jax.lax.optimization_barrier(stream)  # or each array's consumer draws it anew
    parts = jnp.split(stream, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) * b for part, (shape, b) in zip(parts, bounds, strict=True)]
