"""CLIP's tokens against a plain byte-pair encoder, and the files they come from."""

import gzip
import itertools
import json
import re

import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.models import clip
from jaxsys.models.clip.tokens import build, byte_characters, clean

pytest.importorskip("tokenizers", reason="pip install 'jaxsys[lm]'")

MERGES = [
    *[("t", "h"), ("th", "e</w>"), ("c", "h"), ("ch", "a"), ("i", "r</w>"), ("cha", "ir</w>")],
    *[("a", "n"), ("'", "s</w>"), ("o", "o"), ("1", "2</w>"), ("e", "r"), ("er", "s</w>")],
    *[
        ("w", "oo"),
        ("woo", "d</w>"),
        ("!", "!</w>"),
        ("h", "e</w>"),
        ("t", "he</w>"),
        ("Ã", "©</w>"),
    ],
]
TEXTS = [
    "The chair's legs: wooden, wood & 12 brown-ish!!",
    "  AN \t armchair\nthat isn't  theirs ",
    "caf\u00e9 CAFE\u0301 \U0001f600 \u6905\u5b50 x_y 3.14",
    "it&amp;#39;s <b>",
    "",
    "ends <|endoftext|> here",
]


def _plain(text: str, ids: dict[str, int]) -> list[int]:
    """Merge the best pair until there is none, as the definition has it."""
    rank = {pair: i for i, pair in enumerate(MERGES)}
    names = byte_characters()
    pattern = (
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\w\s]|_)+"
    )
    found = []
    for piece in re.findall(pattern, clean(text)):
        if piece.startswith("<|") and piece in ids:
            found.append(ids[piece])
            continue
        parts = [names[byte] for byte in piece.encode()]
        parts[-1] += "</w>"
        while True:
            pairs = [p for p in itertools.pairwise(parts) if p in rank]
            if not pairs:
                break
            best, i = min(pairs, key=rank.__getitem__), 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
        found += [ids[part] for part in parts]
    return found


def _vocab() -> dict[str, int]:
    names = list(byte_characters().values())
    names += [name + "</w>" for name in names] + ["".join(pair) for pair in MERGES]
    return {name: i for i, name in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_definition(text):
    # Two merges make the same token; the later id is the token's, as in OpenAI's code.
    ids = _vocab()
    wanted = [ids["<|startoftext|>"], *_plain(text, ids), ids["<|endoftext|>"]]
    got = build(None, MERGES).encode([text], 99)[0]
    assert got.tolist() == wanted + [0] * (99 - len(wanted))


def test_every_file_gives_the_same_tokenizer(tmp_path):
    wanted = build(None, MERGES).encode(TEXTS, 99)
    lines = "\n".join(["#version: 0.2", *map(" ".join, MERGES), ""])
    (tmp_path / "merges.txt").write_text(lines)
    with gzip.open(tmp_path / "m.txt.gz", "wb") as file:
        file.write(lines.encode())
    (tmp_path / "vocab.json").write_text(json.dumps(_vocab()))
    single = tmp_path / "single"
    single.mkdir()
    model = {"type": "BPE", "vocab": _vocab(), "merges": [list(pair) for pair in MERGES]}
    (single / "tokenizer.json").write_text(json.dumps({"model": model}))
    for path in (tmp_path, tmp_path / "merges.txt", tmp_path / "m.txt.gz", single):
        np.testing.assert_array_equal(clip.load_tokenizer(path).encode(TEXTS, 99), wanted)


def test_mistakes_are_named(tmp_path):
    tokenizer = build(None, MERGES)
    for call, match in (
        (lambda: tokenizer.encode(["the chair"], 3), "has 2 tokens"),
        (lambda: tokenizer.encode("the chair"), "a list"),
        (lambda: tokenizer.encode(["\ud800"]), "surrogate"),
        (lambda: tokenizer.encode([""], 1), "length is 1"),
        (lambda: build({"a": 1}, []), "lacks"),
        (lambda: build(_vocab(), [("q", "z")]), "'qz'"),
        (lambda: build({"a": -1}, []), "the id -1"),
        (lambda: clip.load_tokenizer(tmp_path), "tokenizer.json cannot be read"),
        (lambda: clip.load_tokenizer(tmp_path / "x.gz"), "No such file"),
    ):
        with pytest.raises(UserError, match=match):
            call()
    assert tokenizer.encode(["the chair the chair"], 4, truncate=True)[0, -1] == tokenizer.end_id
    for content, match in (("a b c", "expected two"), ("", "byte-pair"), ("{", "JSON")):
        name = "m.txt" if match == "expected two" else "t.json"
        (tmp_path / name).write_text({"": '{"model": {"vocab": 3}}'}.get(content, f"v\n{content}"))
        with pytest.raises(UserError, match=match):
            clip.load_tokenizer(tmp_path / name)
