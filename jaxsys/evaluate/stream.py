"""Text that grows token by token: stop strings, and letters that are not whole yet."""

from collections.abc import Sequence
from typing import Any

from jaxsys.core.errors import UserError

_BROKEN = "\ufffd"  # what a decoder writes for bytes that are no whole letter


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Cut a text before the stop string that is complete first, as a text that grows is stopped.

    Returns:
      The text up to there, and whether there was one.

    >>> cut("one. two. three", ["two", "."])
    ('one', True)
    """
    found = [(place + len(s), place) for s in stop if (place := text.find(s)) >= 0]
    return (text[: min(found)[1]], True) if found else (text, False)


def settled(text: str, stop: Sequence[str]) -> str:
    """Take off the end what may still change: the start of a stop string, or half a letter.

    >>> settled("Paris.<|im", ["<|im_end|>"])
    'Paris.'
    """
    text = text.rstrip(_BROKEN)
    sizes = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return text[: len(text) - max(sizes, default=0)]


class TextStream:
    """Follow one row's text while its tokens come in.

    Args:
      tokenizer: its `decode` turns ids into text.
      prompt: ids before the first new one; they decide about spaces and half letters.
      stop: texts that end the row; neither they nor what follows belongs to the text.

    >>> from jaxsys.data import ByteTokenizer
    >>> stream = TextStream(ByteTokenizer(), [], stop=["END"])
    >>> [stream.push([b]) for b in b"oh EN"], stream.push([b"D"[0]]), stream.text
    (['o', 'h', ' ', '', ''], '', 'oh ')
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()):
        if any(not s for s in stop):
            raise UserError("a stop string is empty; give at least one letter or leave it out")
        self._decode = tokenizer.decode
        self._stop = tuple(stop)
        # A few tokens before are enough context, and keep decoding cheap on long prompts.
        self._ids = [int(i) for i in prompt][-8:]
        self._before = self._decode(self._ids) if self._ids else ""
        self._given = 0
        self.text = ""
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """Take new ids; give the text that is now certain and was not given before."""
        if self.stopped:
            return ""
        self._ids.extend(int(i) for i in ids)
        whole = self._decode(self._ids)
        start = len(self._before)
        if not whole.startswith(self._before):  # the prompt's last letter became whole
            start = len(self._before.rstrip(_BROKEN))
        self.text, self.stopped = cut(whole[start:], self._stop)
        certain = self.text if self.stopped else settled(self.text, self._stop)
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        return new

    def finish(self) -> str:
        """Give what was held back, when no more ids will come."""
        new = self.text[self._given :]
        self._given = len(self.text)
        return new
