"""NAS-Bench-101 cells: at most seven vertices and nine edges, three operations on the vertices.

An architecture is 56 numbers, NASLib's layout: the 7×7 adjacency matrix by rows, then the seven
vertices' operations. Ours are always in one form: vertices that lie on no path from input to output
are removed, and the output is the last vertex, so that cells of fewer vertices have empty ones
(`ABSENT`) before it. Axis ``N``: architectures.

Reference: Ying et al., NAS-Bench-101, arXiv 1902.09635.
"""

import hashlib
from ast import literal_eval
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxsys.core.errors import UserError

OPERATIONS = ("input", "output", "maxpool3x3", "conv1x1-bn-relu", "conv3x3-bn-relu")
INPUT, OUTPUT, POOL, CONV1, CONV3, ABSENT = range(6)
VERTICES, EDGES = 7, 9
_HASHED = {CONV3: 0, CONV1: 1, POOL: 2}  # the benchmark's own numbers


def _refuse(what: str, expected: str, advice: str = "correct the cell") -> UserError:
    return UserError(f"{what}; expected {expected}; {advice}")


def encode(matrix: Any, ops: Sequence[str | int]) -> Integer[np.ndarray, "56"]:
    """Check a cell, remove what is not between input and output, and bring it into our form.

    Args:
      matrix: `[V, V]` of 0 and 1, above the diagonal only.
      ops: of the V vertices, by name or number, `input` first and `output` last.

    Returns:
      The architecture.

    Raises:
      UserError: for a matrix or operation that is none, an input that does not reach the output,
        or more than 7 vertices or 9 edges.

    >>> decode(encode([[0, 1, 1], [0, 0, 0], [0, 0, 0]], ["input", "maxpool3x3", "output"]))[1]
    ['input', 'output']
    """
    m = np.asarray(matrix)
    names = [OPERATIONS[o] if isinstance(o, int) and 0 <= o < 5 else o for o in ops]
    if m.ndim != 2 or m.shape != (len(names), len(names)) or len(names) < 2:
        raise _refuse(f"a cell has a matrix {m.shape} and {len(names)} operations", "[V, V] and V")
    if not np.isin(m, (0, 1)).all() or np.tril(m).any():
        raise _refuse("a cell's matrix holds other numbers", "0 and 1 above the diagonal, else 0")
    for name in names[1:-1]:
        if name not in OPERATIONS[2:]:
            raise _refuse(f"operation {name!r} does not exist", ", ".join(OPERATIONS[2:]))
    if (names[0], names[-1]) != ("input", "output"):
        raise _refuse(f"the ends of a cell are {names[0]!r} and {names[-1]!r}", "input and output")
    keep = _between(m)
    if not keep[0]:
        raise _refuse("the input of a cell does not reach its output", "a path between them")
    m, names = m[keep][:, keep], [n for n, k in zip(names, keep, strict=True) if k]
    if len(names) > VERTICES or m.sum() > EDGES:
        raise _refuse(
            f"a cell has {len(names)} vertices and {int(m.sum())} edges", "at most 7 and 9"
        )
    place = np.array([*range(len(names) - 1), VERTICES - 1])
    full = np.zeros((VERTICES, VERTICES), np.int32)
    full[np.ix_(place, place)] = m
    found = np.full(VERTICES, ABSENT, np.int32)
    found[place] = [OPERATIONS.index(n) for n in names]
    return np.concatenate([full.reshape(-1), found])


def _between(m: np.ndarray) -> np.ndarray:
    """Tell which vertices lie on a path from the first to the last."""
    reach = np.eye(len(m), dtype=int)
    for _ in range(len(m)):
        reach = np.minimum(reach + reach @ m, 1)
    return (reach[0] > 0) & (reach[:, -1] > 0)


def decode(arch: Any) -> tuple[np.ndarray, list[str]]:
    """Return a cell's matrix and the names of its operations, without empty vertices.

    >>> decode(encode([[0, 1, 0], [0, 0, 1], [0, 0, 0]], [0, 4, 1]))[1]
    ['input', 'conv3x3-bn-relu', 'output']
    """
    a = np.asarray(arch)
    if a.shape != (56,) or not np.issubdtype(a.dtype, np.integer):
        raise _refuse(f"an architecture has shape {a.shape}", "56 whole numbers")
    ops = a[49:]
    keep = ops != ABSENT
    names = [OPERATIONS[o] if 0 <= o < 5 else str(o) for o in ops[keep]]
    return a[:49].reshape(7, 7)[keep][:, keep], names


def to_string(arch: Any) -> str:
    """Write a cell as the benchmark's files do: digits of the matrix, names of the operations.

    >>> to_string(encode([[0, 1, 0], [0, 0, 1], [0, 0, 0]], [0, 4, 1]))
    '010001000|input,conv3x3-bn-relu,output'
    """
    m, names = decode(arch)
    return "".join(map(str, m.reshape(-1).tolist())) + "|" + ",".join(names)


def from_string(text: str) -> Integer[np.ndarray, "56"]:
    """Read a cell: `digits|names`, or NASLib's tuple of 56 numbers.

    Raises:
      UserError: for a text of another form, and as `encode` does.

    >>> to_string(from_string("010001000|input,maxpool3x3,output"))
    '010001000|input,maxpool3x3,output'
    """
    digits, _, names = text.partition("|")
    if names and digits and set(digits) <= {"0", "1"}:
        side = round(len(digits) ** 0.5)
        if side * side == len(digits):
            m = np.array([int(d) for d in digits]).reshape(side, side)
            return encode(m, names.split(","))
    elif text.startswith("(") and len(text) < 1000:
        try:
            numbers = literal_eval(text)
        except (ValueError, SyntaxError):
            numbers = ()
        if len(numbers) == 56 and all(type(n) is int for n in numbers):
            return encode(np.array(numbers[:49]).reshape(7, 7), list(numbers[49:]))
    raise _refuse(
        f"{text[:60]!r} is no NAS-Bench-101 cell",
        "such as 010001000|input,maxpool3x3,output, or NASLib's 56 numbers in brackets",
    )


def module_hash(arch: Any) -> str:
    """Return the benchmark's key of a cell, equal for isomorphic cells.

    Every vertex starts from its degrees and operation, and takes in its sorted neighbours' hashes
    as often as there are vertices (Weisfeiler-Lehman); MD5 throughout, as in the published tables.

    >>> module_hash(encode([[0, 1], [0, 0]], [0, 1]))[:6]
    '043721'
    """
    m, names = decode(arch)
    inner = [_HASHED[OPERATIONS.index(n)] for n in names[1:-1]]
    start = zip(m.sum(1).tolist(), m.sum(0).tolist(), [-1, *inner, -2], strict=True)
    hashes = [_md5(str(triple)) for triple in start]
    for _ in names:
        hashes = [
            _md5("|".join([*("".join(sorted(_of(hashes, edges))) for edges in pair), own]))
            for own, *pair in zip(hashes, m.T, m, strict=True)
        ]
    return _md5(str(sorted(hashes)))


def _of(hashes: list[str], edges: np.ndarray) -> list[str]:
    return [h for h, there in zip(hashes, edges, strict=True) if there]


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def sample(n: int, seed: int = 0) -> Integer[np.ndarray, "N 56"]:
    """Draw distinct cells: a fair coin for each of the 21 edges, operations at random.

    Draws with more than 9 edges or no path are thrown away, as are isomorphic cells.

    >>> sample(3).shape
    (3, 56)
    """
    rng, found = np.random.default_rng(seed), {}
    while len(found) < n:
        m = np.triu(rng.integers(2, size=(7, 7)), 1)
        ops = [INPUT, *rng.integers(2, 5, size=5).tolist(), OUTPUT]
        keep = _between(m)
        if keep[0] and m[keep][:, keep].sum() <= EDGES:
            arch = encode(m, ops)
            found.setdefault(module_hash(arch), arch)
    return np.stack(list(found.values()))


def vertex_channels(
    matrix: Integer[np.ndarray, "... 7 7"] | Integer[Array, "... 7 7"], channels: int
) -> Any:
    """Divide a cell's channels among its vertices.

    Vertices that feed the output share them evenly, the first ones taking what is left over; any
    other vertex has as many as the widest one that it feeds; empty ones have none.

    Args:
      matrix: of architectures in our form; may be traced.
      channels: of the output.

    Returns:
      `[..., 7]`; the input's entry is 0, since it is no share of the output.

    >>> cell = encode([[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]], [0, 4, 4, 1])
    >>> vertex_channels(cell[:49].reshape(7, 7), 5).tolist()
    [0, 3, 2, 0, 0, 0, 5]
    """
    xp = jnp if isinstance(matrix, jax.Array) else np
    feeds = matrix[..., 1:6, 6]
    count = xp.maximum(feeds.sum(-1, keepdims=True), 1)
    direct = (channels // count + (xp.cumsum(feeds, -1) <= channels % count)) * feeds
    found = [xp.zeros_like(feeds[..., 0]) + channels]
    for v in range(5, 0, -1):
        wide = direct[..., v - 1]
        for later, w in zip(range(6, v, -1), found, strict=True):
            if later < 6:
                passes = matrix[..., v, later] * (1 - feeds[..., v - 1])
                wide = xp.maximum(wide, passes * w)
        found.append(wide)
    return xp.stack([xp.zeros_like(found[0]), *found[::-1]], -1)


def _counts(archs: Any, channels: int, modules: int, rows: int) -> tuple[Any, Any]:
    """Count parameters and operations of the cells alone."""
    a = np.asarray(archs, np.int64)
    m, ops = a[..., :49].reshape(*a.shape[:-1], 7, 7), a[..., 49:]
    params = flops = np.zeros(a.shape[:-1], np.int64)
    for stack in range(3):
        wide = channels << stack
        places = (rows >> stack) ** 2
        own = vertex_channels(m, wide)
        for module in range(modules):
            into = wide // 2 if stack and not module else wide
            project, size = m[..., 0, :] * own, (ops == CONV3) * 9 + (ops == CONV1)
            weights = (project * into + size * own**2).sum(-1)
            outputs = (project + (size > 0) * own).sum(-1)
            pooled = ((ops == POOL) * own).sum(-1)
            params = params + weights + 2 * outputs
            flops = flops + places * (weights + 3 * outputs + 9 * pooled)
    return params, flops


def params_m(
    archs: Any, *, channels: int = 128, modules: int = 3, n_classes: int = 10
) -> Float[np.ndarray, "..."]:
    """Count trainable parameters, in millions: weights, normalisations' scales and biases.

    Args:
      archs: `[..., 56]`.
      channels: of the stem; the benchmark's is 128.
      modules: cells in each of the three stacks; the benchmark's is 3.
      n_classes: outputs.

    >>> float(params_m(encode([[0, 1], [0, 0]], [0, 1])))
    0.88257
    """
    last = 4 * channels
    fixed = 27 * channels + 2 * channels + last * n_classes + n_classes
    return np.asarray((_counts(archs, channels, modules, 32)[0] + fixed) / 1e6)


def mflops(
    archs: Any, *, channels: int = 128, modules: int = 3, rows: int = 32, n_classes: int = 10
) -> Float[np.ndarray, "..."]:
    """Count operations on one image of `rows` × `rows`, in millions, as NASLib's table does.

    One for a multiply-add, 3 for each value that is normalised and rectified, and the window's size
    for each value that is pooled.

    >>> float(mflops(encode([[0, 1], [0, 0]], [0, 1]), rows=32)) > 100
    True
    """
    stem = rows**2 * 30 * channels
    halved = 4 * sum((rows >> s) ** 2 * (channels << (s - 1)) for s in (1, 2))
    cells = _counts(archs, channels, modules, rows)[1]
    return np.asarray((cells + stem + halved + 4 * channels * n_classes) / 1e6)
