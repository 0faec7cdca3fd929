"""The page allocator: which pages are free, and which wait for the last step that may read them.

It hands out page numbers only; the tensors belong to the runner.
"""

from __future__ import annotations

from collections import deque


class PagePool:
    """Page numbers `0 … num_pages - 1`; page `num_pages` is the runner's dummy page and never handed out."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._retiring: deque[tuple[int, list[int]]] = deque()
        self.retiring = 0

    @property
    def free(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages; the caller has checked `free`."""
        if count > len(self._free):
            raise RuntimeError(f"asked for {count} pages of {len(self._free)} free ones: check `free` first")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Pages that no launched step can touch are free at once."""
        self._free.extend(pages)

    def retire(self, pages: list[int], last_step: int) -> None:
        """Pages are free once step `last_step`, the last one launched, has completed."""
        if pages:
            self._retiring.append((last_step, pages))
            self.retiring += len(pages)

    def complete(self, step: int) -> None:
        """Step `step` and all before it have completed."""
        while self._retiring and self._retiring[0][0] <= step:
            pages = self._retiring.popleft()[1]
            self.retiring -= len(pages)
            self._free.extend(pages)

    def snapshot(self) -> tuple[list[int], list[int]]:
        """The free and the retiring pages, for accounting checks."""
        return list(self._free), [page for _, pages in self._retiring for page in pages]
