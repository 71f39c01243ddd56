"""Weights in 8 or 4 bits as a tree transform, with products that stay fast on a CPU.

A quantised weight is a pytree that takes the place of an array in the tree of parameters and brings
its own ``matmul``; the model's linear layer calls that. One row of activations is multiplied with
the codes and summed in one fused loop, which reads the codes once and writes no matrix; more rows
are worth a dense float32 copy of the matrix, which lives for one product only and is made again in
the backward pass.

Layouts (XLA:CPU, measured): the sum runs along the last axis of [out, in]. Four-bit codes lie in
planes, so that neither unpacking nor scaling shuffles elements: with G groups to a row, group i is
the strided set of elements i, i + G, i + 2G, …, plane j is elements j·G to (j + 1)·G, and a byte
holds an element of plane j (low half) and the one of plane j + g/2 (high half). Interleaved nibbles
or contiguous groups are 10 to 40 times slower.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.core.tree import match, unflatten
from jaxsys.models.rows import row_product

# Matrices inside numbered blocks: `model.layers.3.mlp.up_proj.weight`, `h.0.attn.c_attn.weight`.
BLOCK_WEIGHTS = ("*.[0-9]*.weight",)
# Routers choose experts; an error there is no small error in the output.
ROUTERS = ("*.gate.weight", "*.router.weight")
_TINY = float(jnp.finfo(jnp.float32).tiny)


class _Weight:
    """What the two forms share; `shape` is [out, in], or [in, out] where `in_out` says so."""

    in_out: bool
    scale: Any

    @property
    def ndim(self) -> int:
        """Count the axes of the weight."""
        return 2

    @property
    def dtype(self) -> Any:
        """Give the type that `dense` returns."""
        return self.scale.dtype

    def dense(self) -> Array:
        """Dequantise the whole matrix, float32, in the orientation that it came in."""
        matrix = self._out_in()
        return matrix.T if self.in_out else matrix

    def matmul(self, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
        """Multiply rows of activations by the weight; the result has their dtype."""
        wide = x.astype(jnp.float32)
        if x.shape[0] == 1:
            return self._one_row(wide[0]).astype(x.dtype)[None]
        # Without the checkpoint the dense copies of all layers would wait for the backward pass.
        return jax.checkpoint(_many_rows)(self, wide).astype(x.dtype)

    def _out_in(self) -> Array:
        raise NotImplementedError

    def _one_row(self, x: Array) -> Array:
        raise NotImplementedError


def _many_rows(weight: _Weight, x: Array) -> Array:
    return jax.lax.dot_general(x, weight._out_in(), (((1,), (1,)), ((), ())))


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("in_out",))
@dataclass(frozen=True)
class QuantisedInt8(_Weight):
    """Hold a matrix as int8 codes with one scale for each output: W[o, i] = s[o] · q[o, i].

    Attributes:
        values: q, [out, in] int8 between -127 and 127.
        scale: s, [out] float32.
        in_out: the matrix came as [in, out] (GPT-2's Conv1D).

    >>> quantise_int8(jnp.array([[1.0, -2.0]])).values.tolist()
    [[64, -127]]
    """

    # Not typed as arrays: masks, shapes and shardings stand here too when trees are mapped.
    values: Any
    scale: Any
    in_out: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the shape of the matrix as it came."""
        return self.values.shape[::-1] if self.in_out else self.values.shape

    def rows(self, indices: Integer[Array, "..."]) -> Float[Array, "... I"]:
        """Take rows of an embedding table."""
        return self.values[indices].astype(jnp.float32) * self.scale[indices][..., None]

    def _out_in(self) -> Array:
        return self.values.astype(jnp.float32) * self.scale[:, None]

    def _one_row(self, x: Array) -> Array:
        return row_product(self.values, x) * self.scale


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("packed", "scale"),
    meta_fields=("inputs", "in_out"),
)
@dataclass(frozen=True)
class Quantised4bit(_Weight):
    """Hold a matrix as 4-bit codes with a scale for each strided group of a row.

    W[o, j·G + i] = s[o, i] · q[o, j, i], with G groups of g elements; see the module's docstring.

    Attributes:
        packed: [out, g / 2, G] uint8, two codes between -7 and 7 to a byte.
        scale: s, [out, G] float32.
        inputs: in; the rest of the last plane is filled up with zeros.
        in_out: the matrix came as [in, out] (GPT-2's Conv1D).

    >>> weight = quantise_4bit(jnp.array([[1.0, -2.0, 7.0, 0.0]]), group=4)
    >>> weight.packed.shape, weight.dense().tolist()
    ((1, 2, 1), [[1.0, -2.0, 7.0, 0.0]])
    """

    packed: Any
    scale: Any
    inputs: int
    in_out: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the shape of the matrix as it came."""
        shape = (self.packed.shape[0], self.inputs)
        return shape[::-1] if self.in_out else shape

    def rows(self, indices: Integer[Array, "..."]) -> Float[Array, "... I"]:
        """Take rows of an embedding table."""
        return _unpack(self.packed[indices], self.scale[indices], self.inputs)

    def _out_in(self) -> Array:
        return _unpack(self.packed, self.scale, self.inputs)

    def _one_row(self, x: Array) -> Array:
        _, half, groups = self.packed.shape
        planes = jnp.pad(x, (0, 2 * half * groups - self.inputs)).reshape(2, half, 1, groups)
        # Unrolled: one fused loop over [out, G] with all planes in it.
        total = jnp.zeros(self.scale.shape, jnp.float32)
        for j in range(half):
            low, high = _nibbles(self.packed[:, j])
            total = total + low * planes[0, j] + high * planes[1, j]
        return (total * self.scale).sum(-1)


def _nibbles(packed: Array) -> tuple[Array, Array]:
    # Arithmetic shifts of signed bytes extend the sign, and XLA:CPU vectorises them.
    signed = jax.lax.bitcast_convert_type(packed, jnp.int8)
    return ((signed << 4) >> 4).astype(jnp.float32), (signed >> 4).astype(jnp.float32)


def _unpack(packed: Array, scale: Array, inputs: int) -> Array:
    planes = jnp.concatenate(_nibbles(packed), axis=-2) * scale[..., None, :]
    return planes.reshape(*scale.shape[:-1], -1)[..., :inputs]


def quantise_int8(weight: Float[Array, "O I"], *, in_out: bool = False) -> QuantisedInt8:
    """Round a matrix to int8 with one scale for each output.

    s = max|W[o, :]| / 127, q = round(W / s); so |W - s·q| ≤ s / 2 (and a float32 rounding).

    Args:
        weight: finite, of any float type.
        in_out: it is [in, out] instead.

    Returns:
        The codes and scales.

    >>> quantise_int8(jnp.array([[1.0, -0.5], [0.0, 0.0]])).dense().round(2).tolist()
    [[1.0, -0.5], [0.0, 0.0]]
    """
    wide = (weight.T if in_out else weight).astype(jnp.float32)
    codes, scale = _codes(wide, 127)
    return QuantisedInt8(codes, scale, in_out)


def quantise_4bit(
    weight: Float[Array, "O I"], *, group: int = 32, in_out: bool = False
) -> Quantised4bit:
    """Round a matrix to 4 bits with a scale for every `group` elements of a row.

    s = max|W| / 7 over the group, q = round(W / s); so |W - s·q| ≤ s / 2.

    Args:
        weight: finite, of any float type.
        group: g, even; 32 costs 5 bits a weight with its float32 scale, 64 costs 4.5.
        in_out: the matrix is [in, out] instead.

    Returns:
        The codes and scales.

    Raises:
        UserError: for an odd group or one below 2.

    >>> quantise_4bit(jnp.ones((2, 5)), group=4).dense().tolist()
    [[1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]]
    """
    if group < 2 or group % 2:
        raise UserError(
            f"group is {group}; two codes share a byte, so give an even one, such as 32"
        )
    wide = (weight.T if in_out else weight).astype(jnp.float32)
    outputs, inputs = wide.shape
    groups = math.ceil(inputs / group)
    planes = jnp.pad(wide, ((0, 0), (0, groups * group - inputs))).reshape(outputs, group, groups)
    codes, scale = _codes(planes.transpose(0, 2, 1), 7)
    nibbles = codes.transpose(0, 2, 1).astype(jnp.uint8) & 0xF
    packed = nibbles[:, : group // 2] | (nibbles[:, group // 2 :] << 4)
    return Quantised4bit(packed, scale, inputs, in_out)


def _codes(values: Array, top: int) -> tuple[Array, Array]:
    """Round along the last axis: codes between -top and top, and the value of one step."""
    scale = jnp.max(jnp.abs(values), axis=-1) / top
    # XLA flushes subnormal numbers to zero, and a zero scale must not divide.
    scale = jnp.where(scale < _TINY, 0.0, scale)
    steps = values / jnp.where(scale == 0, 1.0, scale)[..., None]
    return jnp.clip(jnp.round(steps), -top, top).astype(jnp.int8), scale


def weights(params: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested dicts to a dict from path to weight, leaving quantised weights whole.

    >>> list(weights({"h": {"0": {"weight": quantise_int8(jnp.ones((2, 2)))}}}))
    ['h.0.weight']
    """
    flat = {}
    for name, node in params.items():
        if isinstance(node, Mapping):
            flat |= {f"{name}.{path}": leaf for path, leaf in weights(node).items()}
        else:
            flat[str(name)] = node
    return flat


def select(
    flat: Mapping[str, Any], patterns: Sequence[str], *, keep: Sequence[str] = ROUTERS
) -> tuple[str, ...]:
    """List the paths of the matrices that patterns match, in the tree's order.

    Args:
        flat: path to weight, as from `weights`.
        patterns: globs; what they match besides matrices (gains, biases) is passed over.
        keep: globs of matrices to leave alone, by default the routers of experts.

    Returns:
        The paths.

    Raises:
        UserError: for a pattern that matches no matrix.

    >>> select({"h.0.weight": jnp.ones((2, 2)), "h.0.norm.weight": jnp.ones(2)}, ("h.*",))
    ('h.0.weight',)
    """
    names = [path for path, leaf in flat.items() if getattr(leaf, "ndim", 0) == 2]
    left = {names[i] for pattern in keep for i in match(names, pattern)}
    chosen = set()
    for pattern in patterns:
        found = {names[i] for i in match(names, pattern)} - left
        if not found:
            example = names[0] if names else "none, for the model has no matrix"
            raise UserError(
                f"pattern {pattern!r} matches no matrix of the model; expected a glob over paths "
                f"such as {example}; correct the pattern"
            )
        chosen |= found
    return tuple(name for name in names if name in chosen)


def quantise(
    params: Mapping[str, Any],
    patterns: Sequence[str] = BLOCK_WEIGHTS,
    *,
    bits: Literal[8, 4] = 8,
    group: int = 32,
    keep: Sequence[str] = ROUTERS,
    in_out: bool = False,
) -> dict[str, Any]:
    """Quantise the matrices of a model whose paths match, one at a time.

    The default leaves the embedding and the head alone. They may be quantised too
    (``patterns=("*",)``): lookups dequantise the rows that they take.

    Args:
        params: the model.
        patterns: globs over paths.
        bits: 8 (one scale a row) or 4 (one for every `group` elements of a row).
        group: with 4 bits.
        keep: globs of matrices to leave alone.
        in_out: matrices are [in, out] (GPT-2's Conv1D); such an embedding must not be matched.

    Returns:
        A tree of the same paths.

    Raises:
        UserError: for other bits, or a pattern that matches no matrix.

    >>> params = {"h": {"0": {"weight": jnp.ones((2, 4)), "bias": jnp.zeros(2)}}}
    >>> type(quantise(params, bits=4)["h"]["0"]["weight"]).__name__
    'Quantised4bit'
    """
    if bits not in (8, 4):
        raise UserError(f"bits is {bits}; weights are quantised to 8 or 4 bits; choose one of them")
    flat = weights(params)
    to_int8 = jax.jit(partial(quantise_int8, in_out=in_out))
    to_4bit = jax.jit(partial(quantise_4bit, group=group, in_out=in_out))
    for path in select(flat, patterns, keep=keep):
        if not isinstance(flat[path], _Weight):
            flat[path] = (to_int8 if bits == 8 else to_4bit)(flat[path])
    return unflatten(flat)


def dequantise(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turn every quantised weight back into a float32 array.

    >>> params = {"h": {"0": {"weight": jnp.ones((2, 2))}}}
    >>> dequantise(quantise(params))["h"]["0"]["weight"].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    flat = weights(params)
    return unflatten(
        {path: leaf.dense() if isinstance(leaf, _Weight) else leaf for path, leaf in flat.items()}
    )
