"""Turning rows into arrays: a `StepPlan` is built here and nowhere else, and never changed afterwards."""

from __future__ import annotations

import numpy as np

from agentserve.control.mask import StepMasks
from agentserve.core import Request, SampleRow, StepPlan

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """The noise of the token at an absolute position: a uniform in [0, 1) that depends on nothing else.

    Two rounds of SplitMix64's finalizer (Steele, Lea and Flood, 2014) over seed and position; 40 bits are used, so that
    `uniform · total` stays below `total` in float64.
    """
    state = (mix(seed & _MASK) ^ (position * 0x9E3779B97F4A7C15)) & _MASK
    return (mix(state) >> 24) / (1 << 40)


def mix(state: int) -> int:
    """SplitMix64's step and finalizer: 64 well-mixed bits for any integer."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


class PlanBuilder:
    """Collects the ragged rows of one step."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.requests: list[Request] = []
        self.lengths: list[int] = []
        self.starts: list[int] = []
        self.samples: list[SampleRow] = []
        self.tokens = 0

    def add(self, request: Request, count: int) -> None:
        """Compute the next `count` known tokens of a request that has pages for them, and sample after the last known.

        A chunk that stops short of the last known token samples nothing.
        """
        self.requests.append(request)
        self.lengths.append(count)
        self.starts.append(request.computed_len)
        self.tokens += count
        request.computed_len += count
        if request.computed_len == request.known_len:
            position, params = request.computed_len, request.params
            early = position - request.prompt_len < params.min_tokens
            self.samples.append(
                SampleRow(
                    request=request,
                    row=request.row,
                    token=self.tokens - 1,
                    position=position,
                    prompt_len=request.prompt_len,
                    params=params,
                    uniform=uniform(request.seed, position) if params.temperature > 0 else 0.0,
                    ban=tuple(request.stop_ids) if early else (),
                )
            )
            request.in_flight += 1

    def build(self, number: int, vocab_size: int) -> StepPlan:
        """The step, with the table writes its rows need first."""
        lengths, starts = np.array(self.lengths), np.array(self.starts)
        rows = np.array([request.row for request in self.requests])
        query_start = np.concatenate(([0], np.cumsum(lengths)))
        token_rows = np.repeat(rows, lengths)
        positions = np.arange(self.tokens) - np.repeat(query_start[:-1] - starts, lengths)
        id_writes, page_writes, slots = [], [], []
        for request, start, count in zip(self.requests, self.starts, self.lengths, strict=True):
            if request.table_ids < request.total_len:
                # ids sampled on the device are there already; only prompts, and outputs after a retraction, are not
                new = request.ids[request.table_ids : request.total_len].copy()
                id_writes.append((request.row, request.table_ids, new))
            request.table_ids = max(request.table_ids, request.known_len)
            if request.table_pages < len(request.pages):
                new = np.array(request.pages[request.table_pages :], np.int64)
                page_writes.append((request.row, request.table_pages, new))
                request.table_pages = len(request.pages)
            slots.append(self._slots(request.pages, start, count))
        return StepPlan(
            number=number,
            rows=rows,
            query_start=query_start,
            positions=positions,
            token_rows=token_rows,
            write_slots=np.concatenate(slots),
            context_lengths=starts + lengths,
            id_writes=tuple(id_writes),
            page_writes=tuple(page_writes),
            samples=tuple(self.samples),
            masks=self._masks(vocab_size),
        )

    def _masks(self, vocab_size: int) -> StepMasks | None:
        masked = tuple(i for i, sample in enumerate(self.samples) if sample.request.grammar is not None)
        if not masked:
            return None
        return StepMasks(masked, tuple(self.samples[i].request for i in masked), vocab_size)

    def _slots(self, pages: list[int], start: int, count: int) -> np.ndarray:
        size = self.page_size
        if count == 1:
            return np.array([pages[start // size] * size + start % size])
        positions = np.arange(start, start + count)
        first = start // size
        touched = np.array(pages[first : (start + count - 1) // size + 1])
        return touched[positions // size - first] * size + positions % size
