"""FSMoE: mixtures of experts as pure functions, pipelined as planned (arXiv 2501.10714)."""

from jaxsys.moe.contract import (
    Axes,
    Capacity,
    Dims,
    ExpertChoice,
    Experts,
    Gate,
    Hooks,
    Info,
    LayerPlan,
    Losses,
    Mixing,
    MoEPlan,
    MoESpec,
    Order,
    Routed,
    Slots,
    TokenChoice,
)
from jaxsys.moe.costs import Costs
from jaxsys.moe.planner import plan, rivals
from jaxsys.moe.volumes import Shape, Volumes, layer_volumes

__all__ = [
    "Axes",
    "Capacity",
    "Costs",
    "Dims",
    "ExpertChoice",
    "Experts",
    "Gate",
    "Hooks",
    "Info",
    "LayerPlan",
    "Losses",
    "Mixing",
    "MoEPlan",
    "MoESpec",
    "Order",
    "Routed",
    "Shape",
    "Slots",
    "TokenChoice",
    "Volumes",
    "layer_volumes",
    "plan",
    "rivals",
]
