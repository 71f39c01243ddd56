"""DARTS cells: a normal and a reducing one, four steps of two operations each, eight operations.

An architecture is `[2, 8, 2]` numbers: for the normal and the reducing cell, for each of the eight
edges (two of each step), the operation and the state it reads. States 0 and 1 are the outputs of
the two cells before, state 2 + i is the sum of step i's edges; a cell's output joins the four
steps. Axis ``N``: architectures.

Reference: Liu et al., DARTS, arXiv 1806.09055; Radosavovic et al., NDS, arXiv 1905.13214.
"""

import ast
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from jaxsys.core.errors import UserError

OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
NONE, MAX, AVG, SKIP, SEP3, SEP5, DIL3, DIL5 = range(8)
STEPS = 4
_ADVICE = "correct the genotype"


def _refuse(what: str, expected: str) -> UserError:
    return UserError(f"{what}; expected {expected}; {_ADVICE}")


def check(arch: Any) -> Integer[np.ndarray, "... 2 8 2"]:
    """Check operations and sources.

    Raises:
      UserError: naming the first number that is wrong.

    >>> check(np.zeros((2, 8, 2), int)).shape
    (2, 8, 2)
    """
    a = np.asarray(arch)
    if a.shape[-3:] != (2, 2 * STEPS, 2) or not np.issubdtype(a.dtype, np.integer):
        raise _refuse(f"a genotype has shape {a.shape} and dtype {a.dtype}", "2×8×2 whole numbers")
    ops, sources = a[..., 0], a[..., 1]
    wrong = ops[(ops < 0) | (ops > 7)]
    if wrong.size:
        raise _refuse(f"operation {int(wrong.flat[0])} does not exist", "0 to 7")
    late = sources[(sources < 0) | (sources >= 2 + np.arange(8) // 2)]
    if late.size:
        raise _refuse(
            f"an edge reads state {int(late.flat[0])}", "one before its own: below 2 + step"
        )
    return a.astype(np.int32)


def from_genotype(genotype: Mapping[str, Any]) -> Integer[np.ndarray, "2 8 2"]:
    """Read the parts of a genotype: `normal`, `normal_concat`, `reduce`, `reduce_concat`.

    Raises:
      UserError: for another number of edges, an unknown operation (named), a state that comes
        later, or a cell that does not join states 2 to 5.

    >>> edges = [["skip_connect", 0], ["sep_conv_3x3", 1]] * 4
    >>> from_genotype({"normal": edges, "reduce": edges})[0, 1].tolist()
    [4, 1]
    """
    found = []
    for cell in ("normal", "reduce"):
        edges = genotype.get(cell)
        if not isinstance(edges, list | tuple) or len(edges) != 2 * STEPS:
            raise _refuse(f"cell {cell!r} holds no list of 8 edges", "8 pairs (operation, state)")
        joined = genotype.get(f"{cell}_concat", range(2, 6))
        if list(joined) != [2, 3, 4, 5]:
            raise _refuse(f"cell {cell!r} joins states {list(joined)[:9]}", "2, 3, 4, 5")
        for edge in edges:
            if not isinstance(edge, list | tuple) or len(edge) != 2 or type(edge[1]) is not int:
                raise _refuse(f"cell {cell!r} holds {str(edge)[:60]!r}", "pairs (operation, state)")
            if edge[0] not in OPERATIONS:
                raise _refuse(f"operation {edge[0]!r} does not exist", ", ".join(OPERATIONS))
        found.append([[OPERATIONS.index(op), source] for op, source in edges])
    return check(np.array(found))


def from_string(text: str) -> Integer[np.ndarray, "2 8 2"]:
    """Read a genotype as PyTorch's DARTS prints it; nothing is evaluated.

    Raises:
      UserError: for another form, and as `from_genotype` does.

    >>> arch = sample(1)[0]
    >>> bool((from_string(to_string(arch)) == arch).all())
    True
    """
    wrong = _refuse(
        f"{text[:60]!r} is no genotype",
        "Genotype(normal=[('sep_conv_3x3', 0), ...], normal_concat=range(2, 6), reduce=..., ...)",
    )
    if len(text) > 5000:
        raise wrong
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise wrong
        parts = {str(k.arg): _literal(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError):
        raise wrong from None
    return from_genotype(parts)


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        first, end = (ast.literal_eval(a) for a in node.args)
        return range(first, min(end, first + 100))
    return ast.literal_eval(node)


def to_string(arch: Any) -> str:
    """Write a genotype as PyTorch's DARTS prints it.

    >>> to_string(np.zeros((2, 8, 2), int))[:45]
    "Genotype(normal=[('none', 0), ('none', 0), ('"
    """
    normal, reduce = (
        [(OPERATIONS[op], source) for op, source in cell.tolist()] for cell in check(arch)
    )
    joined = "concat=range(2, 6)"
    return f"Genotype(normal={normal}, normal_{joined}, reduce={reduce}, reduce_{joined})"


def sample(n: int, seed: int = 0) -> Integer[np.ndarray, "N 2 8 2"]:
    """Draw architectures: each step reads two different states; any operation but `none`.

    >>> sample(3).shape
    (3, 2, 8, 2)
    """
    rng = np.random.default_rng(seed)
    found = np.empty((n, 2, 2 * STEPS, 2), np.int32)
    found[..., 0] = rng.integers(1, 8, size=found.shape[:-1])
    for step in range(STEPS):
        order = rng.random((n, 2, 2 + step)).argsort(-1)
        found[:, :, 2 * step : 2 * step + 2, 1] = np.sort(order[..., :2], -1)
    return found


class Layer(NamedTuple):
    """One cell's place in the network.

    Attributes:
      width: channels of each of its states.
      reduces: whether it halves the image.
      rows: of the image that it leaves, for 32 at the input.
      inputs: channels of the two cells before.
      halved: whether the first of them stands at twice the resolution of the second.

    >>> plan(16, 8)[2]
    Layer(width=32, reduces=True, rows=16, inputs=(64, 64), halved=False)
    """

    width: int
    reduces: bool
    rows: int
    inputs: tuple[int, int]
    halved: bool


def plan(channels: int, cells: int, rows: int = 32) -> tuple[Layer, ...]:
    """Lay out the network: cells at one and at two thirds of the depth double the width.

    Args:
      channels: of the first cells' states; the stem has three times as many.
      cells: the depth.
      rows: of the images.

    >>> [layer.width for layer in plan(16, 6)]
    [16, 16, 32, 32, 64, 64]
    """
    before, last, found, halved = 3 * channels, 3 * channels, [], False
    for i in range(cells):
        reduces = i in (cells // 3, 2 * cells // 3)
        channels, rows = channels << reduces, rows >> reduces
        found.append(Layer(channels, reduces, rows, (before, last), halved))
        before, last, halved = last, 4 * channels, reduces
    return tuple(found)


def _counts(archs: Any, channels: int, cells: int, rows: int) -> tuple[Any, Any]:
    a = check(archs).astype(np.int64)
    params = flops = np.zeros(a.shape[:-3], np.int64)
    for layer in plan(channels, cells, rows):
        ops, sources = np.moveaxis(a[..., int(layer.reduces), :, :], -1, 0)
        c, places = layer.width, layer.rows**2
        full = np.where(layer.reduces & (sources < 2), 4, 1)
        taps = np.select([np.isin(ops, (SEP3, DIL3)), np.isin(ops, (SEP5, DIL5))], [9, 25], 0)
        twice = np.where(ops >= DIL3, 1, 2)
        conv = (taps > 0) * twice * (taps * c + c * c)
        halve = (ops == SKIP) & (full == 4)
        weights = conv + halve * c * c
        norms = ((taps > 0) * twice + halve) * 2 * c
        pre = sum(layer.inputs) * c
        params = params + (weights + norms).sum(-1) + pre + 4 * c
        flops = flops + places * (weights.sum(-1) + pre * (4 if layer.reduces else 1))
    return params, flops


def params_m(
    archs: Any, *, channels: int = 16, cells: int = 8, n_classes: int = 10
) -> Float[np.ndarray, "..."]:
    """Count parameters of the CIFAR network without its auxiliary head, in millions.

    Args:
      archs: `[..., 2, 8, 2]`.
      channels: of the first cells; 36 in the paper's evaluation.
      cells: 20 there.
      n_classes: outputs.

    >>> float(params_m(np.zeros((2, 8, 2), int), channels=36, cells=20))
    1.370134
    """
    last = 4 * plan(channels, cells)[-1].width
    fixed = 27 * 3 * channels + 6 * channels + last * n_classes + n_classes
    return np.asarray((_counts(archs, channels, cells, 32)[0] + fixed) / 1e6)


def mflops(
    archs: Any, *, channels: int = 16, cells: int = 8, rows: int = 32, n_classes: int = 10
) -> Float[np.ndarray, "..."]:
    """Count the multiply-adds of convolutions and classifier on one image, in millions.

    >>> few, many = np.zeros((2, 2, 8, 2), int), np.zeros((2, 8, 2), int) + [4, 0]
    >>> bool(mflops(few)[0] < mflops(many))
    True
    """
    last = 4 * plan(channels, cells)[-1].width
    fixed = rows**2 * 27 * 3 * channels + last * n_classes
    return np.asarray((_counts(archs, channels, cells, rows)[1] + fixed) / 1e6)
