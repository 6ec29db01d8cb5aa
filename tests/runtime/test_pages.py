"""The page pool against a plain model: who holds what, what can be found, what is evicted."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.core.pages import PageLeak, PagePool, chain


def keys_of(
    tokens: list[int], salt: bytes = b"", secret: bytes = b"s" * 32, variant: int = 0
) -> list[bytes]:
    keys: list[bytes] = []
    chain(secret, salt, variant, np.array(tokens, np.int32), 4, keys)
    return keys


def test_keys_name_whole_prefixes_and_tenants() -> None:
    a, b = keys_of([1, 2, 3, 4, 5, 6, 7, 8, 9]), keys_of([1, 2, 3, 4, 5, 6, 7, 9])
    assert len(a) == 2 and len(b) == 2
    assert a[0] == b[0] and a[1] != b[1]
    same_page_elsewhere = keys_of([5, 6, 7, 8])
    assert same_page_elsewhere[0] != a[1]
    assert keys_of([1, 2, 3, 4], salt=b"x")[0] != a[0]
    assert keys_of([1, 2, 3, 4], secret=b"t" * 32)[0] != a[0]
    assert keys_of([1, 2, 3, 4], variant=1)[0] != a[0]


def test_keys_extend_to_what_a_fresh_chain_gives() -> None:
    keys = keys_of([1, 2, 3, 4, 5])
    chain(b"s" * 32, b"", 0, np.array([1, 2, 3, 4, 5, 6, 7, 8], np.int32), 4, keys)
    assert keys == keys_of([1, 2, 3, 4, 5, 6, 7, 8])


def test_end_of_a_chain_is_evicted_before_its_start() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    keys = keys_of(list(range(12)))
    for page, key in zip(pages, keys, strict=True):
        pool.publish(page, key)
    pool.release(pages)
    assert (pool.available, pool.cached) == (4, 3)
    assert pool.allocate(2) is not None
    assert pool.matched(keys, 3) == 2
    assert pool.evicted == 1


def test_allocation_is_all_or_nothing() -> None:
    pool = PagePool(3)
    assert pool.allocate(4) is None
    assert pool.available == 3
    pool.check([])


def test_second_copy_of_a_page_stays_private() -> None:
    pool = PagePool(4)
    key = keys_of([1, 2, 3, 4])[0]
    first, second = pool.allocate(1), pool.allocate(1)
    pool.publish(first[0], key)
    pool.publish(second[0], key)
    pool.release(second)
    assert pool.cached == 0 and pool.take([key]) == first
    pool.check([first, first])


def test_withdrawn_pages_are_found_by_nobody() -> None:
    pool = PagePool(4)
    keys = keys_of([1, 2, 3, 4])
    pages = pool.allocate(1)
    pool.publish(pages[0], keys[0])
    pool.withdraw(pages)
    assert pool.matched(keys, 1) == 0
    pool.release(pages)
    assert pool.cached == 0
    pool.check([])


def test_double_release_is_seen() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(PageLeak, match="more often"):
        pool.release(pages)


@pytest.mark.parametrize("damage", ["refs", "free", "lru", "key"])
def test_check_sees_damaged_books(damage: str) -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.publish(pages[0], keys_of([1, 2, 3, 4])[0])
    pool.check([pages])
    if damage == "refs":
        pool._refs[pages[0]] += 1
    elif damage == "free":
        pool._free.append(pages[1])
    elif damage == "lru":
        pool._lru[pages[0]] = None
    else:
        pool._key[pages[0]] = None
    with pytest.raises(PageLeak):
        pool.check([pages])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 12))
def test_random_life_of_a_pool(seed: int, size: int) -> None:
    """Holders take, grow, publish and give back; a dict of contents says what must be found."""
    rng = random.Random(seed)
    pool = PagePool(size)
    content: dict[int, bytes] = {}  # what each page holds, as its holders wrote it
    held: list[tuple[list[int], list[bytes]]] = []
    texts = [keys_of([b] * rng.randint(4, 24)) for b in range(3)]
    for _ in range(60):
        act = rng.choice(["enter", "enter", "leave", "withdraw", "flush"])
        if act == "enter":
            keys = rng.choice(texts)
            keys = keys[: rng.randint(1, len(keys))]
            found = pool.matched(keys, len(keys))
            fresh = len(keys) - found
            before = pool.available
            if fresh + pool.unreferenced(keys[:found]) > before:
                continue
            pages = pool.take(keys[:found])
            assert [content[p] for p in pages] == keys[:found]
            more = pool.allocate(fresh)
            assert more is not None
            assert not set(more) & {p for other, _ in held for p in other}
            pages += more
            for page, key in zip(more, keys[found:], strict=True):
                content[page] = key
                pool.publish(page, key)
            held.append((pages, keys))
        elif act == "leave" and held:
            pages, _ = held.pop(rng.randrange(len(held)))
            pool.release(pages)
        elif act == "withdraw" and held:
            pool.withdraw(held[0][0])
        elif act == "flush" and not held:
            pool.flush()
            assert pool.available == size and pool.cached == 0
        pool.check([pages for pages, _ in held])
        assert pool.used == len({p for pages, _ in held for p in pages})
