"""The prefix tree: token runs, the pages that hold their keys and values, and who is using them.

Nodes own whole pages. Callers get handles, locked in the same call that matched them, and never see nodes. The tree
decides what to evict; whose pages they become afterwards is the manager's business.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from agentserve.core import Handle


@dataclass(eq=False, slots=True)
class Node:
    """An edge of the tree and what is below it. `locks` counts the handles at or below this node."""

    key: np.ndarray
    pages: list[int]
    parent: Node | None
    children: dict[bytes, Node] = field(default_factory=dict)
    locks: int = 0
    used: int = 0
    queued: bool = False


class RadixCache:
    """A radix tree per namespace over runs of token ids, page by page (Zheng et al., 2024, SGLang).

    Two different continuations of one prefix share the prefix's pages; a page is compared as a whole, so a prefix
    that ends inside a page matches up to the page before.
    """

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.pages = 0
        self.evictable = 0
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self._heap: list[tuple[int, int, Node]] = []
        self._pushed = 0

    def match(self, namespace: str, ids: np.ndarray) -> tuple[Handle, list[int]]:
        """The longest cached whole-page prefix of `ids`, locked, and its pages.

        A run shorter than a page matches nothing: the handle then has length 0 and is locked all the same.
        """
        node, pages, at = self._walk(namespace, ids)
        self._lock(node)
        return Handle(node, at), pages

    def extend(
        self, handle: Handle, namespace: str, ids: np.ndarray, pages: list[int]
    ) -> tuple[Handle, list[int], list[int]]:
        """Insert `ids`, a whole number of pages whose keys and values are in `pages`, behind a held handle.

        Who owns `pages` before and after, with `known` = what the tree holds of `ids` by now (someone else may
        have inserted the same run first):

            [0, handle.length)      the tree before and after
            [handle.length, known)  the caller before; after, these are `duplicates` for the caller to free
            [known, len(ids))       the caller before, the tree after

        Returns:
            (new handle, the tree's pages for all of `ids`, duplicates). The old handle is unlocked.
        """
        node, tree_pages, known = self._walk(namespace, ids)
        size = self.page_size
        duplicates = pages[handle.length // size : known // size]
        if known < len(ids):
            leaf = Node(ids[known:].copy(), pages[known // size : len(ids) // size], node, used=self._clock)
            node.children[self._first_page(leaf.key)] = leaf
            self.pages += len(leaf.pages)
            self.evictable += len(leaf.pages)
            tree_pages = tree_pages + leaf.pages
            node = leaf
        self._lock(node)
        self.unlock(handle)
        return Handle(node, len(ids)), tree_pages, duplicates

    def unlock(self, handle: Handle) -> None:
        """Give a handle back; its nodes can be evicted once nobody else holds them."""
        node = cast(Node | None, handle.node)
        if node is not None and node.locks == 0:
            raise RuntimeError("handle was given back twice")
        while node is not None:
            node.locks -= 1
            if node.locks == 0:
                self.evictable += len(node.pages)
                self._offer(node)
            node = node.parent

    def evict(self, count: int) -> list[int]:
        """Drop least recently used unlocked leaves until `count` pages are freed or none is left; those pages."""
        freed: list[int] = []
        while len(freed) < count and self._heap:
            used, _, node = heapq.heappop(self._heap)
            node.queued = False
            if used != node.used:
                self._offer(node)  # touched since it was queued: its turn comes later
            elif self._is_evictable_leaf(node):
                freed += self._remove(node)
        return freed

    def flush(self) -> list[int]:
        """Drop everything that is not locked; the freed pages."""
        freed: list[int] = []
        for namespace, root in list(self._roots.items()):
            # children before parents, so that a node whose descendants all go is a leaf when its turn comes
            for node in reversed(list(self._nodes(root))):
                if node is not root and self._is_evictable_leaf(node):
                    freed += self._remove(node)
            if not root.children and root.locks == 0:
                del self._roots[namespace]
        return freed

    def owned(self) -> Iterator[tuple[list[int], int]]:
        """(pages, locks) of every node, for accounting checks."""
        for root in self._roots.values():
            for node in self._nodes(root):
                yield node.pages, node.locks

    def check(self) -> None:
        """Raise AssertionError where sizes, locks or links do not add up."""
        pages = evictable = 0
        for root in self._roots.values():
            for node in self._nodes(root):
                assert len(node.key) == len(node.pages) * self.page_size, "a node's key and pages differ in length"
                assert node.locks >= sum(child.locks for child in node.children.values()), "a child outlocks its parent"
                for first, child in node.children.items():
                    assert child.parent is node, "a child does not know its parent"
                    assert first == self._first_page(child.key), "a child stands under another page"
                if node is not root:
                    assert node.locks or node.children or node.queued, "an evictable leaf is not queued"
                pages += len(node.pages)
                evictable += len(node.pages) if node.locks == 0 else 0
        assert pages == self.pages, f"tree says {self.pages} pages, nodes hold {pages}"
        assert evictable == self.evictable, f"tree says {self.evictable} evictable pages, nodes say {evictable}"

    def _walk(self, namespace: str, ids: np.ndarray) -> tuple[Node, list[int], int]:
        # follow `ids` as far as the tree knows whole pages of it, splitting the last edge where they part
        self._clock += 1
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = Node(np.empty(0, np.int32), [], None)
        node.used = self._clock
        pages: list[int] = []
        at, end = 0, len(ids) - len(ids) % self.page_size
        while at < end:
            child = node.children.get(ids[at : at + self.page_size].tobytes())
            if child is None:
                break
            common = self._common(child.key, ids[at:end])
            if common < len(child.key):
                child = self._split(child, common)
            child.used = self._clock
            pages += child.pages
            at += common
            node = child
        return node, pages, at

    def _common(self, key: np.ndarray, ids: np.ndarray) -> int:
        length = min(len(key), len(ids))
        differing = np.flatnonzero(key[:length] != ids[:length])
        if len(differing):
            length = int(differing[0])
        return length - length % self.page_size

    def _split(self, node: Node, length: int) -> Node:
        # the new upper half takes the place in the parent; the old object stays the lower half, so handles to it,
        # its children and its place in the eviction queue remain true
        count = length // self.page_size
        parent = node.parent
        assert parent is not None
        upper = Node(node.key[:length], node.pages[:count], parent, locks=node.locks, used=node.used)
        parent.children[self._first_page(upper.key)] = upper
        node.key, node.pages, node.parent = node.key[length:], node.pages[count:], upper
        upper.children[self._first_page(node.key)] = node
        return upper

    def _lock(self, node: Node) -> None:
        at: Node | None = node
        while at is not None:
            if at.locks == 0:
                self.evictable -= len(at.pages)
            at.locks += 1
            at = at.parent

    def _remove(self, node: Node) -> list[int]:
        parent = node.parent
        assert parent is not None
        del parent.children[self._first_page(node.key)]
        node.parent = None
        self.pages -= len(node.pages)
        self.evictable -= len(node.pages)
        self._offer(parent)
        return node.pages

    def _is_evictable_leaf(self, node: Node) -> bool:
        return node.locks == 0 and not node.children and node.parent is not None

    def _offer(self, node: Node) -> None:
        # every evictable leaf has exactly one entry in the heap; entries gone stale are dropped when they surface
        if self._is_evictable_leaf(node) and not node.queued:
            node.queued = True
            self._pushed += 1
            heapq.heappush(self._heap, (node.used, self._pushed, node))

    def _first_page(self, key: np.ndarray) -> bytes:
        return key[: self.page_size].tobytes()

    def _nodes(self, root: Node) -> Iterator[Node]:
        stack = [root]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())
