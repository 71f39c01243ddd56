"""The adapter for lm-eval: its own Hugging Face adapter gives the same on the same files."""

import json
import os

import jax
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.data import python_docs, train_bpe
from jaxsys.evaluate import Choices, from_lm, multiple_choice
from jaxsys.evaluate.harness import _answers, harness_model
from jaxsys.models import lm

# Both packages warn about their own dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = lm.LMConfig("llama", 300, 32, 2, 4, 2, 8, 48, 64, rope=lm.Rope(width=8))


class Tokens:
    """Byte pairs with token 0 as begin and end of a text."""

    bos_id, eos_id = None, 0

    def __init__(self, bpe):
        self._bpe, self.vocab_size = bpe, 300

    def encode(self, text):
        return self._bpe.encode(text)

    def decode(self, ids):
        return self._bpe.decode([int(i) for i in ids if i])


@pytest.fixture(scope="module")
def tokens():
    return Tokens(train_bpe(python_docs()[:20_000], 300))


@pytest.fixture(scope="module")
def params():
    fresh = lm.init(jax.random.key(0), CONFIG)
    return jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, fresh)


@pytest.fixture(scope="module")
def model(params):
    return from_lm(params, CONFIG)


TEXTS = [
    "The cat sat on the mat and looked at the dog.",
    "An assignment statement evaluates the expression list. " * 9,  # longer than the context
    "No.",
]
PAIRS = [("The answer is", " yes"), ("The answer is ", "no, it is not"), ("", "Something")]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, params, tokens):
    pytest.importorskip("torch")
    pytest.importorskip("lm_eval")
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("tiny")
    lm.save(folder, params, CONFIG)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens._bpe.tokenizer, eos_token=tokens._bpe.tokenizer.id_to_token(0)
    )
    fast.pad_token = fast.eos_token
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return HFLM(network, tokenizer=fast, max_length=64, device="cpu", batch_size=1)


def _asked(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, a, i) for i, a in enumerate(arguments)]


def test_likelihoods_are_those_of_the_hugging_face_adapter(model, tokens, theirs):
    ours = harness_model(model, tokens)
    left = ours.loglikelihood(_asked(*PAIRS), disable_tqdm=True)
    right = theirs.loglikelihood(_asked(*PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([v for v, _ in left], [v for v, _ in right], atol=2e-3)
    assert [g for _, g in left] == [g for _, g in right]
    rolling = _asked(*((text,) for text in TEXTS))
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(rolling),
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True),
        rtol=1e-4,
    )


def test_generated_text_is_that_of_the_hugging_face_adapter(model, tokens, theirs):
    options = {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = _asked(*((text[:40], options) for text in TEXTS))
    ours = harness_model(model, tokens).generate_until(asked, disable_tqdm=True)
    assert ours == theirs.generate_until(asked, disable_tqdm=True)


def test_a_local_task_gives_what_multiple_choice_gives(model, tokens, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "mat", "sun", "sky", "tree", "house", "river"]
    rows = [
        {"question": f"Which is {w}?", "choices": list(rng.choice(words, 4, False)), "answer": 2}
        for w in words * 2
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True}
            for m in ("acc", "acc_norm")
        ],
    }
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    found = lm_eval.simple_evaluate(
        model=harness_model(model, tokens), tasks=[task], bootstrap_iters=0, verbosity="ERROR"
    )
    questions = [
        Choices.ask(f"Question: {r['question']}\nAnswer:", r["choices"], r["answer"]) for r in rows
    ]
    (plain, norm), _ = multiple_choice(model, tokens, questions)
    assert found["results"]["mine"]["acc,none"] == plain.value
    assert found["results"]["mine"]["acc_norm,none"] == norm.value


def test_an_option_that_is_not_known_is_refused(model, tokens):
    with pytest.raises(UserError, match="generation option 'num_beams'"):
        _answers(model, tokens, [[1]], {"num_beams": 4}, 8)


def test_sampling_options(model, tokens):
    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 50, "until": "\n", "max_gen_toks": 6}
    prompts = [[5, 6], [7] * 80]  # the second leaves no room and loses its beginning
    drawn = [_answers(model, tokens, prompts, sampled | {"seed": s}, 8) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_without_the_package(model, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"pip install 'jaxsys\[harness\]'"):
        harness_model(model, None)
