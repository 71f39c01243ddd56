"""GPT-J: rotary positions on adjacent pairs, attention and feed-forward side by side.

Reference: Wang and Komatsuzaki, "GPT-J-6B" (2021), github.com/kingoflolz/mesh-transformer-jax.
"""

from collections.abc import Mapping
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.models.lm.config import LMConfig, Rope
from jaxsys.models.lm.families.fields import Fields
from jaxsys.models.lm.families.gpt2 import sizes, sizes_to_hf
from jaxsys.models.lm.layout import Layout

LAYOUT = Layout(
    embed="wte",
    blocks="h",
    final_norm="ln_f",
    attention_norm="ln_1",
    mlp_norm="",
    attention="attn",
    q="attn.q_proj",
    k="attn.k_proj",
    v="attn.v_proj",
    out="attn.out_proj",
    gate="",
    up="mlp.fc_in",
    down="mlp.fc_out",
)


def from_hf(fields: Fields) -> LMConfig:
    """Read a gptj config.

    >>> hf = {"model_type": "gptj", "vocab_size": 9, "n_embd": 8, "n_head": 2, "n_layer": 1,
    ...       "rotary_dim": 2}
    >>> from_hf(Fields(hf)).rope.interleaved
    True
    """
    kwargs = sizes(fields)
    width = fields.take("rotary_dim", 64)
    if not 0 < width <= kwargs["head_width"]:
        raise UserError(
            f"rotary_dim is {width} and a head has {kwargs['head_width']} numbers; expected at "
            "most that many; correct the config.json"
        )
    tied = fields.take("tie_word_embeddings", False)
    rope = Rope(theta=10000.0, width=width, interleaved=True)
    return LMConfig(**kwargs, rope=rope, tied=tied, head_bias=True, parallel=True)


def to_hf(config: LMConfig) -> Mapping[str, Any]:
    """Write a gptj config.

    >>> to_hf(LMConfig("gptj", 9, 8, 1, 2, 2, 4, 32, 16, rope=Rope(width=2)))["rotary_dim"]
    2
    """
    assert config.rope is not None
    return sizes_to_hf(config) | {"rotary_dim": config.rope.width}
