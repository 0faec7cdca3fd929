"""Causal attention over packed sequences, differentiable: what a trainer runs.

Sequences of like length are padded into one batch; causality alone keeps the padding, which stands at the end,
out of every real token's sight, so no mask is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Group(NamedTuple):
    """Sequences padded together: `gather [S, L]` token index of each cell, `real [S, L]` which cells are tokens."""

    gather: torch.Tensor
    real: torch.Tensor


def group_by_length(lengths: list[int], device: torch.device | str, slack: float = 1.25) -> list[Group]:
    """Split packed sequences into groups whose longest member is at most `slack` times the shortest."""
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        at += length
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[i] <= slack * lengths[groups[-1][0]] + 8:
            groups[-1].append(i)
        else:
            groups.append([i])
    made = []
    for members in groups:
        longest = lengths[members[-1]]
        cells = torch.arange(longest, device=device)[None, :]
        start = torch.tensor([starts[i] for i in members], device=device)[:, None]
        length = torch.tensor([lengths[i] for i in members], device=device)[:, None]
        made.append(Group(start + torch.minimum(cells, length - 1), cells < length))
    return made


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: list[Group], window: int | None
) -> torch.Tensor:
    """`q [T, heads, D]`, `k`, `v [T, kv_heads, D]` → `[T, heads, D]`, causal inside each sequence.

    `window` limits each token to itself and the `window - 1` tokens before it.
    """
    repeat = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for group in groups:
        rows_q = q[group.gather].transpose(1, 2)
        rows_k = k[group.gather].transpose(1, 2).repeat_interleave(repeat, dim=1)
        rows_v = v[group.gather].transpose(1, 2).repeat_interleave(repeat, dim=1)
        length = group.gather.shape[1]
        if window is None or window >= length:
            rows = F.scaled_dot_product_attention(rows_q, rows_k, rows_v, is_causal=True)
        else:
            distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
            mask = (distance >= 0) & (distance < window)
            rows = F.scaled_dot_product_attention(rows_q, rows_k, rows_v, attn_mask=mask)
        out = out.index_put((group.gather[group.real],), rows.transpose(1, 2)[group.real])
    return out
