"""NAS-Bench-201 cells: six edges between four nodes, five operations, 15,625 architectures.

A cell is written as six operation numbers for the edges (1,2), (1,3), (1,4), (2,3), (2,4), (3,4),
NASLib's order and numbering; its index reads them as digits to base five. The arch string of the
original benchmark lists the same edges by target node instead.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer

from jaxsys.core.errors import UserError

OPERATIONS = ("skip_connect", "none", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3")
SKIP, NONE, CONV3, CONV1, POOL = range(5)
EDGES = ((1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4))
N_CELLS = 5**6

# Place of each edge, in our order, among the edges sorted by target node.
BY_TARGET = tuple(sorted(range(6), key=lambda e: (EDGES[e][1], EDGES[e][0])))


def check_ops(ops: Sequence[int] | np.ndarray) -> Integer[np.ndarray, "... 6"]:
    """Check that every number names an operation.

    Args:
      ops: `[..., 6]` operation numbers.

    Returns:
      The same as an int32 array.

    Raises:
      UserError: naming the first number that is none, or a wrong number of edges.

    >>> check_ops([2, 0, 1, 3, 4, 2]).shape
    (6,)
    """
    array = np.asarray(ops)
    if array.ndim < 1 or array.shape[-1] != 6 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"a cell is given with shape {array.shape} and dtype {array.dtype}; expected six whole "
            "numbers; give one operation for each of the edges (1,2), (1,3), (1,4), (2,3), (2,4), "
            "(3,4)"
        )
    wrong = array[(array < 0) | (array > 4)]
    if wrong.size:
        raise UserError(
            f"operation {int(wrong.flat[0])} does not exist; expected 0 to 4 for "
            f"{', '.join(OPERATIONS)}; correct the cell"
        )
    return array.astype(np.int32)


def to_index(ops: Sequence[int] | np.ndarray) -> Integer[np.ndarray, "..."]:
    """Number a cell from 0 to 15,624, in the order of its six digits.

    >>> int(to_index([0, 0, 0, 0, 1, 2]))
    7
    """
    return np.asarray(check_ops(ops) @ 5 ** np.arange(5, -1, -1))


def from_index(index: int | np.ndarray) -> Integer[np.ndarray, "... 6"]:
    """Return the operations of a numbered cell.

    Raises:
      UserError: for a number outside 0 to 15,624.

    >>> from_index(7).tolist()
    [0, 0, 0, 0, 1, 2]
    """
    array = np.asarray(index)
    if array.size and not (array.min() >= 0 and array.max() < N_CELLS):
        raise UserError(
            f"cell index {int(array.min())} to {int(array.max())} was asked for; expected 0 to "
            f"{N_CELLS - 1}; correct the index"
        )
    return (array[..., None] // 5 ** np.arange(5, -1, -1) % 5).astype(np.int32)


def all_cells() -> Integer[np.ndarray, "N 6"]:
    """List all 15,625 cells in the order of their index.

    >>> all_cells().shape
    (15625, 6)
    """
    return from_index(np.arange(N_CELLS))


def to_string(ops: Sequence[int] | np.ndarray) -> str:
    """Write a cell as the benchmark's arch string.

    >>> to_string([2, 0, 1, 3, 4, 2])
    '|nor_conv_3x3~0|+|skip_connect~0|nor_conv_1x1~1|+|none~0|avg_pool_3x3~1|nor_conv_3x3~2|'
    """
    cell = check_ops(ops)
    nodes = []
    for target in (2, 3, 4):
        edges = [e for e in BY_TARGET if EDGES[e][1] == target]
        nodes.append("".join(f"|{OPERATIONS[cell[e]]}~{EDGES[e][0] - 1}" for e in edges) + "|")
    return "+".join(nodes)


def from_string(text: str) -> Integer[np.ndarray, "6"]:
    """Read the benchmark's arch string.

    Raises:
      UserError: for an unknown operation (named), or a string of another form.

    >>> from_string(to_string([2, 0, 1, 3, 4, 2])).tolist()
    [2, 0, 1, 3, 4, 2]
    """
    found = [re.findall(r"\|([^|~]*)~(\d)", part) for part in text.split("+")]
    unknown = [name for part in found for name, _ in part if name not in OPERATIONS]
    if unknown:
        raise UserError(
            f"operation {unknown[0]!r} does not exist in NAS-Bench-201; expected one of "
            f"{', '.join(OPERATIONS)}; correct the arch string"
        )
    cell = np.zeros(6, np.int32)
    sources = [[int(source) for _, source in part] for part in found]
    if sources == [[0], [0, 1], [0, 1, 2]]:
        flat = [name for part in found for name, _ in part]
        cell[list(BY_TARGET)] = [OPERATIONS.index(name) for name in flat]
    if sources != [[0], [0, 1], [0, 1, 2]] or to_string(cell) != text:
        raise UserError(
            f"{text!r} is no arch string; expected the form |op~0|+|op~0|op~1|+|op~0|op~1|op~2|; "
            "correct it"
        )
    return cell


def params_m(ops: Sequence[int] | np.ndarray) -> Float[np.ndarray, "..."]:
    """Count the parameters of the benchmark's CIFAR-10 network, in millions.

    Formula: 0.073306 + 0.24304·n₃ₓ₃ + 0.028·n₁ₓ₁, with n the numbers of edges: five cells in each
    of three stages of 16, 32 and 64 channels make 5·Σ(9C² + 2C) and 5·Σ(C² + 2C).

    >>> float(params_m([2, 2, 2, 2, 2, 2]))
    1.531546
    """
    cell = check_ops(ops)
    three, one = (cell == CONV3).sum(-1), (cell == CONV1).sum(-1)
    return np.asarray((73_306 + 243_040 * three + 28_000 * one) / 1e6)


def mflops(ops: Sequence[int] | np.ndarray) -> Float[np.ndarray, "..."]:
    """Count the operations of the benchmark's CIFAR-10 network on one image, in millions.

    Formula: 7.943872 + 1.29024·n_pool + 35.81952·n₃ₓ₃ + 4.36224·n₁ₓ₁. The table counts one for a
    multiply-add, 3 per value for ReLU and normalisation, and 9 per value for pooling; the constant
    of the fixed part is the table's own.

    >>> float(mflops([2, 2, 2, 2, 2, 2]))
    222.860992
    """
    cell = check_ops(ops)
    pool, three, one = ((cell == op).sum(-1) for op in (POOL, CONV3, CONV1))
    return np.asarray((7_943_872 + 1_290_240 * pool + 35_819_520 * three + 4_362_240 * one) / 1e6)


def one_hot(ops: Sequence[int] | np.ndarray) -> Float[np.ndarray, "... 30"]:
    """Write the six operations as 30 zeros and ones.

    >>> one_hot([0, 0, 0, 0, 1, 2]).reshape(6, 5).argmax(1).tolist()
    [0, 0, 0, 0, 1, 2]
    """
    cell = check_ops(ops)
    return np.eye(5, dtype=np.float32)[cell].reshape(*cell.shape[:-1], 30)


def reaches(ops: Sequence[int] | np.ndarray) -> Bool[np.ndarray, "... 6"]:
    """Tell which edges carry something from the cell's input to its output.

    An edge counts if it is not `none`, its source is reached from node 1 and its target reaches
    node 4; the others change nothing that the network computes.

    >>> reaches([2, 1, 1, 1, 2, 2]).tolist()
    [True, False, False, False, True, False]
    """
    live = check_ops(ops) != NONE
    shape = live.shape[:-1]
    forward = {1: np.ones(shape, bool)}
    backward = {4: np.ones(shape, bool)}
    for node in (2, 3, 4):
        into = [e for e in range(6) if EDGES[e][1] == node]
        forward[node] = np.any([live[..., e] & forward[EDGES[e][0]] for e in into], 0)
    for node in (3, 2, 1):
        out = [e for e in range(6) if EDGES[e][0] == node]
        backward[node] = np.any([live[..., e] & backward[EDGES[e][1]] for e in out], 0)
    used = [live[..., e] & forward[a] & backward[b] for e, (a, b) in enumerate(EDGES)]
    return np.stack(used, -1)


def canonical(ops: Sequence[int] | np.ndarray) -> Integer[np.ndarray, "... 6"]:
    """Replace operations that change nothing by `none`.

    >>> canonical([2, 1, 1, 3, 2, 2]).tolist()
    [2, 1, 1, 3, 2, 2]
    >>> canonical([2, 1, 1, 1, 1, 2]).tolist()
    [1, 1, 1, 1, 1, 1]
    """
    return np.where(reaches(ops), check_ops(ops), NONE).astype(np.int32)
