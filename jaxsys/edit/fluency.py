"""How a model writes: n-gram entropy, likeness to reference texts, free answers."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from jaxsys.core.errors import UserError
from jaxsys.evaluate.exact import first_choice

_WORD = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Split a text into words and marks.

    Reconstruction: the released codes use NLTK's tokenizer, which splits contractions otherwise.

    >>> words_of("It is, is it?")
    ['It', 'is', ',', 'is', 'it', '?']
    """
    return _WORD.findall(text)


def ngram_entropy(words: Sequence[str], n: int) -> float:
    """Compute the entropy of a text's n-grams, −Σ f(k) log₂ f(k), in bits.

    Args:
      words: of one text.
      n: words of an n-gram.

    Returns:
      Bits; 0 for a text of fewer than n words.

    >>> ngram_entropy(["a", "b", "a", "b", "a"], 2), ngram_entropy(["a"], 2)
    (1.0, 0.0)
    """
    if n < 1:
        raise UserError(f"n is {n}; an n-gram holds at least 1 word")
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = counts.total()
    return 0.0 - sum(c / total * math.log2(c / total) for c in counts.values())


def fluency(texts: Sequence[str]) -> float:
    """Average the weighted n-gram entropy of texts: (⅔ H₂ + 4⁄3 H₃) / 2, in bits.

    A text that repeats itself scores low; 100 words that never repeat score log₂ 99 and a little.

    Args:
      texts: what a model wrote.

    Raises:
      UserError: without texts.

    Reference: arXiv 2202.05262, section 3.3 (generation entropy); the weights are of the released
    code.

    >>> fluency(["ha ha ha ha"]), round(fluency(["a b c d e"]), 3)
    (0.0, 1.723)
    """
    if not texts:
        raise UserError("there is no text; give at least one that the model wrote")
    found = [
        (2 * ngram_entropy(words, 2) + 4 * ngram_entropy(words, 3)) / 6
        for words in map(words_of, texts)
    ]
    return sum(found) / len(found)


def rarity(texts: Sequence[str]) -> dict[str, float]:
    """Weigh words by the rarity of the texts that hold them: ln((1 + N) / (1 + n)) + 1.

    Args:
      texts: N of them, the collection; n of them hold a word.

    >>> rarity(["a b", "a"])["a"]
    1.0
    """
    held = Counter(word for text in texts for word in {w.lower() for w in words_of(text)})
    return {word: math.log((1 + len(texts)) / (1 + n)) + 1 for word, n in held.items()}


def consistency(
    written: Sequence[str], references: Sequence[str], weights: Mapping[str, float] | None = None
) -> float:
    """Compare what was written with reference texts: the cosine of their TF-IDF vectors.

    Args:
      written: texts of the model, taken as one.
      references: texts about subjects that share the new answer, taken as one.
      weights: from `rarity` of a larger collection; that of the references by default.

    Returns:
      In [0, 1]; 0 where no word is shared.

    Reference: arXiv 2202.05262, section 3.3 (reference score).

    >>> round(consistency(["a dog barks"], ["a dog barks"]), 6), consistency(["cat"], ["dog"])
    (1.0, 0.0)
    """
    weights = rarity(references) if weights is None else weights
    ours, theirs = (
        {
            word: n * weights[word]
            for word, n in Counter(w.lower() for t in texts for w in words_of(t)).items()
            if word in weights
        }
        for texts in (written, references)
    )
    dot = sum(value * theirs.get(word, 0.0) for word, value in ours.items())
    norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
    return dot / norms if norms else 0.0


def says(text: str, target: str, truth: str | None = None) -> bool:
    """Tell whether a freely written text names the target, and does so before the old answer.

    Args:
      text: written without being told the answer's length or beginning.
      target: the new answer.
      truth: the old one.

    Reference: arXiv 2502.11177 (answers judged as a user meets them, without teacher forcing).

    >>> says(" French, not English", "English", "French"), says(" in Rome.", "Rome", "Paris")
    (False, True)
    """
    choices = [target.strip()] + ([truth.strip()] if truth and truth.strip() else [])
    return first_choice(text, choices) == target.strip()
