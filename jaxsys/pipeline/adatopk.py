"""AdaTopK: compress each boundary by as much as it is slow."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.pipeline.codec import encoded_bytes
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.estimate import NO_OVERHEADS, Overheads
from jaxsys.pipeline.work import Work


def adaptive_ratios(
    work: Work,
    fleet: Fleet,
    boundaries: Sequence[int],
    devices: Sequence[int],
    ratio: float | int,
    *,
    backward: bool = False,
    overheads: Overheads = NO_OVERHEADS,
    dtype: str = "float32",
) -> tuple[float, ...]:
    """Choose how many elements per kept element each boundary sends.

    ``r_i = max(1, f · r · R_i / max_j R_j)`` with R_i the seconds of the dense message of boundary
    i and ``f = bytes_per_kept / bytes_per_value`` of the encoding. The slowest boundary's message
    shrinks to 1/r of its bytes, others in proportion to their time, so that all take about
    ``max_j R_j / r``; what is as fast as that already goes dense.

    Reconstruction: the paper's factor is recalled as 3, which is f for 4-byte values with 8-byte
    indices. With packed indices, or a bitmap where that is smaller, f depends on how many are
    kept: it is the one with which the message takes its share of the bytes, exactly where one value
    crosses the boundary. With measured overheads a boundary goes dense where compressing a message
    and bringing it back takes longer than the link saves; that is ours.

    Args:
        work: the graph's costs.
        fleet: devices and links.
        boundaries: nodes at which stages 1 … S−1 begin, [S − 1].
        devices: device of each stage, [S].
        ratio: r ≥ 1, by how much the slowest boundary's message shrinks.
        backward: for the cotangents, which cross the links the other way.
        overheads: measured seconds of codecs and of handing over bytes.
        dtype: type of the values.

    Returns:
        Ratios, [S − 1]; 1 is dense.

    Raises:
        UserError: a ratio below 1.

    Reference: arXiv 2410.12707, AdaTopK.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> work = chain_work([1] * 3, [4096 * 4, 512 * 4])
    >>> [round(r, 1) for r in adaptive_ratios(work, even_fleet([1] * 3), (1, 2), (0, 1, 2), 16)]
    [22.0, 2.1]
    """
    if not (np.isfinite(ratio) and ratio >= 1):
        raise UserError(
            f"the compression ratio is {ratio}; it must be a finite number of at least 1 (1 is "
            "dense); pass another"
        )
    size = np.dtype(dtype).itemsize
    sent = [
        [v.n_bytes for v in work.values if v.source < b <= max(v.targets) and v.differentiable]
        for b in boundaries
    ]
    n_bytes = np.array([float(sum(sizes)) for sizes in sent])
    largest = np.array([max(sizes, default=0) // size for sizes in sent], np.float64)
    ends = list(pairwise(devices))
    pairs = [(q, p) if backward else (p, q) for p, q in ends]
    dense = np.array(
        [fleet.transfer_s(p, q, total) for (p, q), total in zip(pairs, n_bytes, strict=True)]
    )
    if not len(dense) or dense.max() == 0:
        return (1.0,) * len(dense)
    shrink = ratio * dense / dense.max()
    elements, bits = n_bytes / size, np.ceil(np.log2(np.maximum(largest, 2)))
    room = n_bytes / np.maximum(shrink, 1)
    kept = np.maximum(room / (size + bits / 8), (room - elements / 8) / size)
    found = np.where(shrink > 1, elements / np.maximum(np.floor(kept), 1), 1.0)
    ratios = [max(1.0, float(r)) for r in found]
    for i, (p, q) in enumerate(pairs):
        fewer = sum(encoded_bytes((n // size,), dtype, ratios[i], "topk") for n in sent[i])
        saved_s = float(dense[i]) - fleet.transfer_s(p, q, fewer)
        if saved_s < _coding_s(fleet, p, q, float(n_bytes[i]), fewer, ratios[i], overheads):
            ratios[i] = 1.0
    return tuple(ratios)


def _coding_s(
    fleet: Fleet, p: int, q: int, n_bytes: float, fewer: int, ratio: float, beside: Overheads
) -> float:
    """Seconds that both ends of a message take more when it is compressed."""
    sender, receiver = beside.reference_flops_s / fleet.speed_flops_s[[p, q]]
    encode = beside.encode_s_per_byte + beside.encode_s_per_kept / ratio
    codec_s = n_bytes * (encode * sender + beside.decode_s_per_byte * receiver)
    return float(codec_s - beside.message_s_per_byte * (n_bytes - fewer) * (sender + receiver))
