"""Attention as the decoder sees it: `step.attend(q, k, v, layer, window)`.

A `PackedStep` computes whole sequences without a cache and is differentiable: it trains. A `PagedStep` writes
keys and values into the KV pool and reads each row's context from its pages: it serves. Which pages a row has,
and why, is decided elsewhere.
"""

from __future__ import annotations

from typing import Protocol

import torch

from agentserve.kernels import packed_attention, paged_attention


class Step(Protocol):
    """What a forward pass needs beside token ids."""

    @property
    def positions(self) -> torch.Tensor:
        """Absolute position of each of the T tokens, `[T]` int64."""
        ...

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, window: int | None) -> torch.Tensor:
        """`q [T, heads, D]`, `k` and `v [T, kv_heads, D]`, rotated → `[T, heads, D]`."""
        ...


class PackedStep:
    """Sequences laid end to end, each causal within itself; no cache, autograd works through it."""

    def __init__(self, lengths: list[int], positions: torch.Tensor):
        self.lengths = lengths
        self.positions = positions
        self._groups = packed_attention.group_by_length(lengths, positions.device)

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device | str = "cpu") -> PackedStep:
        """Sequences of these lengths, each starting at position 0."""
        return cls(lengths, torch.cat([torch.arange(n, device=device) for n in lengths]))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, window: int | None) -> torch.Tensor:
        return packed_attention.packed_attention(q, k, v, self._groups, window)


class PagedStep:
    """Ragged rows over a paged KV pool.

    Args:
        keys, values: `[layers, pages, page_size, kv_heads, D]`, the pool.
        positions: `[T]` int64.
        write_slots: `[T]` int64, `page * page_size + offset` where each token's key and value go.
        layout: what `paged_attention.plan` made of the rows' pages and lengths.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        write_slots: torch.Tensor,
        layout: paged_attention.Layout,
    ):
        self.keys = keys
        self.values = values
        self.positions = positions
        self.write_slots = write_slots
        self.layout = layout

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, window: int | None) -> torch.Tensor:
        keys, values = self.keys[layer], self.values[layer]
        keys.flatten(0, 1).index_copy_(0, self.write_slots, k)
        values.flatten(0, 1).index_copy_(0, self.write_slots, v)
        return paged_attention.paged_attention(q, keys, values, self.layout, window)
