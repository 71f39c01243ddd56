"""Vocabularies joined: against the tokenizers package; rows against mergekit's rules by hand."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.merge.tokenizers import (
    TokenizerFile,
    TokenizerRule,
    TokenSource,
    merge_tokenizers,
    parse_rule,
    read_tokenizer,
    strip,
    write_tokenizer,
)
from jaxsys.merge.vocabulary import (
    ModelRows,
    embedding_plan,
    has_token_rows,
    reorder_rows,
    settle_tied,
)

ONE = "the cat sat on the mat and the rat sat on the hat " * 4
TWO = "a quick brown fox jumps over the lazy dog again and again " * 4


def _words(*tokens, added=()):
    vocab = {t: i for i, t in enumerate(tokens)}
    more = [
        {"id": len(tokens) + i, "content": t, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False, "special": True}
        for i, t in enumerate(added)
    ]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": more,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": tokens[0]},
    }
    everything = vocab | {t: len(tokens) + i for i, t in enumerate(added)}
    return TokenizerFile(document, everything, None)


def _trained(folder, text, size, specials=()):
    from tokenizers import AddedToken

    from jaxsys.data import train_bpe

    tokenizer = train_bpe(text, size).tokenizer
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return read_tokenizer(folder), tokenizer


def _opened(file):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(file.document))


def test_a_union_of_byte_level_bpe_is_one_the_package_reads(tmp_path):
    a, tok_a = _trained(tmp_path / "a", ONE, 290, ["<|a|>", "<|both|>"])
    b, tok_b = _trained(tmp_path / "b", TWO, 300, ["<|b|>", "<|both|>"])
    assert a.vocab == tok_a.get_vocab(with_added_tokens=True)
    merged = merge_tokenizers([a, b])
    opened = _opened(merged)
    assert opened.get_vocab(with_added_tokens=True) == merged.vocab
    assert set(merged.vocab) == set(a.vocab) | set(b.vocab)
    assert {t: i for t, i in merged.vocab.items() if t in a.vocab} == a.vocab
    assert sorted(merged.vocab.values()) == list(range(len(merged.vocab)))
    # Words of the first keep their tokens; those that only the second knew are whole again.
    assert opened.encode("the cat").tokens == tok_a.encode("the cat").tokens
    assert opened.encode(" brown").tokens == tok_b.encode(" brown").tokens == ["Ġbrown"]
    assert opened.decode(opened.encode("the lazy cat", add_special_tokens=False).ids) == (
        "the lazy cat"
    )
    for name in ("<|a|>", "<|b|>", "<|both|>"):
        assert opened.encode(f"x{name}y").tokens[1] == name
    assert [f.name for f in write_tokenizer(tmp_path / "out", merged)] == ["tokenizer.json"]
    assert read_tokenizer(tmp_path / "out").vocab == merged.vocab


def test_unlike_tokenizers_join_by_whole_tokens(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra lm is not installed")
    from tokenizers import Tokenizer, models

    pieces = [("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)]
    Tokenizer(models.Unigram(pieces, 0, False)).save(str(tmp_path / "tokenizer.json"))
    unigram = read_tokenizer(tmp_path)
    words = _words("<unk>", "hello", "b", added=["<s>"])
    for order in ([unigram, words], [words, unigram]):
        merged = merge_tokenizers(order)
        opened = _opened(merged)
        assert opened.get_vocab(with_added_tokens=True) == merged.vocab
        assert set(merged.vocab) == {"<unk>", "▁a", "b", "hello", "<s>"}
    assert _opened(merge_tokenizers([unigram, words])).encode("hello").tokens == ["hello"]


def test_strip_leaves_out_tokens_without_rows(tmp_path):
    file, _ = _trained(tmp_path / "a", ONE, 290, ["<|a|>"])
    short = strip(file, 280)
    assert _opened(short).get_vocab(with_added_tokens=True) == short.vocab
    assert set(short.vocab) == {t for t, i in file.vocab.items() if i < 280}
    assert strip(file, 10**6) is file


def _rows_by_hand(vocabs, matrices, base, wanted, exceptions, multiple):
    """Do what mergekit's PermutedEmbeddings does, token by token."""
    donors = {}
    for token in wanted:
        owners = [i for i, v in enumerate(vocabs) if token in v and v[token] < len(matrices[i])]
        row = {i: matrices[i][vocabs[i][token]].astype(np.float64) for i in owners}
        if token in exceptions:
            source = exceptions[token]
            donors[token] = 0 * matrices[0][0] if source.zero else row[int(source.model)]
        elif not owners:
            donors[token] = 0 * matrices[0][0]
        elif base in owners:
            donors[token] = row[base]
        else:
            donors[token] = np.mean([row[i] for i in owners], axis=0)
    rows = -(-len(wanted) // multiple) * multiple
    result = []
    for vocab, matrix in zip(vocabs, matrices, strict=True):
        out = np.zeros((rows, matrix.shape[1]))
        for token, place in wanted.items():
            own = token in vocab and vocab[token] < len(matrix)
            forced = token in exceptions and exceptions[token].force
            out[place] = donors[token] if forced or not own else matrix[vocab[token]]
        out[len(wanted) :] = out[: len(wanted)].mean(0)
        result.append(out)
    return result


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.permutations("abcdefgh"), min_size=2, max_size=3),
    st.lists(st.integers(2, 8), min_size=3, max_size=3),
    st.integers(-2, 2),
    st.sampled_from(["union", "base"]),
    st.integers(1, 5),
    st.integers(0, 1),
)
def test_rows_are_mergekits(orders, lengths, extra, source, multiple, base):
    vocabs = [list(o)[:n] for o, n in zip(orders, lengths, strict=False)]
    rng = np.random.default_rng(0)
    models, matrices = [], []
    for i, tokens in enumerate(vocabs):
        rows = max(2, len(tokens) + extra)
        matrices.append(rng.normal(size=(rows, 3)).astype(np.float32))
        models.append(ModelRows(str(i), rows, _words(*tokens)))
    plan = embedding_plan(models, base, TokenizerRule(source, {}, multiple))
    ids = [{t: i for i, t in enumerate(tokens)} for tokens in vocabs]
    want = _rows_by_hand(ids, matrices, base, plan.file.vocab, {}, multiple)
    for got, exact in zip(reorder_rows(plan, matrices), want, strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-6)
        assert got.dtype == np.float32
    # Ids of the result are those of the tokenizer that is written.
    assert set(plan.file.document["model"]["vocab"]) <= set(plan.file.vocab)


def test_sources_of_single_tokens():
    models = [
        ModelRows("one", 3, _words("a", "b", "c")),
        ModelRows("two", 4, _words("b", "x", "y", "a")),
    ]
    matrices = [np.arange(3.0)[:, None], 10 + np.arange(4.0)[:, None]]
    exceptions = {
        "a": TokenSource("1", force=True),
        "x": TokenSource(zero=True),
        "c": TokenSource("0"),
    }
    renamed = {
        t: TokenSource(s.model and ("one", "two")[int(s.model)], zero=s.zero, force=s.force)
        for t, s in exceptions.items()
    }
    plan = embedding_plan(models, 0, TokenizerRule("union", renamed))
    ids = [m.file.vocab for m in models]
    want = _rows_by_hand(ids, matrices, 0, plan.file.vocab, exceptions, 1)
    got = reorder_rows(plan, matrices)
    np.testing.assert_allclose(np.stack(got), np.stack(want))
    assert got[0][plan.file.vocab["a"], 0] == got[1][plan.file.vocab["a"], 0] == 13.0
    other = TokenizerRule(
        "union", {"x": TokenSource("one", token="c"), "y": TokenSource("one", token_id=1)}
    )
    plan = embedding_plan(models, 0, other)
    first = reorder_rows(plan, matrices)[0]
    assert first[plan.file.vocab["x"], 0] == 2.0
    assert first[plan.file.vocab["y"], 0] == 1.0


def test_padding_alone_needs_no_rule():
    words = _words("a", "b")
    models = [ModelRows("base", 4, words), ModelRows("tuned", 2, words)]
    plan = embedding_plan(models)
    padded, tuned = reorder_rows(plan, [np.arange(4.0), np.array([5.0, 7.0])])
    assert padded.tolist() == [0.0, 1.0, 0.5, 0.5]
    assert tuned.tolist() == [5.0, 7.0, 6.0, 6.0]
    assert embedding_plan([models[0], models[0]]) is None


def test_recipes_sections():
    section = {
        "source": "union",
        "pad_to_multiple_of": 64,
        "tokens": {
            "<|im_start|>": {"source": "chat", "force": True},
            "x": {"source": {"kind": "model_token", "model": "chat", "token_id": 3}},
        },
    }
    rule = parse_rule(section)
    assert rule.tokens["<|im_start|>"] == TokenSource("chat", force=True)
    assert rule.tokens["x"] == TokenSource("chat", token_id=3)
    assert (rule.pad_to_multiple_of, parse_rule("base")) == (64, TokenizerRule("base"))


AB, BC = ModelRows("one", 2, _words("a", "b")), ModelRows("two", 2, _words("b", "c"))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: embedding_plan([AB, BC]), "tokenizer_source: union, base"),
        (lambda: embedding_plan([AB._replace(file=None, rows=3), BC._replace(file=None)]), "rows"),
        (lambda: embedding_plan([AB._replace(file=None)], 0, TokenizerRule()), "no tokenizer.json"),
        (
            lambda: embedding_plan([AB], 0, TokenizerRule("base", {"z": TokenSource(zero=True)})),
            "rule for 'z'",
        ),
        (
            lambda: embedding_plan([AB, BC], 0, TokenizerRule("union", {"c": TokenSource("x")})),
            "expected one of one, two",
        ),
        (
            lambda: embedding_plan([AB, BC], 0, TokenizerRule("union", {"c": TokenSource("one")})),
            "has no such row",
        ),
        (lambda: TokenSource(), "exactly one source"),
        (lambda: TokenSource("one", token="a", token_id=1), "exactly one source"),
        (lambda: TokenizerRule(pad_to_multiple_of=0), "pad_to_multiple_of is 0"),
        (lambda: parse_rule({"sauce": "base"}), "'sauce'"),
        (lambda: parse_rule({"tokens": {"a": {}}}), "has no source"),
        (lambda: parse_rule({"tokens": {"a": {"source": {"kind": "average"}}}}), "kind: zero"),
        (lambda: parse_rule({"pad_to_multiple_of": "64"}), "'64'"),
        (
            lambda: reorder_rows(
                embedding_plan([AB, BC], 0, TokenizerRule()), [np.ones((2, 3)), np.ones((2, 4))]
            ),
            "differ in width",
        ),
    ],
)
def test_mistakes(call, says):
    with pytest.raises(UserError, match=says):
        call()


@pytest.mark.parametrize("text", ["[]", "{}", '{"model": {"vocab": {"a": -1}}}', '{"model": 3}'])
def test_unsound_files(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="no readable tokenizer"):
        read_tokenizer(tmp_path)


def test_tied_with_untied():
    named, tied = settle_tied([{"e": 1, "lm_head.weight": 1}, {"e": 2}], [True, True], "e")
    assert (named, tied) == ([{"e": 1}, {"e": 2}], True)
    named, tied = settle_tied([{"e": 1}, {"e": 2, "lm_head.weight": 3}], [True, False], "e")
    assert (named[0]["lm_head.weight"], tied) == (1, False)
    # A mapping that computes its tensors is not asked for them.
    lazy = collections.ChainMap({"e": 1})
    lazy_named, _ = settle_tied([lazy, {"lm_head.weight": 3}], [True, False], "e")
    assert not isinstance(lazy_named[0], dict)
    assert dict(lazy_named[0]) == {"e": 1, "lm_head.weight": 1}
    assert has_token_rows("lm_head.bias")
    assert not has_token_rows("model.layers.0.mlp.up_proj.weight")
