"""Promise 1 against transformers: the same greedy tokens and the same logits for every supported family."""

import numpy as np
import pytest
import torch

from agentserve import LLM, SamplingParams
from agentserve.models import PackedStep, load_model
from tests.conftest import LINEAR, LLAMA3, YARN, reference_greedy

LENGTHS = (1, 2, 15, 16, 17, 64, 150, 333, 700)
MODELS = {
    "llama": ("Llama", {"num_key_value_heads": 4, "head_dim": 16}),
    "llama-rope3": ("Llama", {"rope_parameters": LLAMA3 | {"rope_theta": 10000.0}, "num_key_value_heads": 1}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_scaling": LINEAR}),
    "mistral-window": ("Mistral", {"sliding_window": 48, "head_dim": 24}),
    "mistral-full": ("Mistral", {"sliding_window": None, "num_attention_heads": 8, "num_key_value_heads": 2}),
    "qwen2-tied-yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_scaling": YARN}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1, "num_key_value_heads": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True, "num_attention_heads": 6}),
    "qwen3-biases-linear": ("Qwen3", {"head_dim": 16, "attention_bias": True, "rope_scaling": LINEAR}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 16, "rope_scaling": YARN | {"attention_factor": 1.3, "truncate": False}}),
}


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 300, n).tolist() for n in LENGTHS]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_transformers(name, checkpoint):
    family, settings = MODELS[name]
    reference, directory = checkpoint(family, **settings)
    with LLM(directory, dtype="float32", kv_tokens=8192, max_batch_tokens=200) as llm:
        got = llm.generate(prompts(), SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))
    for prompt, completion in zip(prompts(), got, strict=True):
        assert completion.token_ids == reference_greedy(reference, prompt, 64), f"prompt of {len(prompt)} tokens"


@pytest.mark.parametrize("name", MODELS)
def test_prefill_logits_agree(name, checkpoint):
    family, settings = MODELS[name]
    reference, directory = checkpoint(family, **settings)
    model = load_model(directory)
    batch = prompts()
    with torch.no_grad():
        ids = torch.cat([torch.tensor(prompt) for prompt in batch])
        logits = model.logits(model(ids, PackedStep.from_lengths(list(LENGTHS)))).split(list(LENGTHS))
        for prompt, got in zip(batch, logits, strict=True):
            want = reference(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_bfloat16_stays_close_to_float32(checkpoint):
    _, directory = checkpoint("Qwen3", head_dim=32, tie_word_embeddings=True, num_attention_heads=6)
    prompt = prompts()[6]
    wanted = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20, ignore_eos=True)
    tops = []
    for dtype in ("float32", "bfloat16"):
        with LLM(directory, dtype=dtype, kv_tokens=1024) as llm:
            tops.append(dict(llm.generate([prompt], wanted)[0].top_logprobs[0]))
    common = tops[0].keys() & tops[1].keys()
    assert len(common) >= 15
    assert max(abs(tops[0][i] - tops[1][i]) for i in common) < 0.2


def test_sharded_and_single_checkpoints_are_the_same(checkpoint):
    _, single = checkpoint("Llama")
    _, sharded = checkpoint("Llama", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, other = load_model(single).checkpoint_views(), load_model(sharded).checkpoint_views()
    assert all(torch.equal(one[name], other[name]) for name in one)
