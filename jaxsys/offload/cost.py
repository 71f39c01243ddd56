"""Seconds of a part on the CPU, on the accelerator and over the link, and the lines behind them."""

from jaxsys.core.cost import LinearCost
from jaxsys.core.errors import UserError
from jaxsys.offload.types import Machine, Part, Rates


def run_s(part: Part, rates: Rates, share: float | int = 1.0, tokens: float | int = 1) -> float:
    """Predict the seconds of a share of a part's columns, weights being where they are needed.

    ``t(x, n) = a + x · max(W / B, flops · n / C)`` and 0 for no columns: reading weights of W bytes
    bounds few tokens, arithmetic bounds many. Of an embedding a token reads one row, that is
    ``frequency`` of its bytes.

    Reconstruction: ScheInfer's cost model is not known; this is the linear model that FinDEP fits
    (arXiv 2512.21487), with the roofline's maximum.

    Args:
        part: the part.
        rates: of the processor, for this kind of part.
        share: x, from 0 to 1.
        tokens: n, tokens that pass it.

    Returns:
        Seconds.

    >>> mlp = Part(0, "mlp", n_bytes=600, flops_per_token=300.0, columns=100)
    >>> run_s(mlp, Rates(600.0, 300.0, 0.5)), run_s(mlp, Rates(600.0, 300.0, 0.5), 0.5, 4)
    (1.5, 2.5)
    """
    if share <= 0 or tokens <= 0:
        return 0.0
    n_bytes = part.n_bytes
    if part.kind == "embed":
        n_bytes *= min(1.0, part.frequency * tokens)
    return rates.launch_s + share * max(
        n_bytes / rates.bytes_per_s, part.flops_per_token * tokens / rates.flops_s
    )


def cpu_s(part: Part, machine: Machine, share: float | int = 1.0, tokens: float | int = 1) -> float:
    """Predict the seconds of a share of a part on the CPU; see `run_s`.

    >>> from jaxsys.offload.types import Processor
    >>> cpu_s(Part(0, "mlp", 600, 300.0, 100), Machine(Processor(600.0, 300.0, 1.0)))
    1.0
    """
    return run_s(part, machine.cpu.rates(part.kind), share, tokens)


def accelerator_s(
    part: Part, machine: Machine, share: float | int = 1.0, tokens: float | int = 1
) -> float:
    """Predict the seconds of a share of a part on the accelerator; see `run_s`.

    Raises:
        UserError: the machine has none.

    >>> from jaxsys.offload.types import Processor
    >>> unit = Processor(600.0, 300.0, 1.0)
    >>> accelerator_s(Part(0, "mlp", 600, 300.0, 100), Machine(unit, unit, 1.0), share=0.5)
    0.5
    """
    if machine.accelerator is None:
        raise UserError(
            f"the machine {machine.name!r} has no accelerator; expected one to run a "
            f"{part.kind} there; plan with a budget of 0"
        )
    return run_s(part, machine.accelerator.rates(part.kind), share, tokens)


def link_s(part: Part, machine: Machine, share: float | int = 1.0) -> float:
    """Predict the seconds in which a share of a part's weights crosses the link, ``a_p + x·W/B_p``.

    Args:
        part: the part.
        machine: with an accelerator.
        share: x, from 0 to 1.

    Returns:
        Seconds, 0 for no columns.

    >>> from jaxsys.offload.types import Processor
    >>> unit = Processor(600.0, 300.0, 1.0)
    >>> link_s(Part(0, "mlp", 600, 300.0, 100), Machine(unit, unit, 300.0, 0.5), share=0.5)
    1.5
    """
    if share <= 0:
        return 0.0
    return machine.link_latency_s + share * part.n_bytes / machine.link_bytes_per_s


def dram_s(part: Part, machine: Machine, share: float | int = 1.0) -> float:
    """Predict the seconds in which the CPU's memory delivers a share of a part's weights.

    ``x·W / B_dram`` with x the share that the CPU computes and the link copies together: both read
    the same memory.

    >>> from jaxsys.offload.types import Processor
    >>> unit = Processor(600.0, 300.0, 1.0)
    >>> dram_s(Part(0, "mlp", 600, 300.0, 100), Machine(unit, dram_bytes_per_s=1200.0))
    0.5
    """
    rate = machine.dram_bytes_per_s
    return share * part.n_bytes / rate if rate else 0.0


def break_even_tokens(part: Part, machine: Machine) -> float:
    """Find the token count from which copying a part over takes less than computing it on the CPU.

    ``n* = W · C_c / (flops · B_p)``, where ``flops · n* / C_c = W / B_p``. For weights of b bytes
    that is ``b · C_c / (2 · B_p)``; launches are left out.

    Reconstruction: the rule behind token assignment in a prompt; see `rules.by_tokens`.

    Args:
        part: an expert or MLP.
        machine: with an accelerator.

    Returns:
        Tokens, not rounded.

    >>> from jaxsys.offload.types import Processor
    >>> machine = Machine(Processor(55e9, 1e12, 1.0), Processor(9e11, 1e14, 1.0), 25e9)
    >>> bfloat16 = Part(0, "expert", 2 * 100, 2.0 * 100, 10)
    >>> round(break_even_tokens(bfloat16, machine), 6)
    40.0
    """
    seconds = part.n_bytes / machine.link_bytes_per_s
    return seconds * machine.cpu.rates(part.kind).flops_s / part.flops_per_token


def rates_of(reads: LinearCost, works: LinearCost) -> Rates:
    """Make a processor's rates from two fitted lines.

    Args:
        reads: seconds of single-token products over the bytes of their weights: launch and B.
        works: seconds of products with many tokens over their FLOPs: C.

    Returns:
        The rates.

    >>> from jaxsys.core.cost import fit_linear
    >>> reads = fit_linear([1e6, 2e6, 4e6], [2e-3, 3e-3, 5e-3])
    >>> [round(x, 6) for x in rates_of(reads, fit_linear([1e6, 2e6, 3e6], [1.0, 2.0, 3.0]))]
    [1000000000.0, 1000000.0, 0.001]
    """
    return Rates(1.0 / reads.beta_s_per_unit, 1.0 / works.beta_s_per_unit, reads.alpha_s)
