"""Reading a foreign ``config.json`` so that nothing in it is overlooked."""

import reprlib
from collections.abc import Mapping
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.models.lm.config import Rope

MOST_LAYERS = 4096
# What a field may hold, by the type of its default.
KINDS: dict[type, Any] = {
    int: int,
    float: int | float,
    bool: bool,
    str: str,
    list: list,
    dict: dict,
}
# Fields that say nothing about the forward pass at inference.
HARMLESS = frozenset(
    {
        "_name_or_path",
        "activation_dropout",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "auto_map",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "do_sample",
        "dropout",
        "dtype",
        "embd_pdrop",
        "finetuning_task",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "input_jitter_noise",
        "is_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "layerdrop",
        "max_length",
        "max_new_tokens",
        "min_length",
        "model_type",
        "n_ctx",
        "num_beams",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "output_router_logits",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "router_aux_loss_coef",
        "sep_token_id",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)


class Fields:
    """Read fields one by one and refuse, at the end, those that nobody has read.

    Args:
        hf: the parsed ``config.json``.

    >>> fields = Fields({"model_type": "llama", "hidden_size": 64, "shiny": 1})
    >>> fields.take("hidden_size")
    64
    >>> fields.close()
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: field 'shiny' of this llama config is 1; ...
    """

    def __init__(self, hf: Mapping[str, Any]):
        self._hf = hf
        self._read = set(HARMLESS)
        self.model_type = str(hf.get("model_type"))

    def take(self, name: str, default: Any = None) -> Any:
        """Read a field; absent or null gives the default, whose kind the value must have.

        >>> Fields({}).take("n_layer", 12)
        12
        """
        self._read.add(name)
        value = self._hf.get(name)
        if value is None:
            return default
        wanted = KINDS.get(type(default), object)
        flag = isinstance(value, bool) and not isinstance(default, bool) and default is not None
        if not isinstance(value, wanted) or flag:
            raise self._strange(name, value, type(default).__name__)
        if isinstance(default, float):
            if not abs(value) < 1e30:
                raise self._strange(name, value, "finite number")
            return float(value)
        return value

    def _strange(self, name: str, value: Any, wanted: str) -> UserError:
        return UserError(
            f"field {name!r} of this {self.model_type} config is {reprlib.repr(value)}; expected "
            f"a value of kind {wanted}; mend the config.json"
        )

    def need(self, name: str, most: int = 2**31 - 1) -> int:
        """Read a size that must be there, from 1 to ``most``.

        >>> Fields({"n_layer": 3}).need("n_layer")
        3
        """
        value = self.take(name, 0)
        if not 1 <= value <= most:
            raise UserError(
                f"field {name!r} of this {self.model_type} config is {value or 'absent'}; expected "
                f"a whole number from 1 to {most}; use the config.json that belongs to the weights"
            )
        return value

    def layers(self, name: str = "num_hidden_layers") -> int:
        """Read the number of layers.

        >>> Fields({"n_layer": 3}).layers("n_layer")
        3
        """
        return self.need(name, MOST_LAYERS)

    def multi_head(
        self,
        width: str = "hidden_size",
        heads: str = "num_attention_heads",
        layers: str = "num_hidden_layers",
    ) -> dict[str, Any]:
        """Read the sizes of a model whose heads each have their own keys and values.

        >>> fields = Fields({"vocab_size": 9, "n_embd": 8, "n_head": 2, "n_layer": 1})
        >>> fields.multi_head("n_embd", "n_head", "n_layer")["head_width"]
        4
        """
        wide, count = self.need(width), self.need(heads)
        return {
            "model_type": self.model_type,
            "vocab_size": self.need("vocab_size"),
            "width": wide,
            "layers": self.layers(layers),
            "heads": count,
            "kv_heads": count,
            "head_width": wide // count,
            "norm": "layer",
        }

    def fixed(self, **expected: Any) -> None:
        """Refuse fields whose value asks for mathematics that this library does not do.

        >>> Fields({"scale": True}).fixed(scale=True)
        """
        for name, value in expected.items():
            got = self.take(name, value)
            if got != value:
                raise UserError(
                    f"field {name!r} of this {self.model_type} config is {got!r}; only {value!r} "
                    "is supported; use another checkpoint"
                )

    def tokens(self) -> dict[str, Any]:
        """Read the special tokens as `LMConfig` keyword arguments.

        >>> Fields({"eos_token_id": [2, 3]}).tokens()["eos_ids"]
        (2, 3)
        """
        eos = self.take("eos_token_id")
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        bos, pad = self.take("bos_token_id"), self.take("pad_token_id")
        for value in (*eos, bos or 0, pad or 0):
            if not isinstance(value, int) or isinstance(value, bool):
                raise self._strange("*_token_id", value, "int")
        return {"bos_id": bos, "eos_ids": tuple(eos), "pad_id": pad}

    def rope(self, head_width: int, theta: float = 10000.0, fraction: float = 1.0) -> Rope:
        """Read rotary positions in the form of transformers 4 or of 5.

        Args:
            head_width: C.
            theta: the family's default base.
            fraction: the family's default part of a head that turns.

        Returns:
            The rotary positions.

        Raises:
            UserError: for a way of stretching that is not supported, by name.

        >>> Fields({"rope_theta": 5e5}).rope(64).theta
        500000.0
        """
        merged = self.take("rope_scaling", {}) | self.take("rope_parameters", {})
        inner = Fields(merged | {"model_type": self.model_type})
        kind = inner.take("rope_type", inner.take("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise UserError(
                f"rope scaling of this {self.model_type} config is {kind!r}; supported are "
                "'default', 'linear' and 'llama3'; use another checkpoint"
            )
        fraction = self.take("partial_rotary_factor", fraction)
        rope = Rope(
            theta=inner.take("rope_theta", self.take("rope_theta", theta)),
            width=int(head_width * inner.take("partial_rotary_factor", fraction)),
            scaling=kind,
            factor=inner.take("factor", 1.0),
            low_freq_factor=inner.take("low_freq_factor", 1.0),
            high_freq_factor=inner.take("high_freq_factor", 4.0),
            original_positions=inner.take("original_max_position_embeddings", 8192),
        )
        inner.close()
        return rope

    def windows(self, layers: int, *, default: int = 0, switch: bool = False) -> tuple[int, ...]:
        """Read the sliding window of each layer.

        Args:
            layers: L.
            default: window of a config without the field; null says none.
            switch: the family has windows only where ``use_sliding_window`` is set, and without
                ``layer_types`` only from layer ``max_window_layers`` on.

        Returns:
            Tokens per layer, 0 for none; empty if there are none at all.

        >>> Fields({"sliding_window": 16}).windows(2)
        (16, 16)
        """
        window = self.take("sliding_window", default if "sliding_window" not in self._hf else 0)
        kinds, first = self.take("layer_types", []), 0
        if switch:
            window = window if self.take("use_sliding_window", False) else 0
            first = self.take("max_window_layers", 28)
        if not kinds:
            kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        known = all(kind in ("sliding_attention", "full_attention") for kind in kinds)
        if not known or len(kinds) != layers or window < 0:
            raise UserError(
                f"layer_types of this {self.model_type} config is {reprlib.repr(kinds)}; expected "
                f"{layers} times 'full_attention' or 'sliding_attention'; use another checkpoint"
            )
        per_layer = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
        return per_layer if any(per_layer) else ()

    def close(self) -> None:
        """Refuse the first field that has a value and that nobody has read.

        >>> Fields({"torch_dtype": "float16", "new_thing": None}).close()
        """
        for name, value in self._hf.items():
            if name not in self._read and value is not None:
                shown = reprlib.repr(value)
                raise UserError(
                    f"field {name!r} of this {self.model_type} config is {shown}; it is not known "
                    "here and may change the mathematics; remove it if it does not"
                )


def rope_fields(rope: Rope) -> dict[str, Any]:
    """Write rotary positions in the form that transformers 4 and 5 both read.

    >>> rope_fields(Rope(theta=1e4))
    {'rope_theta': 10000.0, 'rope_scaling': None}
    """
    if rope.scaling == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_positions,
        }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
