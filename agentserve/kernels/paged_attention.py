"""Attention over a paged KV pool for ragged rows: each row has some query tokens and a context in pages.

`reference` defines the operation. `paged_attention` is the CPU path: rows with one query token and contexts of
like length are gathered and computed together, longer ones (prefill chunks) one at a time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class Block(NamedTuple):
    """Rows computed together: `queries` query tokens each, contexts of at most `pages.shape[1]` pages.

    tokens: `[rows * queries]` int64 index into the step's tokens, or a slice of them.
    pages: `[rows, P]` int64.
    positions: `[rows, queries]` int64, absolute position of each query.
    """

    tokens: torch.Tensor | slice
    pages: torch.Tensor
    positions: torch.Tensor


class Layout(NamedTuple):
    """How one step's rows fall into blocks; made once a step by `plan` and used by every layer."""

    blocks: list[Block]
    page_size: int


def plan(
    query_start: np.ndarray,
    context_lengths: np.ndarray,
    page_table: np.ndarray,
    page_size: int,
    device: torch.device | str,
) -> Layout:
    """Group a step's rows.

    Args:
        query_start: `[R + 1]` int, row r's query tokens are `query_start[r]:query_start[r + 1]`.
        context_lengths: `[R]` int, tokens in row r's context *including* its query tokens.
        page_table: `[R, P]` int, the pages of each context in order, padded with any valid page.
    """
    lengths = np.diff(query_start)
    blocks: list[Block] = []
    single = np.flatnonzero(lengths == 1)
    single = single[np.argsort(context_lengths[single], kind="stable")]
    first = 0
    for end in range(1, len(single) + 1):
        # a block may be half again as long as its shortest row: past that, padding costs more than another call
        if end == len(single) or context_lengths[single[end]] > 1.5 * context_lengths[single[first]] + 64:
            blocks.append(_block(single[first:end], 1, query_start, context_lengths, page_table, page_size, device))
            first = end
    for row in np.flatnonzero(lengths > 1):
        rows = np.array([row])
        blocks.append(_block(rows, int(lengths[row]), query_start, context_lengths, page_table, page_size, device))
    return Layout(blocks, page_size)


def _block(
    rows: np.ndarray,
    queries: int,
    query_start: np.ndarray,
    context_lengths: np.ndarray,
    page_table: np.ndarray,
    page_size: int,
    device: torch.device | str,
) -> Block:
    pages = -(-int(context_lengths[rows].max()) // page_size)
    steps = np.arange(queries)
    tokens: torch.Tensor | slice
    if len(rows) == 1:
        tokens = slice(int(query_start[rows[0]]), int(query_start[rows[0]]) + queries)
    else:
        tokens = torch.from_numpy((query_start[rows][:, None] + steps).reshape(-1)).to(device)
    positions = (context_lengths[rows] - queries)[:, None] + steps
    return Block(
        tokens,
        torch.from_numpy(page_table[rows, :pages].astype(np.int64)).to(device),
        torch.from_numpy(positions.astype(np.int64)).to(device),
    )


def reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_start: np.ndarray,
    context_lengths: np.ndarray,
    page_table: np.ndarray,
    window: int | None,
) -> torch.Tensor:
    """The definition, one query and head at a time in float32.

    Args:
        q: `[T, heads, D]`.
        keys, values: `[pages, page_size, kv_heads, D]`, already holding this step's tokens.

    Returns:
        `[T, heads, D]` in q's dtype.
    """
    page_size, repeat = keys.shape[1], q.shape[1] // keys.shape[2]
    out = torch.empty_like(q)
    for row, context in enumerate(context_lengths):
        begin, end = int(query_start[row]), int(query_start[row + 1])
        pages = torch.from_numpy(page_table[row, : -(-int(context) // page_size)].astype(np.int64))
        k = keys[pages].flatten(0, 1).float()
        v = values[pages].flatten(0, 1).float()
        for token in range(begin, end):
            last = int(context) - (end - token)
            low = 0 if window is None else max(0, last + 1 - window)
            for head in range(q.shape[1]):
                scores = k[low : last + 1, head // repeat] @ q[token, head].float() / math.sqrt(q.shape[2])
                out[token, head] = (scores.softmax(0) @ v[low : last + 1, head // repeat]).to(q.dtype)
    return out


def paged_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layout: Layout, window: int | None
) -> torch.Tensor:
    """`q [T, heads, D]`, `keys`, `values [pages, page_size, kv_heads, D]` → `[T, heads, D]`."""
    kv_heads, head_dim = keys.shape[2], keys.shape[3]
    repeat = q.shape[1] // kv_heads
    out = torch.empty_like(q)
    for block in layout.blocks:
        rows, queries = block.positions.shape
        context = block.pages.shape[1] * layout.page_size
        # index_select copies whole pages, nearly three times as fast as indexing with a tensor
        pages = block.pages.flatten()
        k = keys.index_select(0, pages).view(rows, context, kv_heads, head_dim).transpose(1, 2)
        v = values.index_select(0, pages).view(rows, context, kv_heads, head_dim).transpose(1, 2)
        # heads that share keys become further queries, so keys are never copied a head
        heads = q[block.tokens].view(rows, queries, kv_heads, repeat, head_dim).permute(0, 2, 3, 1, 4)
        cells = torch.arange(context, device=q.device)
        mask = cells <= block.positions[..., None]
        if window is not None:
            mask &= cells > block.positions[..., None] - window
        mask = mask[:, None, None].expand(rows, 1, repeat, queries, context).reshape(rows, 1, -1, context)
        mixed = F.scaled_dot_product_attention(heads.reshape(rows, kv_heads, -1, head_dim), k, v, attn_mask=mask)
        mixed = mixed.view(rows, kv_heads, repeat, queries, head_dim).permute(0, 3, 1, 2, 4)
        out[block.tokens] = mixed.reshape(rows * queries, -1, head_dim)
    return out
