"""Instructions: the three forms, the border between prompt and answer, batches by step."""

import json

import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.data import (
    ByteTokenizer,
    Encoded,
    Example,
    InstructionStream,
    encode_example,
    read_instructions,
    train_bpe,
)


def _write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def _template(messages):
    return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def test_three_forms_are_read(tmp_path):
    path = _write(
        tmp_path / "a.jsonl",
        {"prompt": "Q", "completion": "A"},
        "",
        {"instruction": "Add", "input": "1 1", "output": "2"},
        {"instruction": "Greet", "input": "", "output": "Hi"},
        {
            "messages": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "good day"},
            ]
        },
    )
    assert read_instructions(path, _template) == (
        Example("Q", "A"),
        Example("<user>Add\n1 1<assistant>", "2"),
        Example("<user>Greet<assistant>", "Hi"),
        Example("<user>hello<assistant>", "good day"),
    )
    with pytest.raises(UserError, match=r"line 5 .* no chat template"):
        read_instructions(path)


@pytest.mark.parametrize(
    "row",
    [
        "{",
        "[1]",
        "3",
        {"prompt": "a"},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": 3},
        {"messages": []},
        {"messages": [{"role": "user", "content": "a"}] * 2},
        {"messages": [1, {"role": "assistant", "content": "a"}]},
        "[" * 100_000,
    ],
)
def test_other_lines_are_refused_by_number(row, tmp_path):
    path = _write(tmp_path / "a.jsonl", {"prompt": "Q", "completion": "A"}, row)
    with pytest.raises(UserError, match="line 2 of"):
        read_instructions(path, _template)


def test_merges_across_the_border_belong_to_the_answer():
    bpe = train_bpe("ab cd " * 50, 270)
    example = Example("xa", "b")
    tokens, prompt_tokens = encode_example(example, bpe)
    assert bpe.decode(tokens) == "xab"
    assert bpe.decode(tokens[:prompt_tokens]) == "x"


def test_every_example_comes_once_an_epoch_whole_or_without_the_start_of_its_prompt():
    tokenizer = ByteTokenizer()
    texts = [("q" * n, "answer"[: 1 + n % 3]) for n in range(12)]
    examples = [encode_example(Example(*pair), tokenizer, 0) for pair in texts]
    stream = InstructionStream(examples, batch=4, length=8, seed=3)
    answers = []
    for step in range(3):
        tokens, mask = stream.batch_at(step)
        again = stream.batch_at(step)
        np.testing.assert_array_equal(again[0], tokens)
        answers += [bytes(row[m].tolist()) for row, m in zip(tokens, mask, strict=True)]
        assert not mask[:, 0].any() or (tokens[mask[:, 0], 0] == ord("a")).all()
    assert sorted(answers) == sorted(answer.encode() + b"\0" for _, answer in texts)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="there are 0 examples"):
        InstructionStream((), batch=1, length=4)
    with pytest.raises(UserError, match="answer of example 0 has 5 tokens"):
        InstructionStream((Encoded(np.arange(9), 4),), batch=1, length=4)
