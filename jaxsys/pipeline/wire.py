"""What a value weighs on the wire."""

import numpy as np

from jaxsys.pipeline.codec import encoded_bytes
from jaxsys.pipeline.work import Value


def wire_bytes(
    value: Value, ratio: float | int, codec: str, backward: bool, dtype: str = "float32"
) -> int:
    """Count the bytes of a value, or of its cotangent, on the wire; see `codec.encoded_bytes`.

    Args:
        value: the value.
        ratio: elements per kept element.
        codec: how it is encoded.
        backward: whether it is the cotangent, which only a differentiable value has.
        dtype: type of the values.

    Returns:
        Bytes.

    >>> [wire_bytes(Value(0, 4096, (1,), False), 8.0, "topk", back) for back in (False, True)]
    [4096, 0]
    """
    size = np.dtype(dtype).itemsize
    if not value.differentiable:
        return 0 if backward else int(value.n_bytes)
    if ratio == 1.0 or value.n_bytes % size:
        return int(value.n_bytes)
    return encoded_bytes((value.n_bytes // size,), dtype, ratio, codec)
