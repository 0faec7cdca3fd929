"""Promise 1, the engine against itself: tokens do not depend on how the work was arranged."""

import numpy as np
import pytest

from agentserve import LLM, SamplingParams

DEFAULT = {"dtype": "float32", "page_size": 16, "kv_tokens": 16384, "max_batch_tokens": 512, "overlap": True}
ARRANGEMENTS = {
    "overlap-off": {"overlap": False},
    "page-1": {"page_size": 1},
    "page-64": {"page_size": 64},
    "chunk-32": {"max_batch_tokens": 32},
    "few-rows": {"max_running": 3},
    "retraction": {"kv_tokens": 1200, "max_batch_tokens": 64},
    "retraction-overlap-off-page-1": {"kv_tokens": 1100, "overlap": False, "page_size": 1},
}


def workload() -> tuple[list[list[int]], list[SamplingParams]]:
    """31 prompts, many with a shared prefix; greedy, seeded and penalized rows side by side."""
    rng = np.random.default_rng(3)
    shared = rng.integers(0, 300, 200).tolist()
    prompts = [rng.integers(0, 300, n).tolist() for n in (1, 16, 17, 130, 300)]
    prompts += [shared[: 40 + 6 * i] + rng.integers(0, 300, 1 + i % 5).tolist() for i in range(26)]
    params = []
    for i in range(len(prompts)):
        base = {"max_tokens": 24 + i % 17, "seed": i, "ignore_eos": i % 2 == 0, "logprobs": 2}
        match i % 4:
            case 0:
                params.append(SamplingParams(temperature=0.0, **base))
            case 1:
                params.append(SamplingParams(temperature=1.0, **base))
            case 2:
                params.append(SamplingParams(temperature=0.8, top_k=40, top_p=0.9, **base))
            case _:
                params.append(SamplingParams(temperature=1.2, min_p=0.02, presence_penalty=0.6, **base))
    params[3] = SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.4, max_tokens=40)
    return prompts, params


@pytest.fixture(scope="module")
def directory(checkpoint):
    return checkpoint("Qwen3", head_dim=32)[1]


@pytest.fixture(scope="module")
def expected(directory):
    """Each prompt alone, cold: the plainest arrangement there is."""
    prompts, params = workload()
    tokens = []
    with LLM(directory, **DEFAULT | {"overlap": False}) as llm:
        for prompt, each in zip(prompts, params, strict=True):
            llm.flush_cache()
            completion = llm.generate([prompt], each)[0]
            assert completion.cached_tokens == 0
            tokens.append(completion.token_ids)
    return tokens


@pytest.mark.parametrize("name", ["default", *ARRANGEMENTS])
def test_arrangement_does_not_change_tokens(name, directory, expected):
    prompts, params = workload()
    with LLM(directory, **DEFAULT | ARRANGEMENTS.get(name, {})) as llm:
        cold = llm.generate(prompts, params)
        warm = llm.generate(prompts, params)
        llm.scheduler.check()
        stats = llm.stats()
    assert [c.token_ids for c in cold] == expected
    assert [c.token_ids for c in warm] == expected
    if "retraction" in name:
        assert stats.retractions > 0
    else:
        long = [c for prompt, c in zip(prompts, warm, strict=True) if len(prompt) > 64]
        assert all(c.cached_tokens > 0 for c in long)


def test_overlap_leaves_the_same_cache(directory):
    prompts, params = workload()
    cached = []
    for overlap in (True, False):
        with LLM(directory, **DEFAULT | {"overlap": overlap}) as llm:
            for prompt, each in zip(prompts, params, strict=True):
                llm.generate([prompt], each)
            cached.append((llm.stats().pages_cached, [c.cached_tokens for c in llm.generate(prompts, params)]))
    assert cached[0] == cached[1]


def test_a_group_that_shares_a_prompt_computes_it_once(directory):
    prompt = np.random.default_rng(0).integers(0, 300, 400).tolist()
    with LLM(directory, **DEFAULT | {"max_batch_tokens": 256}) as llm:
        params = [SamplingParams(max_tokens=4, seed=i, ignore_eos=True) for i in range(8)]
        completions = llm.generate([prompt] * 8, params)
        computed = llm.stats().computed_tokens
    assert sorted(c.cached_tokens for c in completions) == [0] + [384] * 7
    assert computed <= 400 + 7 * 16 + 8 * 4
