"""Reading a foreign ``config.json`` so that nothing in it is overlooked."""

from collections.abc import Mapping
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.models.lm.config import Rope

# Fields that say nothing about the forward pass at inference.
HARMLESS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attn_pdrop",
        "attention_dropout",
        "activation_dropout",
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
        "initializer_range",
        "init_std",
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
        "rope_interleaved",
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
        "use_bfloat16",
        "use_cache",
        "auto_map",
        "max_window_layers",
        "unsloth_fixed",
        "unsloth_version",
    ]
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
        """Read a field; absent or null gives the default.

        >>> Fields({}).take("n_layer", 12)
        12
        """
        self._read.add(name)
        value = self._hf.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """Read a field that must be there.

        >>> Fields({"n_layer": 3}).need("n_layer")
        3
        """
        value = self.take(name)
        if value is None:
            raise UserError(
                f"this {self.model_type} config has no {name!r}; expected the config.json that "
                "belongs to the weights; add the field"
            )
        return value

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
        eos = self.take("eos_token_id", ())
        return {
            "bos_id": self.take("bos_token_id"),
            "eos_ids": (eos,) if isinstance(eos, int) else tuple(eos),
            "pad_id": self.take("pad_token_id"),
        }

    def rope(self, head_width: int, theta: float = 10000.0, fraction: float = 1.0) -> Rope:
        """Read rotary positions in the form of transformers 4 or of 5.

        >>> Fields({"rope_theta": 5e5}).rope(64).theta
        500000.0
        """
        old, new = self.take("rope_scaling", {}), self.take("rope_parameters", {})
        theta = float(self.take("rope_theta", theta))
        known = dict(old) | dict(new)
        fraction = known.pop("partial_rotary_factor", self.take("partial_rotary_factor", fraction))
        legacy = known.pop("type", "default")
        kind = known.pop("rope_type", legacy)
        theta = float(known.pop("rope_theta", theta))
        if kind not in ("default", "linear", "llama3"):
            raise UserError(
                f"rope scaling of this {self.model_type} config is {kind!r}; supported are "
                "'default', 'linear' and 'llama3'; use another checkpoint"
            )
        rope = Rope(
            theta=theta,
            width=int(head_width * fraction),
            scaling=kind,
            factor=float(known.pop("factor", 1.0) or 1.0),
            low_freq_factor=float(known.pop("low_freq_factor", 1.0)),
            high_freq_factor=float(known.pop("high_freq_factor", 4.0)),
            original_positions=int(known.pop("original_max_position_embeddings", 8192)),
        )
        if known:
            raise UserError(
                f"rope fields {sorted(known)} of this {self.model_type} config are unknown; "
                "expected only those of 'default', 'linear' and 'llama3'; use another checkpoint"
            )
        return rope

    def windows(self, layers: int, *, switch: bool) -> tuple[int, ...]:
        """Read the sliding window of each layer; ``switch``: only if use_sliding_window is set.

        >>> Fields({"sliding_window": 16}).windows(2, switch=False)
        (16, 16)
        """
        window = self.take("sliding_window", 0)
        kinds = self.take("layer_types")
        if switch and not self.take("use_sliding_window", False):
            window = 0
        if kinds is None:
            first = self.take("max_window_layers", 28) if switch else 0
            kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        strange = set(kinds) - {"sliding_attention", "full_attention"}
        if strange or len(kinds) != layers:
            raise UserError(
                f"layer_types of this {self.model_type} config is {list(kinds)}; expected "
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
                raise UserError(
                    f"field {name!r} of this {self.model_type} config is {value!r}; it is not "
                    "known here and may change the mathematics; remove it if it does not"
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
