"""The in-process engine as its user meets it: results, stops, errors, weights."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from agentserve import LLM, SamplingParams


@pytest.fixture(scope="module")
def directory(checkpoint):
    return checkpoint("Qwen3", head_dim=32)[1]


@pytest.fixture
def llm(directory):
    with LLM(directory, dtype="float32", kv_tokens=2048) as made:
        yield made


def greedy(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 20, "ignore_eos": True} | fields)


def test_the_readme_example(directory):
    llm = LLM(str(directory), device="cpu", dtype="float32", page_size=16, kv_tokens=8192, max_batch_tokens=512,
              max_running=64, overlap=True)  # fmt: skip
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True, logprobs=1, seed=7)
    out = llm.generate([[1, 2, 3], [4, 5]], params)
    assert [len(o.token_ids) for o in out] == [64, 64]
    assert all(len(o.logprobs) == 64 and o.finish_reason == "length" and o.cached_tokens == 0 for o in out)
    assert all(top[0][0] == token for o in out for top, token in zip(o.top_logprobs, o.token_ids, strict=True))
    stats = llm.stats()
    assert stats.generated_tokens == 128
    assert stats.pages_free + stats.pages_cached + stats.pages_held + stats.pages_retiring == stats.pages_total
    llm.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate([[1]])


def test_eos_and_stop_ids_end_a_reply_and_are_part_of_it(llm):
    free = llm.generate([[5, 6, 7]], greedy())[0].token_ids
    stop = free[9]
    first = free.index(stop)
    ended = llm.generate([[5, 6, 7]], greedy(stop_token_ids=(stop,)))[0]
    assert ended.token_ids == free[: first + 1]
    assert ended.finish_reason == "stop"


def test_eos_list_of_generation_config_is_honoured(checkpoint, tmp_path, llm, directory):
    free = llm.generate([[5, 6, 7]], greedy())[0].token_ids
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, free[4]]}))
    with LLM(tmp_path, dtype="float32", kv_tokens=512) as other:
        out = other.generate([[5, 6, 7]], greedy(ignore_eos=False))[0]
    assert out.token_ids == free[: free.index(free[4]) + 1]


def test_min_tokens_keeps_stops_from_being_sampled(llm):
    free = llm.generate([[5, 6, 7]], greedy())[0].token_ids
    held = llm.generate([[5, 6, 7]], greedy(stop_token_ids=(free[2],), min_tokens=8))[0].token_ids
    assert free[2] not in held[:8]
    assert len(held) >= 8


def test_max_tokens_one_ends_on_the_prefill_step(llm):
    out = llm.generate([[1, 2, 3]] * 3, greedy(max_tokens=1))
    assert [len(o.token_ids) for o in out] == [1, 1, 1]


def test_a_second_turn_finds_the_first_in_the_cache(llm):
    prompt = list(range(1, 101))
    first = llm.generate([prompt], greedy(max_tokens=30))[0]
    second = llm.generate([prompt + first.token_ids + [3, 4]], greedy())[0]
    assert second.cached_tokens == (100 + 29) // 16 * 16


def test_namespaces_share_nothing(llm):
    prompt = list(range(1, 101))
    llm.generate([prompt], greedy())
    assert llm.generate([prompt], greedy(), namespace="other")[0].cached_tokens == 0
    assert llm.generate([prompt], greedy())[0].cached_tokens == 96


def test_flush_forgets(llm):
    prompt = list(range(1, 101))
    llm.generate([prompt], greedy())
    assert llm.flush_cache() > 0
    assert llm.generate([prompt], greedy())[0].cached_tokens == 0


def test_more_prompts_than_the_queue_holds_all_end(directory):
    with LLM(directory, dtype="float32", kv_tokens=512, max_waiting=2, max_running=2) as llm:
        out = llm.generate([[i + 1] for i in range(12)], greedy(max_tokens=3))
    assert [len(o.token_ids) for o in out] == [3] * 12


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[1], []], None, "prompt 1: prompt is empty"),
        ([[1, 300]], None, "prompt holds token id 300, the vocabulary has 300"),
        ([[1, -1]], None, "token id -1"),
        ([[1] * 2000], {"max_tokens": 100}, "2000 tokens and max_tokens is 100.*1024"),
        ([[1]], {"stop_token_ids": (300,)}, "stop_token_ids holds token id 300"),
        ([[1]], {"logit_bias": {300: 1.0}}, "logit_bias holds token id 300"),
    ],
)
def test_bad_requests_say_what_is_wrong_and_leave_nothing_behind(llm, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, SamplingParams(**(params or {"max_tokens": 5})))
    assert not llm.scheduler.has_work
    assert len(llm.generate([[1]], greedy())[0].token_ids) == 20


def test_bad_settings_are_named(directory, tmp_path):
    with pytest.raises(ValueError, match="page_size"):
        LLM(directory, page_size=0)
    with pytest.raises(TypeError, match="pagesize"):
        LLM(directory, pagesize=16)
    with pytest.raises(ValueError, match="max_model_len is 5000, the model has 1024"):
        LLM(directory, max_model_len=5000)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LLM(tmp_path / "nowhere")


def test_an_interrupted_call_leaves_the_engine_usable(llm, monkeypatch):
    step, calls = llm.scheduler.step, iter(range(100))

    def interrupted():
        if next(calls) == 4:
            monkeypatch.setattr(llm.scheduler, "step", step)
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.scheduler, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2, 3]] * 4, greedy())
    llm.scheduler.check()
    assert len(llm.generate([[1, 2, 3]], greedy())[0].token_ids) == 20


def test_new_weights_are_used_in_place_and_stamped(llm, checkpoint):
    other, _ = checkpoint("Qwen3", head_dim=32, seed=5)
    before = llm.generate([[9, 8, 7]], greedy())[0]
    storage = {name: view.data_ptr() for name, view in llm.runner.model.checkpoint_views().items()}
    llm.update_weights(3, dict(other.state_dict()))
    after = llm.generate([[9, 8, 7]], greedy())[0]
    from tests.conftest import reference_greedy

    assert after.token_ids == reference_greedy(other, [9, 8, 7], 20)
    assert before.token_ids != after.token_ids
    assert (before.weight_versions[0], after.weight_versions) == (0, [3] * 20)
    assert storage == {name: view.data_ptr() for name, view in llm.runner.model.checkpoint_views().items()}


def test_old_weights_keys_and_values_are_never_matched(llm):
    prompt = list(range(1, 101))
    llm.generate([prompt], greedy())
    llm.update_weights(1, {})
    assert llm.generate([prompt], greedy())[0].cached_tokens == 0


def test_a_bad_update_changes_nothing(llm):
    want = llm.generate([[9, 8, 7]], greedy())[0].token_ids
    name = "model.norm.weight"
    with pytest.raises(ValueError, match=r"tensor 'model.nrm.weight' is not part"):
        llm.update_weights(1, {name: torch.zeros(64), "model.nrm.weight": torch.zeros(64)})
    with pytest.raises(ValueError, match=r"has shape \[3\], this model's is \[64\]"):
        llm.update_weights(1, {name: torch.zeros(3)})
    llm.update_weights(1, {})
    with pytest.raises(ValueError, match="version must be greater than 1"):
        llm.update_weights(1, {})
    assert llm.generate([[9, 8, 7]], greedy())[0].token_ids == want


def test_seedless_requests_differ_but_repeat_with_the_engine_seed(directory):
    runs = []
    for seed in (0, 0, 1):
        with LLM(directory, dtype="float32", kv_tokens=512, seed=seed) as llm:
            runs.append([c.token_ids for c in llm.generate([[1, 2]] * 2, SamplingParams(max_tokens=12))])
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_the_engine_imports_no_http_and_no_tokenizer():
    code = (
        "import sys, agentserve.engine.process\n"
        "print([m for m in ('fastapi', 'httpx', 'uvicorn', 'tokenizers', 'transformers') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_prompts_may_be_numpy(llm):
    assert len(llm.generate([np.array([1, 2, 3])], greedy())[0].token_ids) == 20


@pytest.fixture(scope="module")
def demo():
    with LLM("demo", dtype="float32", kv_tokens=4096) as made:
        yield made


def test_text_goes_in_and_comes_out(demo):
    prompt = demo.tokenizer.render([{"role": "user", "content": "Hello"}])
    whole = demo.generate(prompt, SamplingParams(temperature=0.0, max_tokens=40))[0]
    assert whole.finish_reason == "stop"
    assert whole.token_ids[-1] in demo.tokenizer.eos_token_ids
    assert whole.text == demo.tokenizer.decode(whole.token_ids[:-1])
    assert len(whole.text) > 5


def test_stop_strings_cut_text_and_tokens_and_free_the_request(demo):
    prompt = demo.tokenizer.render([{"role": "user", "content": "Hello"}])
    whole = demo.generate(prompt, SamplingParams(temperature=0.0, max_tokens=40))[0]
    stop = whole.text[3:6]
    cut = demo.generate(prompt, SamplingParams(temperature=0.0, max_tokens=40, stop=(stop,)))[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert stop in demo.tokenizer.decode(cut.token_ids)
    assert stop not in demo.tokenizer.decode(cut.token_ids[:-1])
    assert not demo.scheduler.has_work
