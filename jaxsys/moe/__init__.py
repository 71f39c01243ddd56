"""FSMoE: mixtures of experts as pure functions, pipelined as planned (arXiv 2501.10714).

A `MoESpec` names a layer's parts: a gate (`noisy_top_k`, `sigmoid`, `cosine`, `expert_choice`,
`soft_moe`, `sinkhorn`, `group_limited`, `bias_balanced`), an order (`sparse_order`,
`einsum_order`), experts (`swiglu`, `gpt_ffn`), how slots travel, hooks, capacity and losses.
``init`` and ``apply`` are the layer; `jaxsys.moe.model` puts it into language models and
`jaxsys.moe.upcycle` makes those from dense ones.
"""

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
from jaxsys.moe.experts import choose_backend, gpt_ffn, swiglu
from jaxsys.moe.gates import cosine, noisy_top_k, round_robin, sigmoid
from jaxsys.moe.gates_balanced import bias_balanced, group_limited, move_bias, sinkhorn
from jaxsys.moe.gates_dense import expert_choice, soft_moe
from jaxsys.moe.hooks import int8_hooks, top_k_hooks
from jaxsys.moe.layer import apply, init
from jaxsys.moe.order import einsum_order, sparse_order
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
    "apply",
    "bias_balanced",
    "choose_backend",
    "cosine",
    "einsum_order",
    "expert_choice",
    "gpt_ffn",
    "group_limited",
    "init",
    "int8_hooks",
    "layer_volumes",
    "move_bias",
    "noisy_top_k",
    "plan",
    "rivals",
    "round_robin",
    "sigmoid",
    "sinkhorn",
    "soft_moe",
    "sparse_order",
    "swiglu",
    "top_k_hooks",
]
