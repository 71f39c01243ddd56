"""Models and machines of the tests: the published shapes, and machines whose rates are assumed."""

from jaxsys.models.lm.config import LMConfig
from jaxsys.offload.types import Machine, Processor

MIXTRAL = LMConfig(
    "mixtral", 32000, 4096, 32, 32, 8, 128, 14336, 32768,
    experts=8, experts_per_token=2, expert_width=14336,
)  # fmt: skip
LLAMA = LMConfig("llama", 32000, 4096, 32, 32, 32, 128, 11008, 4096)


def machine(hbm, link, cpu, dram, *, cpu_flops_s=1e12, **more) -> Machine:
    """Make a machine from rates in GB/s."""
    return Machine(
        Processor(cpu * 1e9, cpu_flops_s, 2**37),
        Processor(hbm * 1e9, 7e13, 24e9),
        link_bytes_per_s=link * 1e9,
        dram_bytes_per_s=dram * 1e9,
        **more,
    )
