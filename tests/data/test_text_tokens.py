"""Text and tokenizers: same everywhere, and back again unchanged."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.data import ByteTokenizer, Tokenizer, python_docs, read_text, train_bpe

SENTENCE = "Gradients are averaged; parameters are averaged less often. " * 20


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(SENTENCE + "naïve café", 300)


def test_python_docs_is_long_ordinary_text():
    text = python_docs()
    assert len(text) > 400_000
    assert text == python_docs()
    assert len(set(text)) < 256


def test_python_docs_and_bpe_are_the_same_in_another_process(bpe):
    program = (
        "import sys, hashlib; from jaxsys.data import python_docs, train_bpe;"
        "print(hashlib.sha256(python_docs().encode()).hexdigest());"
        "text = sys.argv[1]; print(train_bpe(text, 300).encode(text[:500]).tolist())"
    )
    import hashlib

    learned = SENTENCE + "naïve café"
    out = subprocess.run(
        [sys.executable, "-c", program, learned],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    ).stdout.splitlines()
    assert out[0] == hashlib.sha256(python_docs().encode()).hexdigest()
    assert out[1] == str(bpe.encode(learned[:500]).tolist())


def test_read_text_names_what_is_wrong(tmp_path):
    good = tmp_path / "good.txt"
    good.write_text("ünïcode\n", encoding="utf-8")
    assert read_text(good) == "ünïcode\n"
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    for name, words in [
        ("missing.txt", "does not exist"),
        ("empty.txt", "no text"),
        ("latin.txt", "not UTF-8"),
        (".", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=words):
            read_text(tmp_path / name)


@given(st.text())
def test_both_tokenizers_give_any_text_back(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert not ids.size or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
        assert tokenizer.decode(ids) == text


def test_bpe_is_shorter_and_has_the_size_asked_for(bpe):
    assert isinstance(bpe, Tokenizer)
    assert bpe.vocab_size == 300
    assert bpe.encode(SENTENCE).size < 0.6 * ByteTokenizer().encode(SENTENCE).size


def test_mistakes_are_user_errors(bpe, monkeypatch):
    with pytest.raises(UserError, match="token id 256"):
        ByteTokenizer().decode([3, 256])
    with pytest.raises(UserError, match="token id -1"):
        bpe.decode([-1])
    with pytest.raises(UserError, match="bytes alone need 256"):
        train_bpe("x", 255)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'jaxsys\[bpe\]'"):
        train_bpe("x", 300)
