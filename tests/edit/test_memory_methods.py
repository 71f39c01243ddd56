"""SERAC and IKE: what stands before a prompt, and when."""

import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Record, Request
from jaxsys.edit.ike import IKE, answering_ike, demonstrations
from jaxsys.edit.memory import edit_memory, own_encoder, remember
from jaxsys.edit.serac import SERAC, answering_serac, fit_scope

WORDS = ("rome", "oslo", "ada", "linux", "city")


@pytest.fixture
def facts():
    """Give two facts."""
    return [
        Request("The city of Rome lies in", "Rome", "Gaul", "Italy"),
        Request("Ada plays the", "Ada", "oud", "harp"),
    ]


def encode(texts):
    """Count known words."""
    return np.array([[float(word in text.lower()) for word in WORDS] for text in texts])


def test_serac_answers_within_its_scope_only(llama, facts):
    model, params = llama
    config = SERAC(scale=1.0, encoder=encode)
    one = edit_memory(model, config, params, facts)
    other = [facts[0]._replace(target="Spain")]
    two = edit_memory(model, config, one.params, other, state=one.state)
    assert two.params is params
    assert [r.target for r in two.state.requests] == ["oud", "Spain"]
    rewrite = answering_serac(model, config, params, two.state).rewrite
    assert rewrite("In the city of Rome") == (
        "The city of Rome lies in Spain.\nIn the city of Rome"
    )
    # exp(-1) is below a half: one word more or less is outside.
    assert rewrite("Rome is near") == "Rome is near"
    assert rewrite("Ada") == "Ada plays the oud.\nAda"
    assert answering_serac(model, config, params, None).rewrite is None


def test_scope_is_the_best_border():
    def lengths(texts):
        return np.array([[float(len(text))] for text in texts])

    records = [
        Record(Request("aaaa", "aaaa", "b"), ("aaaaa", "aaaaaaa"), (("aaaaaa", "c"),)),
        Record(Request("aaaa", "aaaa", "b"), ("aaa",), (("aaaaaaaaa", "c"),)),
    ]
    # Squared distances inside: 1, 9, 1; outside: 4, 25.
    scope = fit_scope(lengths, records)
    assert scope.accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert 1 < np.log(2) / scope.scale < 4
    with pytest.raises(UserError, match="0 paraphrases"):
        fit_scope(lengths, [Record(Request("a", "a", "b"))])


def test_ike_puts_the_likest_demonstrations_nearest(llama, facts):
    model, params = llama
    shown = (
        Record(Request("Oslo is", "Oslo", "old"), ("So Oslo is",), (("Ada is", "new"),)),
        Record(Request("Linux is", "Linux", "red")),
    )
    assert len(demonstrations(shown)) == 4
    config = IKE(shown, k=2, encoder=encode)
    state = edit_memory(model, config, params, facts).state
    prompt = answering_ike(model, config, params, state).rewrite("Ada has a")
    assert prompt.split("\n\n")[-1] == "New Fact: Ada plays the oud\nPrompt: Ada has a"
    assert prompt.split("\n\n")[-2] == "New Fact: Oslo is old\nPrompt: Ada is new"
    assert prompt.count("New Fact") == 3
    none = answering_ike(model, IKE(shown, k=0, encoder=encode), params, state).rewrite("Ada")
    assert none == "New Fact: Ada plays the oud\nPrompt: Ada"


def test_own_encoder_averages_hidden_states(llama):
    model, params = llama
    encoder = own_encoder(model, params, 0)
    table = np.asarray(params["model"]["embed_tokens"]["weight"])
    ids = model.tokenizer.encode("Rome")
    mean = table[ids].mean(axis=0)
    found = encoder(["Rome", "A much longer text"])
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="layer 4"):
        own_encoder(model, params, 4)


def test_mistakes(facts):
    with pytest.raises(UserError, match="encoder gives an array of shape"):
        remember(lambda texts: np.full((len(texts), 2), np.nan), None, facts)
    with pytest.raises(UserError, match="codes of 5 numbers"):
        remember(lambda texts: np.ones((len(texts), 2)), remember(encode, None, facts), facts[:1])
    with pytest.raises(UserError, match="template"):
        SERAC(template="{fact}")
    with pytest.raises(UserError, match="k is -1"):
        IKE(k=-1)
