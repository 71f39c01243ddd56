"""The sizes of a CLIP, its tensors, and its ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.models.encoder import ACTIVATION, Shapes
from jaxsys.models.lm.families.fields import Fields

# What older versions of transformers wrote into every configuration, and where weights began.
_GENERATION = (
    "add_cross_attention",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "initializer_factor",
    "initializer_range",
    "is_encoder_decoder",
    "length_penalty",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_return_sequences",
    "output_scores",
    "pad_token_id",
    "projection_dim",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "torchscript",
    "typical_p",
)


@dataclass(frozen=True)
class Tower:
    """Describe one of the two transformers.

    Attributes:
        width: D.
        layers: L.
        heads: H, a divisor of the width.
        ffn_width: F.
        activation: ``quick_gelu`` x·σ(1.702 x) as OpenAI trained, ``gelu`` or ``gelu_new``.
        norm_eps: ε of the layer normalisations.

    Raises:
        UserError: for heads that do not divide the width, or an unknown activation.

    >>> Tower(768, 12, 12, 3072).activation
    'quick_gelu'
    """

    width: int
    layers: int
    heads: int
    ffn_width: int
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5

    def __post_init__(self):
        if min(self.width, self.layers, self.heads, self.ffn_width) < 1 or self.width % self.heads:
            raise UserError(
                f"a tower has width {self.width}, {self.layers} layers, {self.heads} heads and "
                f"feed-forward width {self.ffn_width}; expected positive numbers, and heads that "
                "divide the width; correct them"
            )
        if self.activation not in ACTIVATION:
            raise UserError(
                f"activation is {self.activation!r}; expected one of {', '.join(ACTIVATION)}; "
                "correct it"
            )


@dataclass(frozen=True)
class ClipConfig:
    """Describe a CLIP; ViT-B/32 has ``Tower(768, 12, 12, 3072)``, ``Tower(512, 12, 8, 2048)``, 512.

    Attributes:
        vision: the tower for pictures.
        text: the tower for text, causal.
        projection_width: E, width of the space that both are projected into.
        image_size: side of a picture in pixels.
        patch_size: side of a patch, a divisor.
        vocab_size: V.
        max_positions: most tokens of a text.
        eos_id: the token whose first place a text is read off at; 2 is what early checkpoints say
            and means the largest id of the text instead, as transformers has it.

    Raises:
        UserError: for a patch size that does not divide the image size.

    >>> ClipConfig(Tower(8, 1, 2, 16), Tower(8, 1, 2, 16), 4, 8, 4).patches
    4
    """

    vision: Tower
    text: Tower
    projection_width: int = 512
    image_size: int = 224
    patch_size: int = 32
    vocab_size: int = 49408
    max_positions: int = 77
    eos_id: int = 49407

    def __post_init__(self):
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise UserError(
                f"image_size is {self.image_size} and patch_size {self.patch_size}; expected a "
                "patch size that divides the image size; correct them"
            )

    @property
    def patches(self) -> int:
        """Count the patches of a picture."""
        return (self.image_size // self.patch_size) ** 2


def shapes(config: ClipConfig) -> Shapes:
    """List every tensor of the checkpoint by its name in the Hugging Face form.

    >>> config = ClipConfig(Tower(8, 1, 2, 16), Tower(8, 1, 2, 16), 4, 8, 4)
    >>> shapes(config)["vision_model.embeddings.patch_embedding.weight"]
    (8, 3, 4, 4)
    """
    v, t, e = config.vision.width, config.text.width, config.projection_width
    patch = (v, 3, config.patch_size, config.patch_size)
    named: Shapes = {
        "logit_scale": (),
        "vision_model.embeddings.class_embedding": (v,),
        "vision_model.embeddings.patch_embedding.weight": patch,
        "vision_model.embeddings.position_embedding.weight": (config.patches + 1, v),
        # The checkpoints spell it so.
        **_norm("vision_model.pre_layrnorm", v),
        **_blocks("vision_model", config.vision),
        **_norm("vision_model.post_layernorm", v),
        "visual_projection.weight": (e, v),
        "text_model.embeddings.token_embedding.weight": (config.vocab_size, t),
        "text_model.embeddings.position_embedding.weight": (config.max_positions, t),
        **_blocks("text_model", config.text),
        **_norm("text_model.final_layer_norm", t),
        "text_projection.weight": (e, t),
    }
    return named


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _blocks(model: str, tower: Tower) -> Shapes:
    d, f = tower.width, tower.ffn_width
    named: Shapes = {}
    for i in range(tower.layers):
        block = f"{model}.encoder.layers.{i}"
        linears = {f"self_attn.{kind}_proj": (d, d) for kind in "qkv"}
        linears |= {"self_attn.out_proj": (d, d), "mlp.fc1": (f, d), "mlp.fc2": (d, f)}
        for name, (rows, columns) in linears.items():
            named[f"{block}.{name}.weight"] = (rows, columns)
            named[f"{block}.{name}.bias"] = (rows,)
        named |= _norm(f"{block}.layer_norm1", d) | _norm(f"{block}.layer_norm2", d)
    return named


def config_from_hf(hf: Mapping[str, Any]) -> ClipConfig:
    """Read a parsed ``config.json``; what it leaves out is as in ViT-B/32, as in transformers.

    Args:
        hf: its fields.

    Raises:
        UserError: for another model, or a field that is not known or asks for what is not done.

    >>> config_from_hf({"model_type": "clip", "projection_dim": 256}).projection_width
    256
    """
    if hf.get("model_type") != "clip":
        raise UserError(
            f"model_type is {hf.get('model_type')!r}; expected 'clip'; use the config.json of a "
            "CLIP with both towers"
        )
    top = Fields(hf)
    # A dict under the second name, from old versions, replaces the first one wholly.
    text, vision = (
        Fields(top.take(f"{kind}_config_dict", {}) or top.take(f"{kind}_config", {}))
        for kind in ("text", "vision")
    )
    for fields in (top, text, vision):
        for name in _GENERATION:
            fields.take(name)
    top.take("logit_scale_init_value")
    for name in ("text_config", "vision_config"):
        top.take(name)
    vision.fixed(num_channels=3)
    eos = text.take("eos_token_id", 49407)
    vision.take("eos_token_id")
    config = ClipConfig(
        vision=_tower(vision, 768, 12, 3072),
        text=_tower(text, 512, 8, 2048),
        projection_width=top.take("projection_dim", 512),
        image_size=vision.take("image_size", 224),
        patch_size=vision.take("patch_size", 32),
        vocab_size=text.take("vocab_size", 49408),
        max_positions=text.take("max_position_embeddings", 77),
        eos_id=eos,
    )
    for fields in (top, text, vision):
        fields.close()
    return config


def _tower(fields: Fields, width: int, heads: int, ffn_width: int) -> Tower:
    return Tower(
        width=fields.take("hidden_size", width),
        layers=fields.take("num_hidden_layers", 12),
        heads=fields.take("num_attention_heads", heads),
        ffn_width=fields.take("intermediate_size", ffn_width),
        activation=fields.take("hidden_act", "quick_gelu"),
        norm_eps=fields.take("layer_norm_eps", 1e-5),
    )


def config_to_hf(config: ClipConfig) -> dict[str, Any]:
    """Write the fields of a ``config.json`` that transformers reads.

    >>> config = ClipConfig(Tower(8, 1, 2, 16), Tower(8, 1, 2, 16), 4, 8, 4)
    >>> config_from_hf(config_to_hf(config)) == config
    True
    """

    def tower(tower: Tower, model_type: str, **more: int) -> dict[str, Any]:
        return {
            "model_type": model_type,
            "hidden_size": tower.width,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "intermediate_size": tower.ffn_width,
            "hidden_act": tower.activation,
            "layer_norm_eps": tower.norm_eps,
            "projection_dim": config.projection_width,
            **more,
        }

    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": config.projection_width,
        "text_config": tower(
            config.text,
            "clip_text_model",
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_positions,
            eos_token_id=config.eos_id,
        ),
        "vision_config": tower(
            config.vision,
            "clip_vision_model",
            image_size=config.image_size,
            patch_size=config.patch_size,
        ),
    }
