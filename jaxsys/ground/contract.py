"""What every grounder takes and gives: a batch of candidates, and three pure functions.

Axes: ``B`` rows, ``K`` candidates, ``V`` views of a candidate, ``D`` width of an image feature,
``L`` width of a text feature, ``T`` words.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx

from jaxsys.core.errors import UserError
from jaxsys.models.resnet import split


class Batch(NamedTuple):
    """Hold B descriptions, each with K candidates seen from V views.

    Only `text` and `mask` are always there; each grounder says what else it reads.

    Attributes:
        text: f_l, [B, L], the description's vector.
        mask: [B, K, V] bool; False where a view is missing.
        views: f_v, [B, K, V, D], features of the views by the frozen vision encoder.
        pixels: [B, K, V, ...], what a vision encoder reads: images, or activations kept from
            before its adapted blocks. With `places` it is [U, V, ...] of U objects.
        answer: [B], the place of the candidate that is meant.
        objects: [B, K] integers, equal where two candidates are the same object.
        texts: [B] integers, equal where two descriptions are the same text (`text_ids`).
        words: [B, T, L], features of the single words.
        word_mask: [B, T] bool; False after the last word.
        tokens: [B, T], the description as the captioner's tokens.
        token_mask: [B, T] bool; False after the last token.
        first_view: [B, K], the view that is seen first, where a protocol says it.
        places: [B, K], each candidate's place among the U objects of `pixels`, which an encoder
            then reads once however many rows they are in (`jaxsys.ground.groups`).

    >>> Batch(np.zeros((1, 4)), np.ones((1, 2, 8), bool)).answer is None
    True
    """

    text: Any
    mask: Any
    views: Any = None
    pixels: Any = None
    answer: Any = None
    objects: Any = None
    texts: Any = None
    words: Any = None
    word_mask: Any = None
    tokens: Any = None
    token_mask: Any = None
    first_view: Any = None
    places: Any = None


class Scores(Protocol):
    """Score the candidates: the signature that all grounders share."""

    def __call__(
        self, trainable: Any, frozen: Any, batch: Batch, *, key: Any = None, train: bool = False
    ) -> Any:
        """Give [B, K] scores.

        Args:
            trainable: the parameters that `Grounder.init` drew.
            frozen: those that no gradient reaches.
            batch: what is asked.
            key: draws views where the pooling is random, and dropout when training.
            train: whether dropout and random masks are on.
        """
        ...


class Grounder(NamedTuple):
    """A grounder as pure functions.

    Attributes:
        init: (key, frozen) -> trainable parameters.
        scores: (trainable, frozen, batch, *, key=None, train=False) -> [B, K].
        loss: (trainable, frozen, batch, *, key) -> (loss, a dict of its parts).

    >>> from jaxsys.ground.match import zero_shot
    >>> batch = Batch(np.eye(2, 4)[:1], np.ones((1, 2, 1), bool), np.eye(2, 4)[None, :, None])
    >>> zero_shot(scale=2.0).scores({}, {}, batch).tolist()
    [[2.0, 0.0]]
    """

    init: Callable[[Any, Any], Any]
    scores: Scores
    loss: Callable[..., Any]


def stateless(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, Callable[[Any], Any]]:
    """Split a module once, making no parameters yet.

    Args:
        build: random streams -> module.

    Returns:
        ``graphdef`` for `flax.nnx.merge`, and ``init(key) -> params``.

    >>> graphdef, init = stateless(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
    >>> nnx.merge(graphdef, init(jax.random.key(0)))(np.ones((1, 2), np.float32)).shape
    (1, 3)
    """
    graphdef, _ = split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return graphdef, lambda key: split(build(nnx.Rngs(key)))[1]


def keys_for(key: Any, n: int, *, train: bool) -> list[Any]:
    """Split a key, or give n times None where there is none.

    Args:
        key: or None.
        n: how many.
        train: training draws dropout, so it needs a key.

    Raises:
        UserError: for training without a key.

    >>> keys_for(None, 2, train=False)
    [None, None]
    """
    if key is None and train:
        raise UserError(
            "train is True and key is None; expected a key, which draws dropout and views; pass "
            "key=jax.random.key(step)"
        )
    return [None] * n if key is None else list(jax.random.split(key, n))


def text_ids(texts: Sequence[str]) -> np.ndarray:
    """Number texts so that equal ones, up to case and spaces, share a number.

    >>> text_ids(["A red  chair", "a lamp", "a red chair "]).tolist()
    [0, 1, 0]
    """
    numbers: dict[str, int] = {}
    plain = [" ".join(text.lower().split()) for text in texts]
    return np.array([numbers.setdefault(text, len(numbers)) for text in plain], np.int32)


def check_batch(batch: Batch) -> None:
    """Check a batch before any work starts; it must hold real arrays, not traced ones.

    Raises:
        UserError: all that is wrong at once: axes that disagree, a candidate with zero views, fewer
            than two candidates, an answer outside of them, or one object twice in a row.

    >>> check_batch(Batch(np.zeros((1, 4)), np.zeros((1, 2, 8), bool)))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the batch ... candidate 0 of row 0 has zero views; ...
    """
    mask = np.asarray(batch.mask)
    if mask.ndim != 3 or mask.dtype != bool or np.ndim(batch.text) != 2 or not mask.size:
        raise UserError(
            f"the batch has a mask of {mask.shape} {mask.dtype} and texts of "
            f"{np.shape(batch.text)}; expected [B, K, V] bool and [B, L]; reshape them"
        )
    b, k, v = mask.shape
    wrong = [
        f"{name} has shape {np.shape(getattr(batch, name))}, not {list(axes)}"
        for name, axes in {
            "text": (b,),
            "views": (b, k, v),
            "pixels": (b, k, v) if batch.places is None else np.shape(batch.pixels)[:1],
            "places": (b, k),
            "answer": (b,),
            "objects": (b, k),
            "texts": (b,),
            "words": (b,),
            "word_mask": (b,),
            "tokens": (b,),
            "token_mask": (b,),
            "first_view": (b, k),
        }.items()
        if getattr(batch, name) is not None
        and np.shape(getattr(batch, name))[: len(axes)] != tuple(axes)
    ]
    if k < 2:
        wrong.append(f"there is {k} candidate")
    blank = np.argwhere(~mask.any(-1))
    if len(blank):
        wrong.append(f"candidate {blank[0][1]} of row {blank[0][0]} has zero views")
    if not wrong and batch.answer is not None:
        answer = np.asarray(batch.answer)
        outside = np.flatnonzero((answer < 0) | (answer >= k))
        wrong += [f"the answer of row {i} is none of {k} candidates" for i in outside[:1]]
    if not wrong and batch.objects is not None:
        twice = [i for i, row in enumerate(np.asarray(batch.objects)) if len(set(row.tolist())) < k]
        wrong += [f"row {i} has one object twice" for i in twice[:1]]
    if wrong:
        raise UserError(
            f"the batch cannot be used: {'; '.join(wrong)}; expected every candidate of a row to "
            "be another object with at least one view; leave such rows out"
        )
