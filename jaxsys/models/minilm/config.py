"""The sizes of a BERT, its tensors, and its ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.models.encoder import ACTIVATION, Shapes
from jaxsys.models.lm.families.fields import Fields

# Where weights began, and what only training or generation reads.
_UNUSED = (
    "attention_probs_dropout_prob",
    "bos_token_id",
    "directionality",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class BertConfig:
    """Describe an encoder of BERT's form; the defaults are all-MiniLM-L6-v2's.

    Attributes:
        width: D.
        layers: L.
        heads: H, a divisor of the width.
        ffn_width: F.
        vocab_size: V.
        max_positions: most tokens of a sentence.
        token_types: rows of the table of segments; only the first is used.
        activation: ``gelu`` is the exact one.
        norm_eps: ε of the layer normalisations.
        pooler: the checkpoint has BERT's pooler, which is kept and not used.

    Raises:
        UserError: for heads that do not divide the width, or an unknown activation.

    >>> BertConfig().width
    384
    """

    width: int = 384
    layers: int = 6
    heads: int = 12
    ffn_width: int = 1536
    vocab_size: int = 30522
    max_positions: int = 512
    token_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    pooler: bool = True

    def __post_init__(self):
        if min(self.width, self.layers, self.heads) < 1 or self.width % self.heads:
            raise UserError(
                f"a BERT has width {self.width}, {self.layers} layers and {self.heads} heads; "
                "expected positive numbers, and heads that divide the width; correct them"
            )
        if self.activation not in ACTIVATION:
            raise UserError(
                f"activation is {self.activation!r}; expected one of {', '.join(ACTIVATION)}; "
                "correct it"
            )


def shapes(config: BertConfig) -> Shapes:
    """List every tensor of the checkpoint by its name.

    >>> shapes(BertConfig())["encoder.layer.5.intermediate.dense.weight"]
    (1536, 384)
    """
    d, f = config.width, config.ffn_width
    named: Shapes = {
        "embeddings.word_embeddings.weight": (config.vocab_size, d),
        "embeddings.position_embeddings.weight": (config.max_positions, d),
        "embeddings.token_type_embeddings.weight": (config.token_types, d),
    }
    named |= _module("embeddings.LayerNorm", d)
    for i in range(config.layers):
        block = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            named |= _module(f"{block}.attention.{name}", d, d)
        named |= _module(f"{block}.attention.output.LayerNorm", d)
        named |= _module(f"{block}.intermediate.dense", f, d)
        named |= _module(f"{block}.output.dense", d, f)
        named |= _module(f"{block}.output.LayerNorm", d)
    return named | (_module("pooler.dense", d, d) if config.pooler else {})


def _module(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def config_from_hf(hf: Mapping[str, Any]) -> BertConfig:
    """Read a parsed ``config.json`` of a BERT.

    Raises:
        UserError: for another model, or a field that is not known or asks for what is not done.

    >>> config_from_hf({"model_type": "roberta"})
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: model_type is 'roberta'; ...
    """
    if hf.get("model_type") != "bert":
        raise UserError(
            f"model_type is {hf.get('model_type')!r}; expected 'bert'; use the config.json of a "
            "sentence encoder of BERT's form"
        )
    fields = Fields(hf)
    for name in _UNUSED:
        fields.take(name)
    fields.fixed(
        position_embedding_type="absolute", add_cross_attention=False, is_encoder_decoder=False
    )
    config = BertConfig(
        width=fields.need("hidden_size"),
        layers=fields.layers(),
        heads=fields.need("num_attention_heads"),
        ffn_width=fields.need("intermediate_size"),
        vocab_size=fields.need("vocab_size"),
        max_positions=fields.take("max_position_embeddings", 512),
        token_types=fields.take("type_vocab_size", 2),
        activation=fields.take("hidden_act", "gelu"),
        norm_eps=fields.take("layer_norm_eps", 1e-12),
    )
    fields.close()
    return config


def config_to_hf(config: BertConfig) -> dict[str, Any]:
    """Write the fields of a ``config.json`` that transformers reads.

    >>> config_from_hf(config_to_hf(BertConfig())) == BertConfig()
    True
    """
    return {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn_width,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
    }
