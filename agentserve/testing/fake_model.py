"""A model whose next token is a hash of its whole context, read *through the pages*.

Its keys and values are the token ids themselves, so a wrong page, stale page, wrong position or lost write changes the
text, and `oracle` says what the text should have been. It implements the scheduler's `Runner` and needs no torch.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from agentserve.core import StepPlan, StepResult
from agentserve.scheduler.plan import uniform

POISON = -1


def next_token(context: np.ndarray, noise: float, vocab_size: int) -> int:
    """The fake model's choice among `vocab_size` after `context` (`[n]` ids), with a row's noise (0.0 when greedy)."""
    return zlib.crc32(struct.pack("<d", noise), zlib.crc32(context.astype(np.int32).tobytes())) % vocab_size


class EveryNth:
    """A grammar for tests: the reply's token number i is one whose id leaves the remainder i modulo `modulus`."""

    def __init__(self, modulus: int, vocab_size: int):
        self.modulus = modulus
        self.vocab_size = vocab_size
        self.taken = 0

    @property
    def complete(self) -> bool:
        """Never: these replies end by length."""
        return False

    def allowed(self) -> np.ndarray:
        """The ids that may come next."""
        return np.arange(self.taken % self.modulus, self.vocab_size, self.modulus)

    def fill(self, mask: np.ndarray) -> None:
        """As `core.Grammar`."""
        bits = np.zeros(len(mask) * 32, np.uint8)
        bits[self.allowed()] = 1
        mask[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def advance(self, token: int) -> None:
        """As `core.Grammar`; a token that was not allowed is an AssertionError."""
        assert token in self.allowed(), f"token {token} was sampled against the mask"
        self.taken += 1


def oracle(
    prompt: list[int],
    count: int,
    vocab_size: int,
    *,
    seed: int = 0,
    greedy: bool = True,
    stop_ids: tuple[int, ...] = (),
    grammar: EveryNth | None = None,
) -> list[int]:
    """What a correct engine says after `prompt`: `count` tokens, or up to and with the first stop id."""
    context = np.empty(len(prompt) + count, np.int32)
    context[: len(prompt)] = prompt
    for at in range(len(prompt), len(context)):
        allowed = grammar.allowed() if grammar is not None else np.arange(vocab_size)
        token = int(allowed[next_token(context[:at], 0.0 if greedy else uniform(seed, at), len(allowed))])
        context[at] = token
        if grammar is not None:
            grammar.advance(token)
        if token in stop_ids:
            return context[len(prompt) : at + 1].tolist()
    return context[len(prompt) :].tolist()


class _Launched:
    # a step that runs as late as the device's order allows: when its result, or a later step's, is asked for
    def __init__(self, runner: FakeRunner, plan: StepPlan):
        self.runner = runner
        self.plan = plan
        self.done: StepResult | None = None

    def result(self) -> StepResult:
        self.runner.run_until(self)
        assert self.done is not None
        return self.done


class FakeRunner:
    """Runs plans on fake keys and values.

    Raises AssertionError inside a step that reads a slot nobody wrote, writes a slot twice, or uses keys and values of
    weights older than the request's.
    """

    def __init__(self, *, num_pages: int, page_size: int, max_running: int, max_len: int, vocab_size: int):
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.weight_version = 0
        self.slots = np.full((num_pages + 1) * page_size, POISON, np.int64)
        self.slot_versions = np.zeros((num_pages + 1) * page_size, np.int64)
        self.token_table = np.full((max_running, max_len), POISON, np.int64)
        self.page_table = np.full((max_running, -(-max_len // page_size)), num_pages, np.int64)
        self._pending: list[_Launched] = []

    def launch(self, plan: StepPlan) -> _Launched:
        """Queue a step; it runs later, and always before the ones launched after it."""
        launched = _Launched(self, plan)
        self._pending.append(launched)
        return launched

    def update_weights(self, version: int, tensors: Mapping[str, Any]) -> None:
        """Run what was launched, then carry the new version."""
        if self._pending:
            self.run_until(self._pending[-1])
        self.weight_version = version

    def poison(self, pages: list[int]) -> None:
        """Make every later read of these pages, without a write before it, an error."""
        for page in pages:
            self.slots[page * self.page_size : (page + 1) * self.page_size] = POISON

    def run_until(self, launched: _Launched) -> None:
        """Run launched steps in order, up to and with this one."""
        while launched.done is None:
            first = self._pending.pop(0)
            first.done = self._run(first.plan)

    def _run(self, plan: StepPlan) -> StepResult:
        for row, at, ids in plan.id_writes:
            self.token_table[row, at : at + len(ids)] = ids
        for row, at, pages in plan.page_writes:
            self.page_table[row, at : at + len(pages)] = pages
        ids = self.token_table[plan.token_rows, plan.positions]
        assert (ids != POISON).all(), "a row computes a token that nobody wrote into the table"
        assert len(np.unique(plan.write_slots)) == len(plan.write_slots), "two tokens of a step share a slot"
        self.slots[plan.write_slots] = ids
        self.slot_versions[plan.write_slots] = self.weight_version
        tokens = []
        masks = dict(zip(plan.masks.samples, plan.masks.wait(), strict=True)) if plan.masks is not None else {}
        for index, sample in enumerate(plan.samples):
            context, versions = self._read(sample.row, sample.position)
            assert (versions >= sample.request.weight_version).all(), "keys and values of older weights were matched"
            allowed = np.arange(self.vocab_size)
            if index in masks:
                bits = np.unpackbits(masks[index].view(np.uint8), bitorder="little")[: self.vocab_size]
                allowed = np.flatnonzero(bits)
            token = int(allowed[next_token(context, sample.uniform, len(allowed))])
            self.token_table[sample.row, sample.position] = token
            tokens.append(token)
        return StepResult(tokens, [None] * len(tokens), [[] for _ in tokens], self.weight_version, 0.0)

    def _read(self, row: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        pages = self.page_table[row, : -(-length // self.page_size)]
        slots = (pages[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1)[:length]
        context = self.slots[slots]
        assert (context != POISON).all(), "a row reads a slot that was freed or never written"
        return context, self.slot_versions[slots]
