"""Guess the object from what others wrote about it, without any picture.

A floor for every reported accuracy on SNARE: what the texts give away by themselves.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError
from jaxsys.ground.snare import Row, annotations_of


def text_only_scores(
    rows: Sequence[Row],
    encode: Callable[[list[str]], Any],
    *,
    other_pairs_only: bool = False,
) -> Float[np.ndarray, "N K"]:
    """Score each object of a row by the texts of other rows that mean it.

        s(l, o) = cos( t(l), mean { t(l′) : l′ means o, l′ ≠ l as a string } )

    with t the encoder's vectors, L2-normalised. A row is never compared with itself, nor with an
    equal string.

    Args:
        rows: N annotations with answers; each row's own answer is not used for its own scores.
        encode: texts -> [n, D] vectors, for example a MiniLM sentence encoder.
        other_pairs_only: also leave out the texts written for the same pair of objects, which were
            written to tell just these two apart.

    Returns:
        [N, 2] scores; minus infinity for an object of which no other text is left. With
        `other_pairs_only` that happens often: judge only the rows whose scores are all finite.

    Raises:
        UserError: for a row without an answer, or vectors that do not fit the texts.

    >>> vectors = {"red": [1, 0], "scarlet": [1, 0.1], "blue": [0, 1], "navy": [0.1, 1]}
    >>> rows = [Row(text, ("a", "b"), i // 2) for i, text in enumerate(vectors)]
    >>> text_only_scores(rows, lambda texts: np.array([vectors[t] for t in texts])).argmax(1)
    array([0, 0, 1, 1])
    """
    for i, row in enumerate(rows):
        if row.answer is None:
            raise UserError(
                f"row {i} has no answer; the texts of an object can only be found where answers "
                "are given; use the training or the validation fold"
            )
    texts = list(dict.fromkeys(row.annotation for row in rows))
    vectors = np.asarray(encode(texts), np.float64)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise UserError(
            f"encode gave an array of {vectors.shape} for {len(texts)} texts; expected one vector "
            "each, [N, D]; wrap the encoder"
        )
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    place, meaning = {text: i for i, text in enumerate(texts)}, annotations_of(rows)
    scores = np.full((len(rows), 2), -np.inf)
    for i, row in enumerate(rows):
        pair = frozenset(row.objects)
        for k, name in enumerate(row.objects):
            others = [
                place[rows[j].annotation]
                for j in meaning.get(name, ())
                if rows[j].annotation != row.annotation
                and not (other_pairs_only and frozenset(rows[j].objects) == pair)
            ]
            if others:
                mean = vectors[others].mean(0)
                cosine = vectors[place[row.annotation]] @ mean
                scores[i, k] = cosine / max(np.linalg.norm(mean), 1e-12)
    return scores
