"""The paged KV pool: who owns which page, and which pages can be reused for an equal prefix.

Comes in: page numbers asked for, given back, and published under the digest of the tokens they
hold. Goes out: pages. Called by the scheduler only; holds no data itself.

    state of a page    owner                                 leaves it by
    free               `_free`                               allocate
    used               the `_refs[page]` sequences using it  release (the last one)
    cached             `_lru` (refs 0, published)            take, or allocate (least recently used)

A published page stays findable while it is used or cached. Keys are keyed SHA-256 chains (`chain`):
equal keys mean equal tokens from position 0 on, equal tenant salt and equal rope, and nobody
outside can construct them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


class PageLeak(Exception):
    """The pool's books disagree with themselves or with the sequences: an engine fault."""


def chain(
    secret: bytes,
    salt: bytes,
    variant: int,
    tokens: npt.NDArray[np.int32],
    page_size: int,
    parents: list[bytes],
) -> None:
    """Extends `parents` to one digest per full page of `tokens`. `variant`: the row of rope
    frequencies that the sequence's prompt was computed with."""
    full = len(tokens) // page_size
    if len(parents) >= full:
        return
    # The salt is hashed to a fixed length first, so no salt can imitate a chain.
    root = secret + b"salt" + variant.to_bytes(4, "little") + salt
    last = parents[-1] if parents else hashlib.sha256(root).digest()
    data = tokens[: full * page_size].tobytes()
    step = page_size * 4
    for at in range(len(parents) * step, full * step, step):
        last = hashlib.sha256(secret + last + data[at : at + step]).digest()
        parents.append(last)


class PagePool:
    def __init__(self, pages: int) -> None:
        self.total = pages
        self.evicted = 0
        self._free = list(range(pages - 1, -1, -1))
        self._refs = [0] * pages
        self._key: list[bytes | None] = [None] * pages
        self._page: dict[bytes, int] = {}
        self._lru: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `allocate` can give: free ones and cached ones."""
        return len(self._free) + len(self._lru)

    @property
    def cached(self) -> int:
        return len(self._lru)

    @property
    def used(self) -> int:
        return self.total - self.available

    def allocate(self, count: int) -> list[int] | None:
        """`count` private pages, or None and nothing changed."""
        if count > self.available:
            return None
        while len(self._free) < count:
            page, _ = self._lru.popitem(last=False)
            self._forget(page)
            self._free.append(page)
            self.evicted += 1
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        return pages

    def matched(self, keys: Sequence[bytes], limit: int) -> int:
        """How many of the first `limit` keys are findable, from the start without a gap."""
        page = self._page
        for i in range(min(limit, len(keys))):
            if keys[i] not in page:
                return i
        return min(limit, len(keys))

    def take(self, keys: Iterable[bytes]) -> list[int]:
        """References the pages of findable keys."""
        pages = [self._page[key] for key in keys]
        for page in pages:
            if self._refs[page] == 0:
                del self._lru[page]
            self._refs[page] += 1
        return pages

    def unreferenced(self, keys: Iterable[bytes]) -> int:
        """How many of these findable keys' pages are only cached: taking them makes as many fewer
        available.
        """
        return sum(self._refs[self._page[key]] == 0 for key in keys)

    def publish(self, page: int, key: bytes) -> None:
        """Makes a used page findable. The first page of a key stays, a second copy is private."""
        if key not in self._page and self._key[page] is None:
            self._page[key] = page
            self._key[page] = key

    def withdraw(self, pages: Iterable[int]) -> None:
        """Makes pages unfindable: what they hold is not to be trusted."""
        for page in pages:
            self._forget(page)
            if self._refs[page] == 0 and page in self._lru:
                del self._lru[page]
                self._free.append(page)

    def release(self, pages: Sequence[int]) -> None:
        """Gives back one reference each. Of a chain, the end is evicted before the start."""
        for page in reversed(pages):
            refs = self._refs[page] - 1
            if refs < 0:
                raise PageLeak(f"page {page} was released more often than taken")
            self._refs[page] = refs
            if refs == 0:
                if self._key[page] is None:
                    self._free.append(page)
                else:
                    self._lru[page] = None

    def flush(self) -> int:
        """Forgets every published key; cached pages become free. Returns how many did."""
        cached = list(self._lru)
        for key in list(self._page):
            self._forget(self._page[key])
        self._lru.clear()
        self._free += cached
        return len(cached)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Every page is in exactly one state and referenced exactly as often as the sequences hold
        it.
        """
        refs = [0] * self.total
        for pages in held:
            for page in pages:
                refs[page] += 1
        if refs != self._refs:
            bad = next(p for p in range(self.total) if refs[p] != self._refs[p])
            raise PageLeak(
                f"page {bad}: {self._refs[bad]} references in the pool, {refs[bad]} held"
            )
        free = set(self._free)
        if len(free) != len(self._free) or free & self._lru.keys():
            raise PageLeak("a page is free twice, or free and cached")
        idle = {p for p in range(self.total) if refs[p] == 0}
        if idle != free | self._lru.keys():
            raise PageLeak(
                f"{len(idle)} pages are unused, {len(free)} free and {len(self._lru)} cached"
            )
        published = {p: k for p, k in enumerate(self._key) if k is not None}
        if len(published) != len(self._page) or any(
            self._page.get(k) != p for p, k in published.items()
        ):
            raise PageLeak("the keys and the pages they name disagree")
        if any(self._key[p] is None for p in self._lru) or any(
            self._key[p] is not None for p in free
        ):
            raise PageLeak("a cached page has no key, or a free one has")

    def _forget(self, page: int) -> None:
        key = self._key[page]
        if key is not None:
            del self._page[key]
            self._key[page] = None
