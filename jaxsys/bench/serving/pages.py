"""Who holds which page of the cache: a free list, counts of holders, and pages worth keeping.

A full page can be given a name, the digest of all tokens up to its end. A page whose last holder
leaves keeps its contents while it has a name, until its room is needed: the page that was left
longest ago goes first. A later request that begins with the same tokens holds it again.

Reference: sharing and copy of pages: PagedAttention (arXiv 2309.06180, section 4.3); the order in
which unused prefixes are given up: SGLang (arXiv 2312.07104, section 3).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


def page_digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """Name a full page by the tokens up to its end.

    Args:
      before: the name of the page before it; empty for the first.
      tokens: of this page.

    Returns:
      A digest of 16 bytes: two different texts do not share one by accident or by design.

    >>> page_digest(b"", [1, 2]) == page_digest(b"", [2, 1])
    False
    """
    content = np.asarray(tokens, np.int64).tobytes()
    return hashlib.blake2b(before + content, digest_size=16).digest()


def page_digests(tokens: Sequence[int], page_tokens: int, count: int) -> list[bytes]:
    """Name the first full pages of a text.

    Args:
      tokens: of the text.
      page_tokens: tokens of a page.
      count: pages.

    >>> len(page_digests([1, 2, 3, 4, 5], 2, 2))
    2
    """
    names, before = [], b""
    for i in range(count):
        before = page_digest(before, tokens[i * page_tokens : (i + 1) * page_tokens])
        names.append(before)
    return names


class Pages:
    """Give out pages and take them back.

    Args:
      count: pages there are.

    >>> pages = Pages(2)
    >>> held = pages.take(1)
    >>> pages.name(held[0], b"once")
    >>> pages.leave(held)
    >>> pages.find([b"once", b"upon"]) == held, pages.spare
    (True, 2)
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._by_name: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._left: OrderedDict[int, None] = OrderedDict()  # named, held by nobody; oldest first

    @property
    def spare(self) -> int:
        """Count the pages that nobody holds."""
        return len(self._free) + len(self._left)

    @property
    def kept(self) -> int:
        """Count the pages that nobody holds and whose contents are kept."""
        return len(self._left)

    def holders(self, page: int) -> int:
        """Count those who hold a page."""
        return self._holders[page]

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Find the pages of a text's beginning, up to the first that is not there.

        Args:
          names: of the text's pages in order.

        Returns:
          Pages, none of which is held by this call; see `hold`.
        """
        found = []
        for name in names:
            if name not in self._by_name:
                break
            found.append(self._by_name[name])
        return found

    def unheld(self, pages: Iterable[int]) -> int:
        """Count those among pages that nobody holds: holding them takes as many off `spare`."""
        return sum(self._holders[page] == 0 for page in pages)

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages that `find` found."""
        for page in pages:
            self._left.pop(page, None)
            self._holders[page] += 1

    def take(self, count: int) -> list[int]:
        """Take pages for new tokens; contents that were kept are given up where need be.

        Args:
          count: at most `spare`.

        Returns:
          Pages that nobody else holds.
        """
        assert count <= self.spare, f"{count} pages of {self.spare} spare ones"
        taken = []
        for _ in range(count):
            if not self._free:
                page, _ = self._left.popitem(last=False)
                del self._by_name[self._names.pop(page)]
                self._free.append(page)
            taken.append(self._free.pop())
        for page in taken:
            self._holders[page] = 1
        return taken

    def leave(self, pages: Sequence[int]) -> None:
        """Give pages back, in the order of the text: its end is given up before its beginning."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} was left by more than held it"
            if self._holders[page] == 0:
                if page in self._names:
                    self._left[page] = None
                else:
                    self._free.append(page)

    def name(self, page: int, name: bytes) -> None:
        """Name a page that is held; a second page of the same contents stays without a name."""
        if name not in self._by_name and page not in self._names:
            self._by_name[name] = page
            self._names[page] = name
