"""Lengths from a short list, so that a handful of compiled programs serves every request."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


def bucket(length: int) -> int:
    """Round a length up to 16, 24, 32, 48, 64, 96, ...: at most half as long again, from 16 on.

    >>> [bucket(n) for n in (1, 16, 17, 33, 100, 512)]
    [16, 16, 24, 48, 128, 512]
    """
    power = 16
    while power < length:
        if power * 3 // 2 >= length:
            return power * 3 // 2
        power *= 2
    return power


class Batch(NamedTuple):
    """Say which rows are run together, and in what shape.

    >>> Batch((2, 0), rows=2, length=16).members
    (2, 0)
    """

    members: tuple[int, ...]  # indices of rows
    rows: int  # at least as many: the rest is padding
    length: int


def batches(
    lengths: Sequence[int] | Int[np.ndarray, "N"], tokens_per_batch: int, most: int
) -> list[Batch]:
    """Put rows of similar length together, longest first.

    Args:
      lengths: of each row, in tokens.
      tokens_per_batch: rows times length of a batch at most (a single longer row is one batch).
      most: length that no batch exceeds; no row is longer.

    >>> batches([3, 40, 16], tokens_per_batch=64, most=512)
    [Batch(members=(1,), rows=1, length=48), Batch(members=(2, 0), rows=2, length=16)]
    """
    groups: dict[int, list[int]] = {}
    for i in np.argsort(-np.asarray(lengths, np.int64), kind="stable"):
        groups.setdefault(min(bucket(int(lengths[i])), most), []).append(int(i))
    found = []
    for length, members in groups.items():
        full = max(1, tokens_per_batch // length)
        for start in range(0, len(members), full):
            part = tuple(members[start : start + full])
            # A last, smaller batch uses the program of the full ones, if there are any.
            rows = full if len(members) >= full else _power_of_two(len(part))
            found.append(Batch(part, min(rows, full), length))
    return found


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
