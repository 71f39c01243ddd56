"""Metrics beside brute force, task files as they are and as they should not be."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.evaluate import (
    Choices,
    Prompt,
    Task,
    accuracy,
    exact_match,
    from_forward,
    load_task,
    multiple_choice,
    task_names,
)
from jaxsys.evaluate.choice import judge
from jaxsys.evaluate.exact import extract, first_choice, last_number

DATA = os.environ.get("JAXSYS_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="JAXSYS_DATA names no data folder")


@given(st.lists(st.tuples(st.sampled_from([0, 1, 2, None]), st.integers(0, 2)), min_size=1))
def test_accuracy_by_counting(pairs):
    answers, right = zip(*pairs, strict=True)
    found = accuracy("t", "acc", answers, right, chance=1 / 3)
    n = len(pairs)
    assert found.value == pytest.approx(sum(a == r for a, r in pairs) / n)
    assert found.empty == pytest.approx(answers.count(None) / n)
    given_answers = [a for a in answers if a is not None]
    most = max((given_answers.count(a) for a in range(3)), default=0)
    assert found.constant == pytest.approx(most / len(given_answers) if given_answers else 0)
    assert found.majority == max(right.count(a) for a in range(3)) / n
    assert found.low <= found.value <= found.high


def test_interval_is_that_of_the_binomial():
    hits = np.random.default_rng(0).random(600) < 0.4
    found = accuracy("t", "acc", hits.tolist(), [True] * 600, chance=0.25)
    half = 1.96 * np.sqrt(found.value * (1 - found.value) / 600)
    assert found.low == pytest.approx(found.value - half, abs=0.006)
    assert found.high == pytest.approx(found.value + half, abs=0.006)
    assert found.row()["above chance"]


def test_mistakes_in_accuracy():
    for answers, right in (([0], [0, 1]), ([], [])):
        with pytest.raises(UserError, match="there must be one for each"):
            accuracy("t", "acc", answers, right, chance=0.5)


QUESTIONS = [
    Choices.ask("Q: a or b?", ["a thing", "b", "something quite long"], 1),
    Choices.ask("Q: what?", ["yes", "no"], 0),
    Choices(("He said", "She said"), (" so.", " so."), 1),
]


def test_choices_are_judged_by_likelihood(toy, ascii_tokens, by_hand):
    (plain, norm), judged = multiple_choice(toy, ascii_tokens, QUESTIONS)
    for q, j in zip(QUESTIONS, judged, strict=True):
        pairs = zip(q.contexts, q.continuations, strict=True)
        values = [by_hand(ascii_tokens.encode(c), ascii_tokens.encode(a))[0] for c, a in pairs]
        np.testing.assert_allclose(j.log_likelihoods, values, atol=2e-4)
        assert j.plain == np.argmax(values)
        sizes = [len(a) - 1 for a in q.continuations]
        assert j.normalised == np.argmax(np.array(values) / sizes)
    assert (plain.metric, norm.metric) == ("acc", "acc_norm")
    assert plain.chance == norm.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)


def test_a_model_that_always_says_the_same_is_found_out(ascii_tokens):
    constant = from_forward(
        lambda p, t: jnp.zeros((*t.shape, 128)).at[..., ord("a")].set(50.0), {}, 128, 64
    )
    questions = [Choices.ask("Q", ["a", "b"], i % 2) for i in range(20)]
    (plain, _), _ = multiple_choice(constant, ascii_tokens, questions)
    assert (plain.value, plain.constant, plain.majority) == (0.5, 1.0, 0.5)
    assert not plain.row()["above chance"]


def test_no_possible_choice_is_no_answer():
    nothing = judge((float("nan"), float("-inf")), (" a", " b"))
    assert nothing.plain is nothing.normalised is None
    assert judge((-1.0, float("nan")), (" a", " b")).plain == 0


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        ([], "there is no question"),
        ([Choices.ask("Q", ["a"], 0)], "question 0 has 1 choices"),
        ([Choices.ask("Q", ["a", "b"], 2)], "says that choice 2 is right"),
        ([Choices(("Q",), ("a", "b"), 0)], "has 2 choices and 1 contexts"),
    ],
)
def test_mistakes_in_questions(toy, ascii_tokens, questions, words):
    with pytest.raises(UserError, match=words):
        multiple_choice(toy, ascii_tokens, questions)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", "1234"),
        ("costs $5.50.", "5.5"),
        ("it is -3", "-3"),
        ("100 and then 20.00", "20"),
        ("none", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_first_choice_is_a_whole_word():
    assert first_choice("untrue, false or true", ("true", "false")) == "false"
    assert first_choice("answer10", ("answer1", "answer2")) is None
    assert extract("The  End. ", Prompt("Q", "the end")) == "the end"


def test_exact_match_counts_empty_answers(ascii_tokens):
    def nothing_after_z(params, tokens):
        return jax.nn.one_hot(jnp.where(tokens == ord("z"), 0, -1), 128) + params[tokens]

    follow = jnp.roll(jnp.eye(128), 1, axis=1) * 0.5
    model = from_forward(nothing_after_z, follow, 128, 64)
    prompts = [Prompt("a", "bcd"), Prompt("zz", "anything"), Prompt("m", "xyz")]
    found, written = exact_match(model, ascii_tokens, prompts, max_tokens=3, rows=2)
    assert written == ["bcd", "", "nop"]
    assert (found.value, found.empty, found.chance) == pytest.approx((1 / 3, 1 / 3, 0.0))
    with pytest.raises(UserError, match="no prompt"):
        exact_match(model, ascii_tokens, [], max_tokens=3)


SIZES = {
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
    "boolq": 3270,
    "winogrande": 1267,
    "mmlu": 1531,
    "gsm8k": 1319,
}


@needs_data
@pytest.mark.parametrize("name", [n for n in task_names() if not n.startswith("wikitext")])
def test_built_in_tasks(name):
    task = load_task(name)
    assert len(task.questions) == SIZES[name.removesuffix("_written")]
    assert task.kind == ("prompt" if name.endswith("_written") or name == "gsm8k" else "choice")
    for q in task.questions:
        if isinstance(q, Choices):
            assert 0 <= q.answer < len(q.continuations)
            assert all(c.strip() and c.startswith(" ") for c in q.continuations)
        else:
            assert isinstance(q, Prompt)
            assert q.answer in (q.choices or (q.answer,))
            assert extract(f"so it is {q.answer}", q) is not None


@needs_data
def test_questions_as_lm_eval_puts_them():
    first = load_task("arc_easy").questions[0]
    assert isinstance(first, Choices)
    assert first.contexts[0] == (
        "Question: Which statement best explains why photosynthesis is the foundation of most food "
        "webs?\nAnswer:"
    )
    assert first.continuations[3] == " The producers in all ecosystems are plants."
    assert first.answer == 0
    blank = load_task("winogrande").questions[0]
    assert isinstance(blank, Choices)
    assert blank.contexts[1] == "Sarah was a much better surgeon than Maria so Maria"
    assert blank.continuations == (" always got the easier cases.",) * 2
    asked = load_task("boolq").questions[0]
    assert isinstance(asked, Choices)
    assert asked.contexts[0].startswith("Question: does ethanol take more energy")
    assert asked.continuations == (" no", " yes")
    assert load_task("wikitext2").questions[0].startswith(" \n = Robert <unk> =")


def _file(tmp_path: Path, *rows, name: str = "own.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_own_files(tmp_path):
    row = {"context": "Q", "choices": ["a", "b"], "answer": 1}
    task = load_task(_file(tmp_path, row, "", row))
    assert task.questions == (Choices.ask("Q", ["a", "b"], 1),) * 2
    assert task.head(1).protocol.endswith("the first 1 of 2")
    assert load_task(_file(tmp_path, {"text": "some"}, name="t.jsonl")).kind == "text"
    assert load_task(_file(tmp_path, "plain words", name="p.txt")).questions == ("plain words",)
    with pytest.raises(UserError, match="limit is 0"):
        task.head(0)
    assert task.head(5) is task


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "holds no line"),
        (["{"], "line 1 is not JSON"),
        (["[" * 100_000], "line 1 is not JSON"),
        ([{"context": "Q", "choices": ["a", "b"], "answer": True}], "line 1 is no question"),
        ([{"context": "Q", "choices": "ab", "answer": 0}], "line 1 is no question"),
        ([3], "line 1 is no question"),
        ([{"text": "a"}, {"prompt": "a", "answer": "b"}], "2 kinds of questions"),
    ],
)
def test_files_that_are_no_task(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        load_task(_file(tmp_path, *rows))


def test_no_such_task(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no task 'arc'; expected one of arc_easy"):
        load_task("arc")
    with pytest.raises(UserError, match=r"missing\.jsonl cannot be read"):
        load_task(tmp_path / "missing.jsonl")
    monkeypatch.delenv("JAXSYS_DATA", raising=False)
    with pytest.raises(UserError, match="set JAXSYS_DATA or pass --data"):
        load_task("arc_easy")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "boolq_test.json").write_text('[{"instruction": "x"}]')
    with pytest.raises(UserError, match="not in the form that task boolq reads"):
        load_task("boolq", tmp_path)
    (tmp_path / "eval" / "boolq_test.json").write_text("[]")
    with pytest.raises(UserError, match="holds no question"):
        load_task("boolq", tmp_path)


def test_kinds():
    assert Task("t", (Prompt("a", "b"),), "").kind == "prompt"
