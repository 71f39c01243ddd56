"""What is averaged over the workers, and in which form it crosses the link."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, UInt32

from jaxsys.core import compress
from jaxsys.core.errors import UserError

Codec = Literal["f32", "f16", "int8", "int4"]
CODECS: tuple[str, ...] = get_args(Codec)
_SCALE_BYTES = 4


def mean_over(
    axis_name: str,
    x: Float[Array, "*shape"],
    codec: str = "f32",
    key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Average an array over the replicas, sending it in a chosen form.

    - ``f32``: one all-reduce of float32.
    - ``f16``: one all-reduce of float16; each replica divides by R first, so that the sum overflows
      no sooner than an element does.
    - ``int8``, ``int4``: two shots. Each replica quantises its array, one scale per block, and
      sends chunk r to replica r (all-to-all); replica r averages chunk r in float32, quantises the
      mean, and sends it to everybody (all-gather). Only codes and scales travel.

    The mean is the same bit for bit on all replicas, because all decode the same codes. What a
    replica "effectively sent" satisfies mean = (1/R) Σ_r sent_r up to float rounding in every
    codec: the second quantisation's error, times R, is booked on the replica that made it. So
    residual = x - sent is the right thing to carry over for error feedback in both directions.

    Args:
        axis_name: the replica axis of `jax.vmap`, `jax.pmap` or `jax.shard_map`.
        x: this replica's array.
        codec: one of ``CODECS``.
        key: random key, the same on all replicas, for stochastic (unbiased) rounding of int8 and
            int4; each replica folds its index in. Without one they round to nearest.

    Returns:
        The mean and what this replica effectively sent, both of x's shape and dtype.

    Raises:
        UserError: for an unknown codec.

    Reference: two-directional error compensation is that of DoubleSqueeze, arXiv 1905.05957;
    booking the owner's error times R in its own residual is our form of it.

    >>> f = lambda x: mean_over("r", x, "int8")[0]
    >>> jax.vmap(f, axis_name="r")(jnp.array([[1.0, 2.0], [3.0, 2.0]])).round(2).tolist()
    [[2.0, 2.0], [2.0, 2.0]]
    """
    _check(codec)
    if codec == "f32":
        return lax.pmean(x.astype(jnp.float32), axis_name).astype(x.dtype), x
    if codec == "f16":
        n_replicas = lax.axis_size(axis_name)
        share = (x.astype(jnp.float32) / n_replicas).astype(jnp.float16)
        sent = share.astype(jnp.float32) * n_replicas
        return lax.psum(share, axis_name).astype(x.dtype), sent.astype(x.dtype)
    return _two_shot_mean(axis_name, x, 8 if codec == "int8" else 4, key)


def codec_bytes(n_elements: int, codec: str, workers: int) -> float:
    """Count the bytes that each worker sends to average an array once.

    f32 and f16: the 2 (R-1)/R · n elements of a ring all-reduce (which is also the least possible).
    int8 and int4: R-1 chunks in each of the two shots, with scales and padding.

    Args:
        n_elements: n, size of the array.
        codec: one of ``CODECS``.
        workers: R.

    Returns:
        Bytes on the wire per worker; frames and headers of the network come on top.

    Raises:
        UserError: for an unknown codec.

    >>> codec_bytes(1024, "f32", 4), codec_bytes(1024, "int8", 4)
    (6144.0, 1560.0)
    """
    _check(codec)
    if codec in ("f32", "f16"):
        return 2 * (workers - 1) / workers * n_elements * (4 if codec == "f32" else 2)
    chunk, block = _layout(n_elements, workers)
    code_bytes = chunk if codec == "int8" else chunk // 2
    return float(2 * (workers - 1) * (code_bytes + chunk // block * _SCALE_BYTES))


def _check(codec: str) -> None:
    if codec not in CODECS:
        raise UserError(
            f"codec is {codec!r}; expected one of {', '.join(CODECS)}; choose one of them"
        )


def _layout(n_elements: int, workers: int) -> tuple[int, int]:
    """Choose the length of a worker's chunk and of a block, wasting little on small arrays."""
    share = max(1, -(-n_elements // workers))
    block = min(compress.BLOCK, share + share % 2)
    return -(-share // block) * block, block


def _two_shot_mean(axis_name: str, x: Array, bits: Literal[8, 4], key) -> tuple[Array, Array]:
    n_replicas, rank = lax.axis_size(axis_name), lax.axis_index(axis_name)
    chunk, block = _layout(x.size, n_replicas)
    first = second = None
    if key is not None:
        # Errors of different replicas, and of the two shots, must not agree.
        first, second = jax.random.split(jax.random.fold_in(key, rank))
    flat = jnp.pad(x.astype(jnp.float32).reshape(-1), (0, n_replicas * chunk - x.size))

    codes = compress.quantize(flat, bits, first, block)
    outgoing = compress.to_bytes(codes).reshape(n_replicas, chunk // block, -1)
    incoming = lax.all_to_all(outgoing, axis_name, split_axis=0, concat_axis=0)
    rows = incoming.reshape(-1, incoming.shape[-1])
    parts = compress.dequantize(compress.from_bytes(rows, bits), (n_replicas, chunk))
    own = jnp.mean(parts, axis=0)

    codes_of_mean = compress.quantize(own, bits, second, block)
    gathered = lax.all_gather(compress.to_bytes(codes_of_mean), axis_name)
    rows = gathered.reshape(-1, gathered.shape[-1])
    mean = compress.dequantize(compress.from_bytes(rows, bits), x.shape)

    lost = compress.dequantize(codes_of_mean, (chunk,)) - own
    is_own = jnp.arange(n_replicas)[:, None] == rank
    sent = compress.dequantize(codes, (n_replicas, chunk))
    sent = (sent + jnp.where(is_own, n_replicas * lost[None], 0.0)).reshape(-1)
    return mean.astype(x.dtype), sent[: x.size].reshape(x.shape).astype(x.dtype)
