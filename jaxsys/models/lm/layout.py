"""Where each role's tensors stand in a family's checkpoint, and how large they are."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxsys.models.lm.config import LMConfig


class Layout(NamedTuple):
    """Name the modules of a family; block modules are relative to the block, "" where absent.

    >>> Layout(blocks="layers", final_norm="norm").q
    'self_attn.q_proj'
    """

    embed: str = "embed_tokens"
    positions: str = ""
    position_offset: int = 0  # rows of the table before position 0
    project_in: str = ""
    project_out: str = ""
    blocks: str = "layers"
    final_norm: str = "norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""  # one fused projection instead of three
    qkv_per_head: bool = False  # fused rows run head, then q/k/v (else q/k/v, then head)
    out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    mlp: str = "mlp"
    gate: str = "mlp.gate_proj"  # "" for a feed-forward block without a gate
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    moe: str = ""
    expert_gate: str = "w1"
    expert_up: str = "w3"
    expert_down: str = "w2"
    in_out: bool = False  # matrices of blocks are [in, out] (GPT-2's Conv1D)


def join(*parts: str) -> str:
    """Join the parts of a dotted path, leaving out empty ones.

    >>> join("", "h", "0")
    'h.0'
    """
    return ".".join(part for part in parts if part)


def subtree(tree: Mapping[str, Any], path: str) -> Any:
    """Walk a nested dict along a dotted path; "" is the tree itself.

    >>> subtree({"mlp": {"up": 3}}, "mlp.up")
    3
    """
    for part in path.split(".") if path else ():
        tree = tree[part]
    return tree


def block_linears(layout: Layout, config: LMConfig, i: int) -> dict[str, tuple[int, int, bool]]:
    """List layer i's linear modules: path in the block to (outputs, inputs, has a bias).

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> block_linears(Layout(), config, 0)["mlp.down_proj"]
    (32, 48, False)
    """
    d, q_rows = config.width, config.heads * config.head_width
    kv_rows = config.kv_heads * config.head_width
    linears: dict[str, tuple[int, int, bool]] = {}
    if layout.qkv:
        linears[layout.qkv] = (q_rows + 2 * kv_rows, d, config.qkv_bias)
    else:
        linears[layout.q] = (q_rows, d, config.qkv_bias)
        linears[layout.k] = linears[layout.v] = (kv_rows, d, config.qkv_bias)
    linears[layout.out] = (d, q_rows, config.out_bias)
    if not config.is_sparse(i):
        return linears | _ffn(layout.gate, layout.up, layout.down, d, config.ffn_width, config)
    linears[f"{layout.moe}.gate"] = (config.experts, d, False)
    gate, up, down = expert_roles(layout)
    for e in range(config.experts):
        expert = f"{layout.moe}.experts.{e}."
        linears |= _ffn(expert + gate, expert + up, expert + down, d, config.expert_width, config)
    return linears


def expert_roles(layout: Layout) -> tuple[str, str, str]:
    """Give the names of an expert's gate, up and down matrices.

    >>> expert_roles(Layout())
    ('w1', 'w3', 'w2')
    """
    return layout.expert_gate, layout.expert_up, layout.expert_down


def _ffn(gate: str, up: str, down: str, d: int, f: int, config: LMConfig):
    linears = {up: (f, d, config.ffn_bias), down: (d, f, config.ffn_bias)}
    return {gate: (f, d, config.ffn_bias), **linears} if gate else linears


def block_shapes(layout: Layout, config: LMConfig, i: int) -> dict[str, tuple[int, ...]]:
    """List layer i's tensors: name in the block to shape.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> block_shapes(Layout(), config, 0)["self_attn.k_proj.weight"]
    (16, 32)
    """
    shapes = _norm(layout.attention_norm, config.width, config)
    for name, (outputs, inputs, bias) in block_linears(layout, config, i).items():
        shapes[f"{name}.weight"] = (inputs, outputs) if layout.in_out else (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)
    if config.qk_norm:
        shapes[f"{layout.q_norm}.weight"] = shapes[f"{layout.k_norm}.weight"] = (config.head_width,)
    if layout.mlp_norm:
        shapes |= _norm(layout.mlp_norm, config.width, config)
    return shapes


def _norm(path: str, width: int, config: LMConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{path}.weight": (width,)}
    if config.norm == "layer":
        shapes[f"{path}.bias"] = (width,)
    return shapes


def model_shapes(layout: Layout, config: LMConfig) -> dict[str, tuple[int, ...]]:
    """List every tensor of the checkpoint: full name to shape, in order of first use.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> model_shapes(Layout(), config)["model.embed_tokens.weight"]
    (97, 32)
    """
    d, v = config.width, config.vocab_size
    narrow = config.embed_width or d
    shapes: dict[str, tuple[int, ...]] = {f"{layout.embed}.weight": (v, narrow)}
    if config.rope is None:
        rows = config.max_positions + layout.position_offset
        shapes[f"{layout.positions}.weight"] = (rows, d)
    if config.embed_width:
        shapes[f"{layout.project_in}.weight"] = (d, narrow)
        shapes[f"{layout.project_out}.weight"] = (narrow, d)
    for i in range(config.layers):
        block = block_shapes(layout, config, i)
        shapes |= {f"{layout.blocks}.{i}.{name}": shape for name, shape in block.items()}
    if config.final_norm:
        shapes |= _norm(layout.final_norm, d, config)
    shapes = {join(config.prefix, name): shape for name, shape in shapes.items()}
    if not config.tied:
        shapes[f"{layout.head}.weight"] = (v, narrow)
    if config.head_bias:
        shapes[f"{layout.head}.bias"] = (v,)
    return shapes
