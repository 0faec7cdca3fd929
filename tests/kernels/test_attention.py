"""Every attention path equals its definition; outputs and pools are poisoned first."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.kernels import packed_attention, paged_attention, rms_norm


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=6),
    singles=st.integers(0, 5),
    page_size=st.sampled_from([1, 4, 16]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    head_dim=st.sampled_from([8, 24]),
    window=st.sampled_from([None, 1, 7, 64]),
    seed=st.integers(0, 2**31),
)
def test_paged_attention_is_its_definition(rows, singles, page_size, heads, head_dim, window, seed):
    rng = np.random.default_rng(seed)
    rows = [(int(rng.integers(0, 200)), 1) for _ in range(singles)] + rows
    queries = np.array([count for _, count in rows])
    context = np.array([before + count for before, count in rows])
    needed = -(-context // page_size)
    pages = rng.permutation(int(needed.sum()) + 3)
    table = np.full((len(rows), needed.max()), pages[-1])
    at = 0
    for i, count in enumerate(needed):
        table[i, :count] = pages[at : at + count]
        at += count
    torch.manual_seed(seed)
    shape = (len(pages), page_size, heads[1], head_dim)
    keys, values = torch.randn(shape), torch.randn(shape)
    q = torch.randn(int(queries.sum()), heads[0], head_dim)
    start = np.concatenate(([0], np.cumsum(queries)))
    layout = paged_attention.plan(start, context, table, page_size, "cpu")
    got = paged_attention.paged_attention(q, keys, values, layout, window)
    want = paged_attention.reference(q, keys, values, start, context, table, window)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    heads=st.sampled_from([(2, 1), (4, 4), (6, 2)]),
    window=st.sampled_from([None, 1, 9]),
    seed=st.integers(0, 2**31),
)
def test_packed_attention_equals_paged(lengths, heads, window, seed):
    torch.manual_seed(seed)
    total = sum(lengths)
    q, k, v = torch.randn(total, heads[0], 8), torch.randn(total, heads[1], 8), torch.randn(total, heads[1], 8)
    groups = packed_attention.group_by_length(lengths, "cpu")
    got = packed_attention.packed_attention(q, k, v, groups, window)
    start = np.concatenate(([0], np.cumsum(lengths)))
    table = np.zeros((len(lengths), max(lengths)), np.int64)
    for i, length in enumerate(lengths):
        table[i, :length] = np.arange(start[i], start[i + 1])
    want = paged_attention.reference(q, k[:, None], v[:, None], start, np.array(lengths), table, window)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_packed_attention_passes_gradients_to_each_sequence_alone():
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, 2, 8, requires_grad=True) for _ in range(3))
    groups = packed_attention.group_by_length([4, 5], "cpu")
    packed_attention.packed_attention(q, k, v, groups, None)[:4].sum().backward()
    assert k.grad is not None
    assert v.grad is not None
    assert k.grad[:4].abs().sum() > 0
    assert k.grad[4:].abs().sum() == 0
    assert v.grad[4:].abs().sum() == 0


def test_rms_norm_is_its_definition():
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        x, weight = torch.randn(5, 48).to(dtype), torch.randn(48).to(dtype)
        want = rms_norm.reference(x, weight, 1e-6)
        torch.testing.assert_close(rms_norm.rms_norm(x, weight, 1e-6), want, atol=tolerance, rtol=tolerance)
