"""Every family against transformers on files that it wrote, and files of ours that it reads.

Weights are random and much larger than at initialisation, so that every term of the formulas
matters; norms and biases are random too.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.models import lm

transformers = pytest.importorskip("transformers", reason="pip install 'jaxsys[parity]'")
torch = pytest.importorskip("torch", reason="pip install 'jaxsys[parity]'")
pytestmark = pytest.mark.filterwarnings("ignore")

V = 61
BASE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
OPT = {k: v for k, v in NEOX.items() if k != "intermediate_size"} | {"ffn_dim": 40}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}

FAST: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-grouped": ("llama", BASE),
    "gpt2": ("gpt2", GPT),
    "neox": ("gpt_neox", NEOX),
    "qwen3_moe": ("qwen3_moe", BASE | QWEN_MOE | {"mlp_only_layers": [0], "head_dim": 16}),
    "phimoe": ("phimoe", BASE | MOE),
}
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-full": ("llama", BASE | {"num_key_value_heads": 4, "head_dim": 12}),
    "llama-one-key-head": ("llama", BASE | {"num_key_value_heads": 1}),
    "llama-tied-biases": (
        "llama",
        BASE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3-rope": ("llama", BASE | {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("llama", BASE | {"rope_parameters": LINEAR}),
    "mistral-window": ("mistral", BASE | {"sliding_window": 5}),
    "mistral-no-window": ("mistral", BASE | {"sliding_window": None}),
    "qwen2": ("qwen2", BASE | {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        BASE | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", BASE | {"head_dim": 16}),
    "qwen3-window": (
        "qwen3",
        BASE
        | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        | {"attention_bias": True, "head_dim": 8},
    ),
    "gpt2-untied": ("gpt2", GPT | {"tie_word_embeddings": False, "n_inner": 40}),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "gptj-tied": ("gptj", GPT | {"rotary_dim": 8, "tie_word_embeddings": True}),
    "neox-sequential": ("gpt_neox", NEOX | {"use_parallel_residual": False}),
    "neox-no-bias": (
        "gpt_neox",
        NEOX
        | {"attention_bias": False}
        | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "opt": ("opt", OPT),
    "opt-350m": ("opt", OPT | {"word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "opt-no-bias": ("opt", OPT | {"enable_bias": False, "tie_word_embeddings": False}),
    "mixtral": ("mixtral", BASE | MOE),
    "mixtral-window": ("mixtral", BASE | MOE | {"sliding_window": 6, "num_experts_per_tok": 3}),
    "phimoe-biases": ("phimoe", BASE | MOE | {"attention_bias": True, "lm_head_bias": True}),
    "phimoe-wide-mixer": ("phimoe", BASE | MOE | {"router_jitter_noise": 0.4}),
    "qwen3_moe-normed": (
        "qwen3_moe",
        BASE | QWEN_MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    "qwen3_moe-window": (
        "qwen3_moe",
        BASE | QWEN_MOE | {"use_sliding_window": True, "sliding_window": 5},
    ),
}


def drawn(kind: str, seed: int) -> tuple[str, dict[str, Any]]:
    """Draw a small config: widths, head counts, tied or not, with biases or without."""
    rng = np.random.default_rng([seed, *kind.encode()])

    def one_of(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    def coin() -> bool:
        return bool(rng.integers(2))

    heads, width = one_of(2, 4, 6), one_of(8, 10, 16)
    sizes = {
        "hidden_size": heads * width,
        "intermediate_size": one_of(20, 36, 52),  # torch's grouped product wants 16 bytes
        "num_hidden_layers": one_of(1, 2, 3),
        "num_attention_heads": heads,
        "tie_word_embeddings": coin(),
    }
    if kind in ("gpt2", "gptj"):
        sizes = {"n_embd": heads * width, "n_head": heads, "n_layer": one_of(1, 2)}
        sizes |= {"n_inner": one_of(None, 36), "tie_word_embeddings": coin()}
        base = GPT | sizes
        return kind, base | ({"rotary_dim": one_of(2, 4, 8)} if kind == "gptj" else {})
    if kind == "gpt_neox":
        choice = {"use_parallel_residual": coin(), "attention_bias": coin()}
        part = one_of(0.25, 0.5, 1.0)
        rope = {"rope_type": "default", "partial_rotary_factor": part, "rope_theta": 10000.0}
        # Half a head's part must be whole pairs.
        rope["partial_rotary_factor"] = part if width * part % 2 == 0 else 1.0
        return kind, NEOX | sizes | choice | {"rope_parameters": rope}
    if kind == "opt":
        sizes["ffn_dim"] = sizes.pop("intermediate_size")
        choice = {"enable_bias": coin(), "do_layer_norm_before": coin()}
        return kind, OPT | sizes | choice | {"word_embed_proj_dim": one_of(12, heads * width)}
    sizes["num_key_value_heads"] = one_of(*(k for k in (1, 2, heads) if heads % k == 0))
    choice: dict[str, Any] = {"sliding_window": one_of(None, 4)} if kind != "llama" else {}
    if kind in ("qwen2", "qwen3", "qwen3_moe"):
        choice |= {"use_sliding_window": choice["sliding_window"] is not None}
        choice |= {} if kind == "qwen3_moe" else {"max_window_layers": 1}
    if kind in ("llama", "qwen3", "phimoe", "qwen3_moe"):
        choice["attention_bias"] = coin()
    if kind == "llama":
        choice["mlp_bias"] = coin()
    if kind in ("llama", "qwen3", "qwen3_moe"):
        choice["head_dim"] = one_of(8, 12)
    if kind in ("mixtral", "phimoe"):
        choice |= MOE | {"num_local_experts": one_of(3, 5)}
    if kind == "qwen3_moe":
        choice |= QWEN_MOE | {"norm_topk_prob": coin(), "num_experts": one_of(3, 5)}
    return kind, BASE | sizes | choice


CASES = [pytest.param(*case, id=name) for name, case in FAST.items()] + [
    pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()
]
CASES += [
    pytest.param(*drawn(kind, seed), id=f"{kind}-drawn-{seed}", marks=pytest.mark.slow)
    for kind in lm.FAMILIES
    for seed in (0, 1)
]


def build(kind: str, fields: dict[str, Any]):
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(kind, **fields, **ends)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def reference(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_logits_and_files_agree_with_transformers(kind, fields, tmp_path):
    model = build(kind, fields)
    model.save_pretrained(tmp_path / "theirs")
    params, config = lm.load(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, V, (2, 12))
    expected = reference(model, tokens)
    scale = np.abs(expected).max()
    assert 0.5 < scale < 50

    whole = lm.apply(params, config, jnp.array(tokens)).logits
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-4)

    # The same in two parts through a cache, the second token by token for rows of unequal length.
    cached = through_cache(params, config, tokens, lengths=(7, 5))
    for row, logits in enumerate(cached):
        np.testing.assert_allclose(logits, expected[row, : len(logits)], rtol=0, atol=1e-4)

    lm.save(tmp_path / "ours", params, config)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(reference(again, tokens), expected, rtol=0, atol=1e-5)
    assert names(tmp_path / "ours") == names(tmp_path / "theirs")
    assert lm.load_config(tmp_path / "ours") == config


def names(folder) -> set[str]:
    data = (folder / "model.safetensors").read_bytes()
    return set(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])) - {"__metadata__"}


def through_cache(params, config, tokens, lengths) -> list[np.ndarray]:
    """Prefill rows of unequal length padded on the right, then continue each token by token."""
    step = jax.jit(lambda p, t, c, m: lm.apply(p, config, t, cache=c, mask=m)[:2])
    cache = lm.init_cache(config, len(tokens), tokens.shape[1])
    longest = max(lengths)
    mask = np.arange(longest)[None] < np.array(lengths)[:, None]
    logits, cache = step(params, jnp.array(tokens[:, :longest]), cache, jnp.array(mask))
    rows = [list(np.asarray(logits[b, :n])) for b, n in enumerate(lengths)]
    for _ in range(3):
        here = np.array([[tokens[b, len(rows[b])]] for b in range(len(tokens))])
        logits, cache = step(params, jnp.array(here), cache, jnp.ones(here.shape, bool))
        for b, row in enumerate(rows):
            row.append(np.asarray(logits[b, 0]))
    assert cache.length.tolist() == [n + 3 for n in lengths]
    return [np.stack(row) for row in rows]


@pytest.mark.slow
def test_bfloat16_stays_near_transformers(tmp_path):
    model = build("llama", BASE).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    params, config = lm.load(tmp_path)
    tokens = np.random.default_rng(1).integers(0, V, (2, 9))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.float().numpy()
    ours = lm.apply(params, config, jnp.array(tokens)).logits
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float32), expected, rtol=0, atol=0.15)
