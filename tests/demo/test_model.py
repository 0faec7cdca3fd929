"""The shipped model: its size, that transformers and the project's loader read it, and that it does its work."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from agentserve.demo import MODEL_DIR
from agentserve.demo.demonstrate import Conversation
from agentserve.demo.simulate import simulate
from agentserve.demo.tasks import SYSTEM, TOOLS, Task, score, showcase, tasks
from agentserve.demo.train import Example, TrainConfig, encode, loss_of, train
from agentserve.models import load_model

TOKENIZER = AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    assert isinstance(loaded, Qwen3ForCausalLM)
    return loaded


def reply(model: Qwen3ForCausalLM, messages: list[dict[str, Any]], max_tokens: int = 64) -> str:
    """Return the greedy next turn, without its end mark."""
    prompt = TOKENIZER.apply_chat_template(
        messages, tools=TOOLS, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=max_tokens, do_sample=False)
    ids = out[0, prompt["input_ids"].shape[1] :].tolist()
    assert TOKENIZER.convert_ids_to_tokens(ids[-1]) == "<|im_end|>"
    return TOKENIZER.decode(ids[:-1])


def run(model: Qwen3ForCausalLM, task: Task) -> tuple[str, int]:
    """Return the final reply to a task and how many tools were called on the way."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": task.prompt},
    ]
    for calls in range(6):
        text = reply(model, messages)
        match = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", text)
        if match is None:
            return text, calls
        call = json.loads(match[1])
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": simulate(task.files, call["name"], call["arguments"])},
        ]
    return "", 6


def test_the_package_data_is_small_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in MODEL_DIR.iterdir()}
    assert sum(files.values()) < 8_000_000
    assert files.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_importing_the_package_and_its_tasks_is_light() -> None:
    code = "import sys, agentserve.demo.tasks; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_loader_reads_it_and_agrees_with_transformers(model: Qwen3ForCausalLM) -> None:
    ours = load_model(MODEL_DIR)
    ids = TOKENIZER.encode("What is 12 + 30?", add_special_tokens=False)
    example = Example(ids, [False] + [True] * (len(ids) - 1))
    with torch.no_grad():
        theirs = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
        torch.testing.assert_close(loss_of(ours, [example]), theirs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(loss_of(ours, [example, example]), theirs, atol=1e-4, rtol=1e-4)
    assert ours.config.eos_token_ids == tuple(TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


def test_greedy_calls_are_well_formed(model: Qwen3ForCausalLM) -> None:
    (task,) = tasks("held_out", 1, seed=4, kinds=["sum"])
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task.prompt}]
    match = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", reply(model, messages))
    assert match is not None
    call = json.loads(match[1])
    assert call["name"] == "python"
    assert list(call["arguments"]) == ["code"]
    assert simulate(task.files, call["name"], call["arguments"]).strip() == task.answer


def test_greedy_solves_the_showcase_with_several_calls(model: Qwen3ForCausalLM) -> None:
    for task in showcase():
        text, calls = run(model, task)
        assert score(task, text) == 1.0, text
        assert calls >= 2


def test_loss_is_on_the_assistants_tokens_only() -> None:
    talk = Conversation(
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "What is 2 + 2?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "python", "arguments": '{"code": "print(2 + 2)"}'}}],
            },
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "The answer is 4."},
        ],
        TOOLS,
    )
    example = encode(TOKENIZER, talk)
    learned = [i for i, flag in zip(example.token_ids, example.loss, strict=True) if flag]
    assert TOKENIZER.decode(learned) == (
        '<tool_call>\n{"name": "python", "arguments": {"code": "print(2 + 2)"}}\n</tool_call><|im_end|>'
        "The answer is 4.<|im_end|>"
    )
    whole = TOKENIZER.apply_chat_template(talk.messages, tools=TOOLS, tokenize=False)
    assert TOKENIZER.decode(example.token_ids) + "\n" == whole


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_training_is_repeatable_and_writes_a_model(tmp_path: Path) -> None:
    config = TrainConfig(steps=2, tokens_per_step=256, tokenizer_conversations=100, seed=5)
    first, second = train(config, tmp_path / "a"), train(config, tmp_path / "b")
    assert first["loss"] == second["loss"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert load_model(tmp_path / "a").config.architecture == "Qwen3ForCausalLM"
