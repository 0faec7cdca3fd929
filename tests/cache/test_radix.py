"""The prefix tree against a plain list of sequences, and the ways such trees have broken elsewhere."""

import numpy as np
import pytest

from agentserve.cache.manager import CacheManager
from agentserve.cache.pool import PagePool
from agentserve.cache.radix import RadixCache
from agentserve.core import Handle


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def insert(tree: RadixCache, tokens: np.ndarray, pages: list[int], namespace: str = "") -> tuple[Handle, list[int]]:
    """Insert as a request does: match, lock, extend. The handle stays locked."""
    handle, _ = tree.match(namespace, tokens[:0])
    handle, _, duplicates = tree.extend(handle, namespace, tokens, pages)
    return handle, duplicates


def test_a_run_shorter_than_a_page_matches_nothing():
    tree = RadixCache(4)
    handle, _ = insert(tree, ids(1, 2, 3, 4), [0])
    tree.unlock(handle)
    for short in (ids(), ids(1), ids(1, 2, 3)):
        found, pages = tree.match("", short)
        assert (found.length, pages) == (0, [])
        tree.unlock(found)
    tree.check()


def test_split_keeps_locks_sizes_and_time():
    tree = RadixCache(2)
    whole, _ = insert(tree, ids(1, 2, 3, 4, 5, 6), [0, 1, 2])
    fork, _ = insert(tree, ids(1, 2, 3, 4, 9, 9), [7, 8, 9])
    tree.check()
    assert tree.evictable == 0
    assert (tree.pages, fork.length) == (4, 6)
    tree.unlock(fork)
    assert tree.evictable == 1
    assert tree.evict(99) == [9]
    tree.unlock(whole)
    assert tree.evictable == 3
    tree.check()
    assert sorted(tree.evict(99)) == [0, 1, 2]
    assert (tree.pages, tree.evictable) == (0, 0)


def test_partly_matched_prefixes_count_as_used():
    tree = RadixCache(1)
    for tokens, pages in ((ids(1, 2, 3), [0, 1, 2]), (ids(5, 6), [3, 4])):
        tree.unlock(insert(tree, tokens, pages)[0])
    tree.unlock(tree.match("", ids(1, 2, 8))[0])  # splits after 2; [1, 2] is now the youngest, 3 the oldest
    assert tree.evict(1) == [2]
    assert sorted(tree.evict(1)) == [3, 4]
    assert tree.match("", ids(1, 2))[0].length == 2


def test_a_run_inserted_twice_gives_its_duplicates_back_once():
    tree = RadixCache(2)
    first, duplicates = insert(tree, ids(1, 2, 3, 4), [0, 1])
    assert duplicates == []
    second, duplicates = insert(tree, ids(1, 2, 3, 4, 5, 6), [8, 9, 7])
    assert duplicates == [8, 9]
    assert tree.pages == 3
    assert tree.match("", ids(1, 2, 3, 4, 5, 6))[1] == [0, 1, 7]
    again, _, duplicates = tree.extend(second, "", ids(1, 2, 3, 4, 5, 6), [0, 1, 7])
    assert duplicates == []
    for handle in (first, again):
        tree.unlock(handle)
    tree.check()


def test_matched_pages_survive_eviction():
    tree = RadixCache(1)
    tree.unlock(insert(tree, ids(1, 2, 3), [0, 1, 2])[0])
    handle, pages = tree.match("", ids(1, 2))
    assert tree.evict(99) == [2]
    assert tree.match("", ids(1, 2))[1] == pages
    tree.unlock(handle)


def test_eviction_stops_when_nothing_is_left():
    tree = RadixCache(1)
    handle, _ = insert(tree, ids(1, 2), [0, 1])
    assert tree.evict(5) == []
    tree.unlock(handle)
    assert sorted(tree.evict(5)) == [0, 1]
    assert tree.evict(5) == []


def test_a_handle_given_back_twice_is_an_error():
    tree = RadixCache(1)
    handle, _ = insert(tree, ids(1), [0])
    tree.unlock(handle)
    with pytest.raises(RuntimeError, match="twice"):
        tree.unlock(handle)


def test_namespaces_never_match_and_flush_spares_locked_runs():
    tree = RadixCache(1)
    held, _ = insert(tree, ids(1, 2), [0, 1], "a")
    tree.unlock(insert(tree, ids(1, 2), [2, 3], "b")[0])
    assert tree.match("c", ids(1, 2))[1] == []
    assert sorted(tree.flush()) == [2, 3]
    assert tree.match("a", ids(1, 2))[1] == [0, 1]
    tree.check()
    tree.unlock(held)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_random_work_agrees_with_a_plain_model(page_size):
    """Thousands of random inserts, matches, unlocks and evictions; the model is a set of whole-page prefixes."""
    rng = np.random.default_rng(page_size)
    tree = RadixCache(page_size)
    known: dict[tuple[str, bytes], int] = {}
    held: list[tuple[Handle, str, np.ndarray]] = []
    next_page = 0

    def prefixes(tokens: np.ndarray) -> list[bytes]:
        return [tokens[:end].tobytes() for end in range(page_size, len(tokens) + 1, page_size)]

    for step in range(6000):
        namespace = "ab"[rng.integers(2)]
        tokens = rng.integers(0, 2, int(rng.integers(0, 9 * page_size)), dtype=np.int32)
        if page_size > 1:
            tokens = np.repeat(tokens[: len(tokens) // page_size + 1], page_size)[: len(tokens)].astype(np.int32)
        choice = rng.random()
        if choice < 0.45:
            handle, pages = tree.match(namespace, tokens)
            want = []
            for prefix in prefixes(tokens):
                if (namespace, prefix) not in known:
                    break
                want.append(known[namespace, prefix])
            assert pages == want
            assert handle.length == len(want) * page_size
            if choice < 0.25:
                whole = tokens[: len(tokens) - len(tokens) % page_size]
                own = list(range(next_page, next_page + len(whole) // page_size - len(pages)))
                next_page += len(own)
                handle, now, duplicates = tree.extend(handle, namespace, whole, pages + own)
                assert duplicates == []
                for prefix, page in zip(prefixes(whole), now, strict=True):
                    known[namespace, prefix] = page
                tokens = whole
            held.append((handle, namespace, tokens))
        elif choice < 0.8 and held:
            tree.unlock(held.pop(int(rng.integers(len(held))))[0])
        else:
            locked = {(space, prefix) for handle, space, run in held for prefix in prefixes(run[: handle.length])}
            freed = set(tree.evict(int(rng.integers(1, 6))))
            gone = {key for key, page in known.items() if page in freed}
            assert len(gone) == len(freed)
            assert not gone & locked
            for key in gone:
                del known[key]
        if step % 100 == 0:
            tree.check()
            assert tree.pages == len(known)
    for handle, _, _ in held:
        tree.unlock(handle)
    assert len(tree.evict(10**9)) == len(known)
    tree.check()


def test_pages_come_back_after_the_last_step_that_reads_them():
    pool = PagePool(4)
    pages = pool.allocate(4)
    pool.retire(pages[:2], last_step=7)
    pool.retire(pages[2:], last_step=8)
    pool.complete(6)
    assert pool.free == 0
    pool.complete(7)
    assert (pool.free, pool.retiring) == (2, 2)
    pool.complete(8)
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="free ones"):
        pool.allocate(1)


def test_check_finds_lost_and_doubled_pages():
    manager = CacheManager(4, 16, 0.0)
    manager.check([])
    page = manager.pool.allocate(1)
    with pytest.raises(AssertionError, match="no owner"):
        manager.check([])
    manager.pool.give_back(page + page)
    with pytest.raises(AssertionError, match="belongs to the free list and the free list"):
        manager.check([])
