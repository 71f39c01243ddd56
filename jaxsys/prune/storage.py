"""Files of pruned models that are really smaller, and their loader.

A pruned matrix ``P`` is stored as ``P.values`` beside one of

- ``P.mask``: one bit for each weight, row by row (any mask); or
- ``P.index``: for each kept weight of an N:M group its place in the group, in 2 bits (m up to 4)
  or 4 bits (m up to 16), lowest bits first; ``P.values`` is then [O, I · n / m]. With
  ``P.permutation`` the groups are those of the permuted input channels.

That N:M form holds what 2:4 hardware asks for (n values and their places); the shuffling of a
vendor's own layout is not done. What is stored how stands in the file's metadata under ``pruned``.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from jaxsys.core.checkpoint import read_header, read_safetensors, write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.sparse import Rows, rows_product, to_rows
from jaxsys.prune.plan import turn

MOST_GROUP = 16


def pack_bits(values: np.ndarray, bits: int) -> UInt8[np.ndarray, "Z"]:
    """Pack small numbers into bytes, the first in the lowest bits.

    >>> pack_bits(np.array([1, 2, 3, 0, 1]), 2).tolist()
    [57, 1]
    """
    per = 8 // bits
    flat = values.reshape(-1).astype(np.uint8)
    flat = np.pad(flat, (0, -flat.size % per)).reshape(-1, per)
    shifts = (bits * np.arange(per)).astype(np.uint8)
    return np.bitwise_or.reduce(flat << shifts, axis=1).astype(np.uint8)


def unpack_bits(packed: UInt8[np.ndarray, "Z"], bits: int, count: int) -> np.ndarray:
    """Undo `pack_bits`.

    >>> unpack_bits(np.array([57, 1], np.uint8), 2, 5).tolist()
    [1, 2, 3, 0, 1]
    """
    shifts = (bits * np.arange(8 // bits)).astype(np.uint8)
    return ((packed[:, None] >> shifts) & (2**bits - 1)).reshape(-1)[:count]


def encode(
    weight: Float[np.ndarray, "O I"],
    mask: Bool[np.ndarray, "O I"],
    nm: tuple[int, int] | None = None,
    permutation: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Store what a mask keeps.

    Args:
        weight: [O, I].
        mask: True is stored.
        nm: store as n of every m; the mask has that form, in permuted order if there is one.
        permutation: of the input channels.

    Returns:
        The parts by suffix: ``values`` and ``mask``, or ``values``, ``index`` and, where there is
        one, ``permutation``.

    Raises:
        UserError: for a group longer than 16, or a mask that is not of the form.

    >>> found = encode(np.array([[0.0, 5.0, 6.0, 0.0]]), np.array([[False, True, True, False]]))
    >>> found["values"].tolist(), found["mask"].tolist()
    ([5.0, 6.0], [6])
    """
    if nm is None:
        return {"values": weight[mask], "mask": pack_bits(mask, 1)}
    n, m = nm
    if m > MOST_GROUP:
        raise UserError(
            f"groups of {m} weights cannot be stored as N:M, whose places have 4 bits; expected at "
            f"most {MOST_GROUP}; store a bit mask instead"
        )
    if permutation is not None:
        weight, mask = weight[:, permutation], mask[:, permutation]
    groups = mask.reshape(len(mask), -1, m)
    if not (groups.sum(2) == n).all():
        raise UserError(
            f"the mask does not keep {n} of every {m} weights; store a bit mask instead"
        )
    places = np.nonzero(groups)[2]
    parts = {
        "values": weight[mask].reshape(len(mask), -1),
        "index": pack_bits(places, 2 if m <= 4 else 4),
    }
    if permutation is not None:
        parts["permutation"] = np.asarray(permutation, np.int32)
    return parts


def decode(
    parts: Mapping[str, np.ndarray], shape: tuple[int, int], nm: tuple[int, int] | None = None
) -> tuple[Float[np.ndarray, "O I"], Bool[np.ndarray, "O I"]]:
    """Undo `encode`, checking that the parts fit together.

    Args:
        parts: by suffix.
        shape: (O, I).
        nm: as it was stored.

    Returns:
        The dense weight and its mask.

    Raises:
        UserError: for parts that do not fit.

    >>> parts = encode(np.array([[0.0, 5.0, 6.0, 0.0]]), np.array([[False, True, True, False]]))
    >>> decode(parts, (1, 4))[0].tolist()
    [[0.0, 5.0, 6.0, 0.0]]
    """
    o, i = shape
    values = parts["values"]
    if nm is None:
        packed = parts["mask"]
        _fits(packed.shape == (-(-o * i // 8),), shape)
        mask = unpack_bits(packed, 1, o * i).astype(bool).reshape(shape)
        _fits(values.shape == (int(mask.sum()),), shape)
        dense = np.zeros(shape, values.dtype)
        dense[mask] = values
        return dense, mask
    n, m = nm
    bits = 2 if m <= 4 else 4
    _fits(0 < n <= m <= MOST_GROUP and i % m == 0 and values.shape == (o, i // m * n), shape)
    _fits(parts["index"].shape == (-(-values.size * bits // 8),), shape)
    places = unpack_bits(parts["index"], bits, values.size).reshape(o, -1, n).astype(np.int64)
    _fits(int(places.max(initial=0)) < m and bool((np.diff(places, axis=2) > 0).all()), shape)
    columns = (places + m * np.arange(i // m)[None, :, None]).reshape(o, -1)
    if "permutation" in parts:
        permutation = parts["permutation"]
        _fits(sorted(permutation.tolist()) == list(range(i)), shape)
        columns = permutation[columns]
    dense, mask = np.zeros(shape, values.dtype), np.zeros(shape, bool)
    rows = np.arange(o)[:, None]
    dense[rows, columns], mask[rows, columns] = values, True
    return dense, mask


def _fits(sound: bool, shape: tuple[int, int]) -> None:
    if not sound:
        raise UserError(
            f"the parts of a pruned matrix of {shape[0]} x {shape[1]} do not fit together; the "
            "file is damaged: download or write it anew"
        )


def write_pruned(
    folder: str | Path,
    tensors: Mapping[str, Any],
    masks: Mapping[str, Any],
    *,
    nm: tuple[int, int] | None = None,
    permutations: Mapping[str, Any] | None = None,
    in_out: bool = False,
    dtype: Any = None,
    shard_bytes: int = 5 << 30,
) -> list[Path]:
    """Write a checkpoint in which pruned matrices take the room of what they keep.

    Args:
        folder: made if need be.
        tensors: every tensor by name; those with a mask are read one at a time.
        masks: by name, in the tensor's orientation.
        nm: store matrices as n of every m.
        permutations: by name, of the input channels.
        in_out: matrices are [in, out].
        dtype: of the floating tensors; None keeps each one's.
        shard_bytes: largest file.

    Returns:
        The safetensors files.

    >>> import tempfile
    >>> folder, mask = tempfile.mkdtemp(), np.array([[True, False]])
    >>> _ = write_pruned(folder, {"w": np.array([[3.0, 0.0]], np.float32)}, {"w": mask})
    >>> read_pruned(folder)[0]["w"].tolist()
    [[3.0, 0.0]]
    """
    permutations = permutations or {}
    cache: dict[str, dict[str, np.ndarray]] = {}

    def convert(name: str) -> np.ndarray:
        array = np.asarray(tensors[name])
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        return array.astype(dtype) if dtype is not None and floating else array

    def parts(name: str) -> dict[str, np.ndarray]:
        if name not in cache:
            cache.clear()  # the parts of one matrix follow each other
            dense, mask = (turn(a, in_out) for a in (convert(name), np.asarray(masks[name])))
            cache[name] = encode(dense, mask, nm, permutations.get(name))
        return cache[name]

    specs, owners, record = {}, {}, {}
    for name, leaf in tensors.items():
        if name not in masks:
            floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            kind = dtype if dtype is not None and floating else leaf.dtype
            specs[name] = jax.ShapeDtypeStruct(leaf.shape, np.dtype(kind))
            continue
        for suffix, part in parts(name).items():
            specs[f"{name}.{suffix}"] = jax.ShapeDtypeStruct(part.shape, part.dtype)
            owners[f"{name}.{suffix}"] = (name, suffix)
        record[name] = list(turn(np.empty(leaf.shape, np.bool_), in_out).shape)

    def produce(name: str) -> np.ndarray:
        if name not in owners:
            return convert(name)
        owner, suffix = owners[name]
        return parts(owner)[suffix]

    about = {"shapes": record, "nm": nm, "in_out": in_out}
    return write_safetensors(
        folder, specs, produce, shard_bytes=shard_bytes, metadata={"pruned": json.dumps(about)}
    )


def read_pruned(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Read a checkpoint that `write_pruned` wrote, as dense tensors.

    Args:
        path: folder or file.

    Returns:
        Every tensor under its checkpoint's name, and the masks of the pruned ones.

    Raises:
        UserError: for a file without that record, or parts that do not fit.

    >>> read_pruned("nowhere.safetensors")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere.safetensors is not there; ...
    """
    about = _record(path)
    stored = read_safetensors(path)
    nm = None if about["nm"] is None else (int(about["nm"][0]), int(about["nm"][1]))
    tensors, masks, used = {}, {}, set()
    for name, (o, i) in about["shapes"].items():
        names = {s: f"{name}.{s}" for s in ("values", "mask", "index", "permutation")}
        parts = {suffix: stored[full] for suffix, full in names.items() if full in stored}
        _fits("values" in parts and ("mask" if nm is None else "index") in parts, (o, i))
        dense, mask = decode(parts, (o, i), nm)
        tensors[name], masks[name] = (turn(a, about["in_out"]) for a in (dense, mask))
        used |= {names[suffix] for suffix in parts}
    rest = {name: array for name, array in stored.items() if name not in used}
    return rest | tensors, masks


def _record(path: str | Path) -> dict[str, Any]:
    try:
        about = json.loads(read_header(path).metadata["pruned"])
        shapes = about["shapes"]
        sound = isinstance(shapes, dict) and isinstance(about["in_out"], bool)
        sound = sound and all(
            len(s) == 2 and all(isinstance(n, int) and 0 < n < 2**31 for n in s)
            and math.prod(s) < 2**40 for s in shapes.values()
        )  # fmt: skip
        if not sound or not (about["nm"] is None or len(about["nm"]) == 2):
            raise ValueError("record")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} holds no sound record of pruned matrices; expected a checkpoint that jaxsys "
            "prune wrote with --format packed or nm; load other checkpoints with models.lm.load"
        ) from None
    return about


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "columns", "starts"),
    meta_fields=("shape",),
)
@dataclass(frozen=True)
class SparseWeight:
    """Stand where a weight stood, holding only what was kept (compressed sparse rows).

    `models.lm.linear` multiplies through its ``matmul``.

    Attributes:
        values: kept weights, [Z].
        columns: of each, [Z].
        starts: of each row, [O + 1].
        shape: (O, I).

    >>> weight = sparse_weight(np.array([[0.0, 2.0]], np.float32), np.array([[False, True]]))
    >>> weight.matmul(jnp.array([[5.0, 7.0]])).tolist(), weight.dense().tolist()
    ([[14.0]], [[0.0, 2.0]])
    """

    values: Any
    columns: Any
    starts: Any
    shape: tuple[int, int]

    @property
    def ndim(self) -> int:
        """Count its axes."""
        return 2

    @property
    def dtype(self) -> Any:
        """Give the type of its values."""
        return self.values.dtype

    def matmul(self, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
        """Multiply rows of activations by the weight."""
        rows = Rows(self.values, self.columns, self.starts)
        return rows_product(rows, self.shape[1], x).astype(x.dtype)

    def dense(self) -> Array:
        """Give the weight as an ordinary array."""
        rows = jnp.searchsorted(self.starts, jnp.arange(self.values.shape[0]), side="right") - 1
        return jnp.zeros(self.shape, self.values.dtype).at[rows, self.columns].set(self.values)


def sparse_weight(weight: Float[np.ndarray, "O I"], mask: Bool[np.ndarray, "O I"]) -> SparseWeight:
    """Keep of a weight [O, I] only what a mask keeps.

    >>> sparse_weight(np.eye(3, dtype=np.float32), np.eye(3, dtype=bool)).values.shape
    (3,)
    """
    rows = to_rows(np.asarray(weight), np.asarray(mask))
    return SparseWeight(*(jnp.asarray(part) for part in rows), shape=weight.shape)
