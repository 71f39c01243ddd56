"""Make vectors of pictures and of texts with the encoders that packages or users bring.

An image encoder is cut in two: what it keeps of a picture never changes, and may be stored; from
there on DA4LG's domain encoder adapts it. For EfficientNet-Lite0 the cut lies before the last
blocks, so that training on a processor is possible; a CLIP is adapted from the picture on.

Axes: ``N`` pictures, ``S`` texts, ``T`` words, ``D`` image width, ``L`` text width.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.ground.game import TextVectors

LITE0_CUT = 15  # the first block that is adapted: the last of 16, on 5 x 5 at 160 pixels
_CHUNK = 64
_MOST_WORDS = 32


class ImageEncoder(NamedTuple):
    """Hold an encoder of pictures, cut in two.

    Attributes:
        name: names its features on disk.
        width: D.
        params: of the part behind the cut, as a tree that LoRA addresses by path.
        patterns: globs over the paths that LoRA adapts.
        keep: uint8 [N, Y, X, 3] -> what the part behind the cut reads, [N, ...].
        encode: (params, kept) -> [N, D]; computes through adapters where params has them.

    >>> mean_colour().width
    3
    """

    name: str
    width: int
    params: Any
    patterns: tuple[str, ...]
    keep: Callable[[Any], Any]
    encode: Callable[[Any, Any], Any]


def encoder_slug(name: str) -> str:
    """Make a folder's name of an encoder's.

    >>> encoder_slug("clip:models/ViT-B-32")
    'clip-models-ViT-B-32'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "encoder"


def mean_colour() -> ImageEncoder:
    """Make the simplest encoder, a picture's mean colour times a matrix: for tests and demos.

    >>> encoder = mean_colour()
    >>> encoder.encode(encoder.params, encoder.keep(np.full((1, 8, 8, 3), 255, np.uint8))).tolist()
    [[1.0, 1.0, 1.0]]
    """
    from jaxsys.models.lm.linear import linear

    def keep(pictures: Any) -> np.ndarray:
        return (np.asarray(pictures, np.float32) / 255).mean((1, 2))

    def encode(params: Any, kept: Any) -> Any:
        return linear(params["colour"], jnp.asarray(kept, jnp.float32))

    return ImageEncoder(
        "mean-colour", 3, {"colour": {"weight": jnp.eye(3)}}, ("colour.weight",), keep, encode
    )


def lite0(path: str | Path | None = None, *, cut: int = LITE0_CUT) -> ImageEncoder:
    """Make an encoder of EfficientNet-Lite0, adaptable from one of its blocks on.

    Args:
        path: its weights; None takes those that the package brings.
        cut: the first of the 16 blocks that is adapted; 0 to 16.

    Raises:
        UserError: for weights that are not there, or another cut.

    >>> lite0(cut=17)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: cut is 17; ...
    """
    from jaxsys.models import efficientnet

    if not 0 <= cut <= 16:
        raise UserError(f"cut is {cut}; expected the number of a block, 0 to 16; change it")
    whole = efficientnet.load(path or efficientnet.packaged(), dtype=np.float32)
    blocks = {number: block for number, block in whole["_blocks"].items() if int(number) >= cut}
    tail = {"_blocks": blocks, **{name: whole[name] for name in ("_conv_head", "_bn1")}}
    patterns = (*(efficientnet.LORA if blocks else ()), "_conv_head.weight")

    @jax.jit
    def begin(pictures: Any) -> Any:
        return efficientnet.run_blocks(whole, efficientnet.stem(whole, pictures), 0, cut)

    def keep(pictures: Any) -> Any:
        pictures = np.asarray(pictures)
        return begin(efficientnet.preprocess(list(pictures), min(pictures.shape[1:3])))

    def encode(params: Any, kept: Any) -> Any:
        x = jnp.asarray(kept, jnp.float32)
        return efficientnet.head(params, efficientnet.run_blocks(params, x, cut))

    return ImageEncoder("efficientnet-lite0", 1280, tail, patterns, keep, jax.jit(encode))


def clip_images(path: str | Path) -> ImageEncoder:
    """Make an encoder of a CLIP that the user has, adaptable as a whole.

    Args:
        path: see `jaxsys.models.clip.load`.

    Raises:
        UserError: for weights that cannot be loaded.

    >>> clip_images("nowhere")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere...
    """
    from jaxsys.models import clip

    params, config = clip.load(path)

    def keep(pictures: Any) -> np.ndarray:
        return clip.preprocess(list(np.asarray(pictures)), config)

    def encode(params: Any, kept: Any) -> Any:
        return clip.encode_image(params, config, jnp.asarray(kept, jnp.float32)).features

    vision = {name: params[name] for name in ("vision_model", "visual_projection")}
    name, width = f"clip:{path}", config.projection_width
    return ImageEncoder(name, width, vision, clip.VISION_LORA, keep, jax.jit(encode))


def image_encoder(name: str) -> ImageEncoder:
    """Make an encoder by its name.

    Args:
        name: ``efficientnet-lite0``, ``mean-colour``, or ``clip:PATH``.

    Raises:
        UserError: for another name.

    >>> image_encoder("resnet")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: encoder 'resnet' is unknown; ...
    """
    if name == "efficientnet-lite0":
        return lite0()
    if name == "mean-colour":
        return mean_colour()
    if name.startswith("clip:") and len(name) > 5:
        return clip_images(name[5:])
    raise UserError(
        f"encoder {name!r} is unknown; expected efficientnet-lite0, mean-colour or clip:PATH; "
        "correct it"
    )


def text_vectors(texts: Sequence[str], encoder: str = "minilm") -> TextVectors:
    """Encode texts, and the words in them.

    Args:
        texts: S of them.
        encoder: ``minilm`` (the packaged sentence encoder; words are its last states), or
            ``clip:PATH`` (words are the last states of the text tower, where its width is that of
            the shared space; otherwise there are none).

    Returns:
        Vectors and words; no tokens (see `caption_tokens`).

    Raises:
        UserError: for no texts, another encoder, or weights that are not there.

    >>> text_vectors([], "minilm")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: there are zero texts ...
    """
    if not texts:
        raise UserError("there are zero texts to encode; expected at least one; make a game first")
    if encoder == "minilm":
        run, (ids, mask) = _minilm(texts)
    elif encoder.startswith("clip:") and len(encoder) > 5:
        run, (ids, mask) = _clip(texts, encoder[5:])
    else:
        raise UserError(
            f"text encoder {encoder!r} is unknown; expected minilm or clip:PATH; correct it"
        )
    vectors, words = [], []
    for i in range(0, len(texts), _CHUNK):
        part = slice(i, i + _CHUNK)
        short = _CHUNK - len(ids[part])  # one shape, so that one program is compiled
        filled = (np.pad(x[part], ((0, short), (0, 0)), mode="edge") for x in (ids, mask))
        found = run(*filled)
        vectors.append(np.asarray(found[0])[: _CHUNK - short])
        words.append(np.asarray(found[1])[: _CHUNK - short])
    tokens = np.concatenate(words)
    if tokens.shape[-1] != vectors[0].shape[-1]:
        return TextVectors(np.concatenate(vectors))
    return TextVectors(np.concatenate(vectors), tokens * mask[..., None], mask)


def _minilm(texts: Sequence[str]) -> tuple[Any, tuple[np.ndarray, np.ndarray]]:
    from jaxsys.models import minilm
    from jaxsys.models.encoder import unit

    folder = minilm.packaged()
    params, config = minilm.load(folder, dtype=np.float32)
    ids, mask = minilm.load_tokenizer(folder).encode(texts)
    ids, mask = ids[:, :_MOST_WORDS], mask[:, :_MOST_WORDS]

    @jax.jit
    def run(ids: Any, mask: Any) -> Any:
        states = minilm.states(params, config, ids, mask)
        return unit(minilm.mean_pool(states, mask)), states

    return run, (ids, mask)


def _clip(texts: Sequence[str], path: str) -> tuple[Any, tuple[np.ndarray, np.ndarray]]:
    from jaxsys.models import clip

    params, config = clip.load(path)
    tokenizer = clip.load_tokenizer(path)
    ids = tokenizer.encode(texts, config.max_positions, truncate=True)
    # Of a row, what follows its first end is padding.
    mask = np.cumsum(ids == config.eos_id, 1) - (ids == config.eos_id) == 0
    most = max(int(mask.sum(1).max()), 1)
    encode = jax.jit(lambda ids, mask: tuple(clip.encode_text(params, config, ids)))
    return encode, (ids[:, :most], mask[:, :most])


class Vocabulary(NamedTuple):
    """Hold the words that a small captioner of our own knows.

    Attributes:
        words: the word of id 2 first; id 0 pads, id 1 is any other word.

    >>> vocabulary_of(["a red chair", "a lamp"], 4).words
    ('a', 'red')
    """

    words: tuple[str, ...]


def vocabulary_of(texts: Sequence[str], size: int = 512) -> Vocabulary:
    """Find the words that are used most; ties in the order of first use.

    >>> vocabulary_of(["red red", "blue"], 3).words
    ('red',)
    """
    counted = Counter(word for text in texts for word in _words(text))
    return Vocabulary(tuple(word for word, _ in counted.most_common(max(size - 2, 0))))


def caption_tokens(
    texts: Sequence[str], vocabulary: Vocabulary, length: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Turn texts into a captioner's tokens: one for each word.

    Args:
        texts: S of them.
        vocabulary: made of the texts that are trained on.
        length: T; longer texts are cut.

    Returns:
        Tokens [S, T] int32 and their mask.

    >>> tokens, mask = caption_tokens(["a blue chair"], Vocabulary(("a", "chair")), 4)
    >>> tokens.tolist(), mask.tolist()
    ([[2, 1, 3, 0]], [[True, True, True, False]])
    """
    number = {word: i + 2 for i, word in enumerate(vocabulary.words)}
    tokens = np.zeros((len(texts), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, text in enumerate(texts):
        row = [number.get(word, 1) for word in _words(text)][:length]
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return tokens, mask


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
