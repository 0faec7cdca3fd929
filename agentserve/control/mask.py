"""Token masks of one step: packed bits, filled while the forward runs, applied before the sampler draws."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from agentserve.core import Request, State


class StepMasks:
    """The masks of a step's samples that are under a grammar.

    The plan is launched before the last step is committed, and a mask needs the last step's token: so the scheduler
    fills the masks after its commit, and the runner waits for them after its forward.

    Args:
        samples: indices into the plan's samples.
        requests: whose samples they are; each has a grammar.
    """

    def __init__(self, samples: tuple[int, ...], requests: tuple[Request, ...], vocab_size: int):
        self.samples = samples
        self._requests = requests
        self._bits = np.full((len(samples), -(-vocab_size // 32)), -1, np.int32)
        self._filled = threading.Event()

    def fill(self) -> None:
        """Set every mask from its grammar's state, and let the runner go on; does nothing the second time."""
        if self._filled.is_set():
            return
        try:
            for bits, request in zip(self._bits, self._requests, strict=True):
                # the row of a request that has ended meanwhile is sampled for nobody, and stays free
                if request.grammar is not None and request.state is not State.FINISHED and not request.grammar.complete:
                    request.grammar.fill(bits)
        finally:
            self._filled.set()

    def wait(self) -> np.ndarray:
        """`[len(samples), ceil(vocab / 32)]` int32, once filled."""
        self._filled.wait()
        return self._bits


def apply(logits: torch.Tensor, bits: np.ndarray, rows: Sequence[int]) -> None:
    """Set the logits `[S, V]` float32 whose bit is 0 to minus infinity, in place; `bits[i]` is row `rows[i]`'s mask."""
    # a table from each byte to its eight addends: several times as fast as filling by a boolean mask
    octets = torch.from_numpy(bits.view(np.uint8)).to(logits.device)
    addends = _addends(logits.device).index_select(0, octets.flatten().int()).view(len(bits), -1)
    addends = addends[:, : logits.shape[1]]
    if len(rows) == len(logits):
        logits += addends
    else:
        logits.index_add_(0, torch.tensor(rows, device=logits.device), addends)


@lru_cache(maxsize=8)
def _addends(device: torch.device) -> torch.Tensor:
    # [256, 8] float32: 0 where the byte's bit is set, minus infinity where it is not
    octets = torch.arange(256, dtype=torch.uint8)[:, None]
    allowed = (octets >> torch.arange(8, dtype=torch.uint8)) & 1
    return torch.zeros(256, 8).masked_fill(allowed == 0, float("-inf")).to(device)
