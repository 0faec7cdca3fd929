"""Reading tool calls out of a reply: whole, in pieces, malformed, never losing text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentserve.control.formats import ToolCallParser, parse_block, parse_reply

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'


def test_calls_and_the_content_around_them() -> None:
    content, calls = parse_reply(f"I will add.\n{ADD}\n{ADD}\n")
    assert content == "I will add."
    assert [(c.name, c.arguments) for c in calls] == [("add", '{"a": 1, "b": [2]}')] * 2
    assert calls[0].id != calls[1].id
    assert calls[0].to_openai()["function"] == {"name": "add", "arguments": '{"a": 1, "b": [2]}'}
    assert parse_reply(ADD)[0] == ""
    assert parse_reply(f"{ADD}\nand then \n")[0] == "and then \n"
    assert parse_reply('<tool_call>{"name": "now"}</tool_call>')[1][0].arguments == "{}"


def test_arguments_are_as_the_model_wrote_them() -> None:
    (call,) = parse_reply('<tool_call>{"arguments":{"code" : "print(1)\\n","x":1.50}, "name":"python"}</tool_call>')[1]
    assert call.arguments == '{"code" : "print(1)\\n","x":1.50}'


@pytest.mark.parametrize(
    "text",
    [
        "no call at all \n",
        "<tool_call>{not json}</tool_call>",
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "text"}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {}, "more": 1}</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"a": 1',
        '<tool_call>{"name": "add", "arguments": {}}',
        "a < b <tool <tool_cal",
        "</tool_call> closed what was not open",
        "<tool_call></tool_call>",
        "  \n ",
    ],
)
def test_what_is_no_call_is_content_word_for_word(text: str) -> None:
    assert parse_reply(text) == (text, [])


def test_a_call_that_begins_inside_a_broken_block_is_found() -> None:
    content, calls = parse_reply(f"<tool_call>oops {ADD} done")
    assert content == "<tool_call>oops\ndone"
    assert [c.name for c in calls] == ["add"]


PARTS = st.sampled_from(
    [ADD, "<tool_call>", "</tool_call>", "text", " ", "\n", "<", '{"name": "x"}', "<tool_call>{}</tool_call>", "é"]
)


@given(parts=st.lists(PARTS, max_size=8), size=st.integers(1, 9))
def test_pieces_give_what_the_whole_gives(parts: list[str], size: int) -> None:
    text = "".join(parts)
    parser = ToolCallParser()
    content, calls = "", []
    for start in range(0, len(text), size):
        more, found = parser.push(text[start : start + size])
        content += more
        calls += found
    content += parser.finish()
    whole, whole_calls = parse_reply(text)
    assert content == whole
    assert [(c.name, c.arguments) for c in calls] == [(c.name, c.arguments) for c in whole_calls]
    assert calls == parser.calls


@given(parts=st.lists(PARTS, max_size=8))
def test_no_text_is_lost_but_white_space_around_calls(parts: list[str]) -> None:
    text = "".join(parts)
    content, calls = parse_reply(text)
    removed = []

    def without(match: re.Match[str]) -> str:
        if (call := parse_block(match[1])) is None:
            return match[0]
        removed.append(call.name)
        return ""

    rest = re.sub(r"<tool_call>((?:(?!</?tool_call>).)*)</tool_call>", without, text, flags=re.DOTALL)
    assert "".join(content.split()) == "".join(rest.split())
    assert [call.name for call in calls] == removed
