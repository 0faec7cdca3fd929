"""The sampler against a plain per-row definition, and its promises about noise."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.core import SampleRow, SamplingParams
from agentserve.engine.sampler import sample
from agentserve.scheduler.plan import uniform

VOCAB = 40


def row(params: SamplingParams, index: int = 0, position: int = 6, prompt_len: int = 3, noise: float = 0.5, ban=()):
    return SampleRow(
        request=SimpleNamespace(), row=index, token=index, position=position, prompt_len=prompt_len, params=params,
        uniform=noise, ban=ban,
    )  # fmt: skip


def definition(logits: list[float], params: SamplingParams, seen: list[int], prompt_len: int, noise: float, ban):
    """One row, one rule after the other, in float64."""
    logits = [float(x) for x in logits]
    for token in set(seen):
        if params.repetition_penalty != 1:
            logits[token] = logits[token] / params.repetition_penalty if logits[token] > 0 else (
                logits[token] * params.repetition_penalty
            )  # fmt: skip
    for token in seen[prompt_len:]:
        logits[token] -= params.frequency_penalty
    for token in set(seen[prompt_len:]):
        logits[token] -= params.presence_penalty
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in ban:
        logits[token] = -math.inf
    if params.temperature == 0:
        return [1.0 if i == int(np.argmax(logits)) else 0.0 for i in range(VOCAB)], int(np.argmax(logits))
    scaled = np.array(logits) / params.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    largest = p.max()
    order = np.argsort(-p, kind="stable")
    kept = np.zeros(VOCAB)
    head = order[: params.top_k or VOCAB]
    total, before = p[head].sum(), 0.0
    for token in head:
        if before < params.top_p * total:
            kept[token] = p[token]
        before += p[token]
    kept[p < params.min_p * largest] = 0
    cumulative = np.cumsum(kept)
    return kept / kept.sum(), int(np.searchsorted(cumulative, noise * cumulative[-1], side="right"))


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 20, VOCAB + 5]),
    top_p=st.sampled_from([0.1, 0.6, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-5.0, 2.0]), max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(params_strategy, st.floats(0, 1, exclude_max=True)), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_sampler_is_its_definition_and_rows_are_independent(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), VOCAB, generator=generator) * 2
    table = torch.randint(0, VOCAB, (len(rows), 8), generator=generator)
    bans = [tuple({int(x) for x in table[i, 6:]}) for i in range(len(rows))]
    samples = tuple(row(p, i, noise=u, ban=bans[i]) for i, (p, u) in enumerate(rows))
    got = sample(logits.clone(), samples, table)
    for i, (params, noise) in enumerate(rows):
        probabilities, want = definition(logits[i].tolist(), params, table[i, :6].tolist(), 3, noise, bans[i])
        token = int(got.token_ids[i])
        cumulative = np.cumsum(probabilities)
        # where the noise falls on a boundary between two tokens to within float32, either is right
        near_boundary = np.abs(cumulative - noise).min() < 1e-5
        assert token == want or (near_boundary and params.temperature > 0)
        alone = sample(logits[i : i + 1].clone(), (row(params, i, noise=noise, ban=bans[i]),), table)
        assert int(alone.token_ids[0]) == token


def test_logprobs_are_of_the_penalized_distribution_before_temperature():
    torch.manual_seed(0)
    logits = torch.randn(2, VOCAB)
    rows = (row(SamplingParams(temperature=2.0, top_k=1, logprobs=3), 0), row(SamplingParams(logprobs=0), 1))
    got = sample(logits.clone(), rows, torch.zeros(2, 8, dtype=torch.int64))
    table = logits.log_softmax(-1)
    for i in range(2):
        assert got.logprobs[i] == pytest.approx(float(table[i, got.token_ids[i]]), abs=1e-6)
    values, ids = table[0].topk(3)
    assert [pair[0] for pair in got.top[0]] == ids.tolist()
    assert [pair[1] for pair in got.top[0]] == pytest.approx(values.tolist())
    assert got.top[1] == []


def test_noise_depends_on_seed_and_position_alone_and_is_uniform():
    draws = np.array([uniform(seed, position) for seed in range(60) for position in range(60)])
    assert ((draws >= 0) & (draws < 1)).all()
    assert len(set(draws.tolist())) == len(draws)
    counts, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert counts.min() > 300
    assert uniform(5, 9) == uniform(5, 9)
    assert uniform(5, 9) != uniform(9, 5)


def test_sampled_frequencies_follow_the_distribution():
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]]).repeat(4000, 1)
    rows = tuple(row(SamplingParams(), 0, noise=uniform(11, i)) for i in range(4000))
    got = sample(logits, rows, torch.zeros(1, 8, dtype=torch.int64)).token_ids
    frequency = torch.bincount(got, minlength=4) / 4000
    torch.testing.assert_close(frequency, torch.tensor([1.0, 0.0, 2.0, -1.0]).softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1, "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("top_p", 0, "top_p"),
        ("top_k", -2, "top_k"),
        ("min_p", 1.5, "min_p"),
        ("max_tokens", 0, "max_tokens"),
        ("min_tokens", 999, "min_tokens"),
        ("presence_penalty", 3, "presence_penalty"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("seed", -1, "seed"),
        ("logprobs", 21, "logprobs"),
        ("stop", ("",), "stop"),
    ],
)
def test_bad_parameters_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{field: value})
