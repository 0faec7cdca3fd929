"""The tokenizer and its template: append-only rendering, Qwen3's calls, digits apart, exact round trips."""

import json
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from agentserve.demo import MODEL_DIR
from agentserve.demo.tasks import SYSTEM, TOOLS
from agentserve.demo.template import CHAT_TEMPLATE

TOKENIZER = AutoTokenizer.from_pretrained(MODEL_DIR)

_text = st.text(max_size=20)
_call = st.builds(
    lambda name, arguments, as_text: {
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments) if as_text else arguments},
    },
    st.sampled_from(["python", "shell"]),
    st.dictionaries(st.sampled_from(["code", "command"]), _text, max_size=2),
    st.booleans(),
)
_content = st.one_of(_text, st.lists(st.builds(lambda t: {"type": "text", "text": t}, _text), max_size=2))
_message = st.one_of(
    st.builds(lambda c: {"role": "system", "content": c}, _content),
    st.builds(lambda c: {"role": "user", "content": c}, _content),
    st.builds(lambda c: {"role": "tool", "content": c}, _content),
    st.builds(lambda c: {"role": "tool", "content": c}, _content),
    st.builds(lambda c: {"role": "assistant", "content": c}, _content),
    st.builds(
        lambda c, calls: {"role": "assistant", "content": c, "tool_calls": calls},
        st.one_of(st.none(), _text),
        st.lists(_call, min_size=1, max_size=3),
    ),
    st.builds(lambda c, r: {"role": "assistant", "content": c, "reasoning_content": r}, _text, _text),
)


def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, prompt: bool = False) -> str:
    text = TOKENIZER.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)
    return text


@settings(max_examples=200, deadline=None)
@given(st.lists(_message, min_size=1, max_size=7), st.sampled_from([None, TOOLS]))
def test_what_was_rendered_stays_a_prefix(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
    whole = render(messages, tools)
    for k in range(1, len(messages)):
        assert whole.startswith(render(messages[:k], tools))
        if messages[k]["role"] == "assistant":
            assert whole.startswith(render(messages[:k], tools, prompt=True))
    assert render(messages, tools, prompt=True).startswith(whole)


def test_the_whole_form() -> None:
    calls = [
        {"type": "function", "function": {"name": "shell", "arguments": '{"command": "wc -l < a.txt"}'}},
        {"type": "function", "function": {"name": "python", "arguments": {"code": "print(1 < 2)"}}},
    ]
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "7"},
        {"role": "tool", "content": "True"},
        {"role": "assistant", "content": "The answer is 7."},
        {"role": "user", "content": "More"},
    ]
    text = render(messages, TOOLS, prompt=True)
    system, _, rest = text.partition("<|im_end|>\n")
    schemas = system.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()
    assert system.startswith("<|im_start|>system\nS\n\n# Tools\n\n<tools>\n")
    assert [json.loads(line) for line in schemas] == TOOLS
    assert rest == (
        "<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\n"
        '<tool_call>\n{"name": "shell", "arguments": {"command": "wc -l < a.txt"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "python", "arguments": {"code": "print(1 < 2)"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n7\n</tool_response>\n"
        "<tool_response>\nTrue\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nThe answer is 7.<|im_end|>\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tools_without_a_system_message_and_no_tools() -> None:
    user = [{"role": "user", "content": "U"}]
    assert render(user) == "<|im_start|>user\nU<|im_end|>\n"
    assert render(user, TOOLS).startswith("<|im_start|>system\n# Tools\n\n<tools>\n")


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ({"role": "robot", "content": "x"}, "robot"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "image_url"),
    ],
)
def test_what_the_template_cannot_do_is_refused(message: dict[str, Any], wrong: str) -> None:
    with pytest.raises(jinja2.exceptions.TemplateError, match=wrong):
        render([message])


def test_the_shipped_template_is_the_one_in_the_source() -> None:
    assert TOKENIZER.chat_template == CHAT_TEMPLATE


def test_the_prompt_is_short() -> None:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "What is 384 * 27 + 95?"}]
    assert len(TOKENIZER.encode(render(messages, TOOLS, prompt=True), add_special_tokens=False)) <= 200


def test_digits_are_single_tokens() -> None:
    for digit in "0123456789":
        assert len(TOKENIZER.encode(digit, add_special_tokens=False)) == 1
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER.encode("x = 90417.25", add_special_tokens=False))[-8:] == list(
        "90417.25"
    )
    several = [text for text in TOKENIZER.get_vocab() if sum(c.isdigit() for c in text) and len(text) > 1]
    assert several == []


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
SPECIAL += ("<tool_response>", "</tool_response>", "<think>", "</think>")


@pytest.mark.parametrize("text", SPECIAL)
def test_special_tokens_are_one_token(text: str) -> None:
    assert len(TOKENIZER.encode(text, add_special_tokens=False)) == 1
    kept = TOKENIZER.decode(TOKENIZER.encode(f"a{text}b", add_special_tokens=False), skip_special_tokens=True)
    assert kept == ("ab" if text.startswith("<|") else f"a{text}b")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False)) == text


def test_the_vocabulary_is_small() -> None:
    assert 600 <= len(TOKENIZER) <= 1500
