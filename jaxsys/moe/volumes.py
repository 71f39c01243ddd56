"""How much each operation of a mixture-of-experts layer moves or multiplies.

The letters of the paper: B sequences and L tokens of each in a group of ranks that share experts
(a node), M model width, H hidden width of an expert, k experts of a token, f capacity factor,
N_ESP ranks that split an expert, N_MP ranks that split the dense part.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.moe.capacity import slots_per_expert
from jaxsys.moe.contract import Dims, MoESpec


class Volumes(NamedTuple):
    """Count what one layer's operations handle on one rank in the forward pass.

    The fields may be numbers or arrays of one shape (many configurations at once).

    Attributes:
        all_to_all: elements of the buffer that is exchanged, each of the two times.
        all_gather: elements of the gathered buffer.
        reduce_scatter: elements of the buffer that is summed.
        expert: multiply-adds of the experts.

    >>> Volumes(1.0, 4.0, 4.0, 8.0).expert
    8.0
    """

    all_to_all: Any
    all_gather: Any
    reduce_scatter: Any
    expert: Any


@dataclass(frozen=True)
class Shape:
    """Describe a layer by the sizes that set its volumes.

    Args:
        batch: B.
        tokens: L.
        width: M.
        hidden: H.
        k: experts of a token.
        factor: f; None for no drop, taken as balanced (f = 1). Reconstruction: the paper's ``f=*``
            leaves open what is assumed of the imbalance.
        matmuls: matrices of an expert, 2 or 3 (gated).
        expert_ranks: N_ESP, ranks that split each expert.
        dense_ranks: N_MP, ranks that split the dense part.

    Raises:
        UserError: for a size that is not positive, or other than 2 or 3 matrices.

    >>> Shape(batch=4, tokens=1024, width=4096, hidden=14336).k
    2
    """

    batch: int
    tokens: int
    width: int
    hidden: int
    k: int = 2
    factor: float | int | None = 1.2
    matmuls: int = 2
    expert_ranks: int = 1
    dense_ranks: int = 1

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}; expected a number above 0; change it")
        if self.matmuls not in (2, 3):
            raise UserError(
                f"matmuls is {self.matmuls}; expected 2 (GPT's) or 3 (gated experts); choose one"
            )

    @property
    def filled(self) -> float:
        """Return k·f, the slots for each token."""
        return self.k * (1.0 if self.factor is None else float(self.factor))


def volumes(shape: Shape) -> Volumes:
    """Count a layer's volumes from its sizes.

    ``n_a2a = k·f·B·L·M / N_ESP``, ``n_ag = n_rs = k·f·B·L·M`` and
    ``n_exp = k·f·B·L·M·H·(matrices) / N_ESP``.

    Args:
        shape: sizes of the layer.

    Returns:
        Elements, and multiply-adds of the experts.

    Reference: arXiv 2501.10714, section on the performance models, and its released code.

    >>> shape = Shape(4, 1024, 4096, 14336, matmuls=3, expert_ranks=8)
    >>> [float(f"{n:.9g}") for n in volumes(shape)]
    [5033164.8, 40265318.4, 40265318.4, 216466352000.0]
    """
    gathered = shape.filled * shape.batch * shape.tokens * shape.width
    expert = gathered * shape.hidden * shape.matmuls / shape.expert_ranks
    return Volumes(gathered / shape.expert_ranks, gathered, gathered, expert)


def layer_volumes(
    spec: MoESpec, dims: Dims, rows: int, *, tensor_ranks: int = 1, multiple: int = 1
) -> Volumes:
    """Count the volumes of one of this package's layers on one rank, padding included.

    With the capacity C of the rank's own rows: ``n_a2a = E·C·D``, ``n_ag = n_rs`` that times the
    tensor ranks, ``n_exp = E·C·D·F·(matrices)``.

    Args:
        spec: parts of the layer.
        dims: its sizes.
        rows: tokens N on one rank.
        tensor_ranks: ranks that split each expert (ESP).
        multiple: of which C must be one: the least common multiple of the degrees.

    Returns:
        Elements, and multiply-adds of the experts.

    Raises:
        UserError: for no token or no rank.

    >>> from jaxsys.moe.contract import Capacity, Experts, Gate, Order
    >>> gate, order = Gate(None, None, 2), Order(None, None)
    >>> spec = MoESpec(gate, order, Experts(None, None, None, {}, 3), capacity=Capacity(1.0))
    >>> layer_volumes(spec, Dims(width=8, hidden=16, experts=4), rows=64, tensor_ranks=2)
    Volumes(all_to_all=1024, all_gather=2048, reduce_scatter=2048, expert=49152)
    """
    if tensor_ranks < 1:
        raise UserError(
            f"tensor_ranks is {tensor_ranks}; expected a whole number from 1 up; change it"
        )
    slots = slots_per_expert(spec.capacity, rows, int(spec.gate.k), dims.experts, multiple)
    sent = dims.experts * slots * dims.width
    expert = sent * dims.hidden * spec.experts.matmuls
    return Volumes(sent, sent * tensor_ranks, sent * tensor_ranks, expert)


def dense_gradient(shape: Shape) -> float:
    """Count the elements of a layer's dense gradient on one rank.

    GPT (two matrices): ``3M²/N_MP + 3M/N_MP + M²/N_MP + M``. Mixtral (three), whose key and value
    heads are a quarter of the queries': ``1.5M²/N_MP + M²/N_MP``.

    Args:
        shape: sizes of the layer.

    Returns:
        Elements.

    Reference: the released code of arXiv 2501.10714.

    >>> dense_gradient(Shape(1, 1, width=8, hidden=32))
    288.0
    """
    m, ranks = float(shape.width), shape.dense_ranks
    if shape.matmuls == 3:
        return 1.5 * m * m / ranks + m * m / ranks
    return 3 * m * m / ranks + 3 * m / ranks + m * m / ranks + m


def dense_work(shape: Shape) -> float:
    """Count the multiply-adds of a layer's attention on one rank, forward.

    ``B·L·(4M² + 2L·M) / N_MP``; with three expert matrices (Mixtral) key and value heads are a
    quarter, so 2.5M² for 4M².

    Args:
        shape: sizes of the layer.

    Returns:
        Multiply-adds.

    >>> dense_work(Shape(1, 2, width=8, hidden=32))
    576.0
    """
    m = float(shape.width)
    weights = (2.5 if shape.matmuls == 3 else 4.0) * m * m
    rows = shape.batch * shape.tokens
    return rows * (weights + 2.0 * shape.tokens * m) / shape.dense_ranks


def stack(layers: Sequence[Volumes]) -> Volumes:
    """Join the volumes of several layers or configurations into arrays.

    Args:
        layers: one each.

    Returns:
        Volumes whose fields are float64 arrays [N].

    Raises:
        UserError: for none, or a volume that is negative or not finite.

    >>> stack([Volumes(1, 2, 2, 4)] * 3).expert.tolist()
    [4.0, 4.0, 4.0]
    """
    if not layers:
        raise UserError("there are no volumes; expected those of at least one layer; pass them")
    table = np.asarray(layers, np.float64)
    if not (np.all(np.isfinite(table)) and np.all(table >= 0)):
        raise UserError(
            "a volume is negative or not finite; volumes count elements and must be 0 or more; "
            "mend the sizes"
        )
    return Volumes(*table.T)
