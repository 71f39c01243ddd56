"""The decode speed that a machine's four bandwidths allow, and how near a run came to it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.offload.types import Machine, Part

Way = Literal["split", "cpu", "link", "resident"]


class Limit(NamedTuple):
    """Hold what one decoded token takes at best.

    Attributes:
        predicted_s: T, seconds per token.
        cpu_s: the CPU computing its share of the misses.
        link_s: the rest of the misses crossing the link.
        dram_s: the CPU's memory delivering all misses.
        accelerator_s: the accelerator reading what lives there.
        cpu_share: q, the CPU's share of the missed bytes.

    >>> Limit(0.5, 0.4, 0.3, 0.0, 0.1, 0.6).tokens_per_s
    2.0
    """

    predicted_s: float
    cpu_s: float
    link_s: float
    dram_s: float
    accelerator_s: float
    cpu_share: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second, 1 / T."""
        return 1.0 / self.predicted_s if self.predicted_s else float("inf")

    def percent(self, tokens_per_s: float | int) -> float:
        """Say how much of the limit a measured speed reaches, in percent.

        >>> Limit(0.5, 0.4, 0.3, 0.0, 0.1, 0.6).percent(1.0)
        50.0
        """
        return 100.0 * tokens_per_s * self.predicted_s


def limit(
    parts: Sequence[Part],
    machine: Machine,
    *,
    hit: float | int | None = None,
    resident: Sequence[int] | None = None,
    way: Way = "split",
    overlapped: bool = False,
) -> Limit:
    """Bound the speed of decoding one sequence by the bytes that a token reads.

    ``T = max(q·miss/B_c, (1 − q)·miss/B_p, miss/B_dram) + (dense + hit bytes)/B_g`` with ``q`` the
    best share, ``B_c/(B_c + B_p)`` wherever the CPU's memory can feed both. The sum is for layers
    run in order, the CPU's and the link's part of a layer after what the accelerator holds of it;
    an engine that computes resident experts meanwhile may come closer to ``overlapped``, the
    maximum of all, which nothing can beat. Bytes are counted at the rates of single parts where the
    machine has them; latencies are left out.

    Reconstruction: from the resources that the paper's abstract names.

    Args:
        parts: of the model.
        machine: what it runs on; without an accelerator all bytes are missed.
        hit: share of the activated experts' bytes (without experts: of the MLPs') that is found
            resident; everything else counts as resident.
        resident: columns of each part that are resident, [P], instead of ``hit``.
        way: ``split`` misses between CPU and link at best, all by ``cpu``, all over the ``link``,
            or ``resident``: as if everything were.
        overlapped: the maximum instead of the sum.

    Returns:
        The limit and its terms.

    Raises:
        UserError: neither or both of ``hit`` and ``resident``, or a share outside 0 to 1.

    >>> from jaxsys.offload.types import Processor
    >>> unit = Processor(100.0, 1e9, 1e9)
    >>> machine = Machine(unit, Processor(1000.0, 1e9, 1e9), 50.0, dram_bytes_per_s=120.0)
    >>> parts = [Part(0, "attention", 100, 0.0), Part(0, "mlp", 900, 0.0, 9)]
    >>> round(limit(parts, machine, hit=0.0).predicted_s, 9)  # the CPU's memory is the bound
    7.6
    """
    hot, cold_cpu, cold = _bytes_s(parts, machine, hit, resident, way)
    dram = cold / machine.dram_bytes_per_s if machine.dram_bytes_per_s else 0.0
    link = cold / machine.link_bytes_per_s if machine.accelerator else np.inf
    share = {"cpu": 1.0, "link": 0.0}.get(way, _best_share(cold_cpu, link, dram))
    if machine.accelerator is None:
        share = 1.0
    cpu, link = share * cold_cpu, (1 - share) * link if share < 1 else 0.0
    # The CPU's own rate was measured on the same memory, so alone it never waits for it longer.
    feed = dram if share < 1 else 0.0
    slow = max(cpu, link, feed)
    total = max(slow, hot) if overlapped else slow + hot
    return Limit(float(total), float(cpu), float(link), float(dram), float(hot), float(share))


def _bytes_s(parts, machine, hit, resident, way) -> tuple[float, float, float]:
    """Seconds of the hot bytes on the accelerator, of the cold on the CPU, and the cold bytes."""
    if way == "resident":
        hit, resident = 1.0, None
    if (hit is None) == (resident is None):
        raise UserError(
            f"hit is {hit} and resident {'given' if resident is not None else 'not given'}; "
            "expected exactly one of them; pass the hit rate or a plan's columns"
        )
    if hit is not None and not 0 <= hit <= 1:
        raise UserError(f"hit is {hit}; expected a share from 0 to 1; pass hits / activations")
    sparse = any(part.kind == "expert" for part in parts)
    kinds = ("expert",) if sparse else ("mlp",)
    hot = cold_cpu = cold = 0.0
    for i, part in enumerate(parts):
        if resident is not None:
            here = resident[i] / max(part.columns, 1)
        else:
            here = float(hit or 0.0) if part.kind in kinds else 1.0
        if machine.accelerator is None:
            here = 0.0
        read = part.n_bytes * part.frequency
        if machine.accelerator is not None:
            hot += here * read / machine.accelerator.rates(part.kind).bytes_per_s
        cold_cpu += (1 - here) * read / machine.cpu.rates(part.kind).bytes_per_s
        cold += (1 - here) * read
    return hot, cold_cpu, cold


def _best_share(cpu: float, link: float, dram: float) -> float:
    """The least share of the CPU at which neither it nor the link is above the best maximum."""
    best = max(cpu * link / (cpu + link), dram) if cpu > 0 and link < np.inf else np.inf
    # Reading alone, the CPU does not wait for the memory, so it may be faster than any two.
    return 1.0 if cpu <= best else max(0.0, 1 - best / link)
