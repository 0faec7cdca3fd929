"""The grammars of replies, on xgrammar's matcher: what is written as templates write it passes, and nothing else."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.control import vocabulary
from agentserve.control.formats import OPEN, call_format, parse_reply, structural_tag, write_call
from agentserve.control.tools import Tool, ToolChoice, parse_choice
from agentserve.tokenizer import Tokenizer

TOKENIZER = Tokenizer("demo")
SIZE = TOKENIZER.vocab_size + 40  # as if the embedding were padded
INFO = xgrammar.TokenizerInfo.deserialize_json(vocabulary.serialize(TOKENIZER, SIZE, TOKENIZER.eos_token_ids))
COMPILER = xgrammar.GrammarCompiler(INFO, max_threads=1)


def accepts(tag: str, text: str) -> bool:
    """Whether `text` is a whole reply under the grammar."""
    matcher = xgrammar.GrammarMatcher(COMPILER.compile_structural_tag(tag), terminate_without_stop_token=True)
    return matcher.accept_string(text) and matcher.is_terminated()


def begins(tag: str, text: str) -> bool:
    """Whether a reply under the grammar can begin with `text`."""
    return xgrammar.GrammarMatcher(COMPILER.compile_structural_tag(tag)).accept_string(text)


# A schema with a strategy for its values. Strings are bounded so that a random walk through the grammar ends.
LEAVES: list[tuple[dict[str, Any], st.SearchStrategy[Any]]] = [
    ({"type": "boolean"}, st.booleans()),
    ({"type": "null"}, st.none()),
    ({"type": "integer", "minimum": -5, "maximum": 99}, st.integers(-5, 99)),
    ({"enum": ["red", "</tool_call>", 'a"b', "\n"]}, st.sampled_from(["red", "</tool_call>", 'a"b', "\n"])),
    ({"type": "string", "maxLength": 6}, st.text("ab é<>/{}😀", max_size=6)),
    ({"type": "array", "items": {"type": "boolean"}, "maxItems": 3}, st.lists(st.booleans(), max_size=3)),
]


@st.composite
def schemas(draw: st.DrawFn) -> tuple[dict[str, Any], st.SearchStrategy[Any]]:
    keys = draw(st.lists(st.sampled_from(["a", "b", "path", "x y", "名"]), unique=True, max_size=3))
    leaves = {key: draw(st.sampled_from(LEAVES)) for key in keys}
    schema = {
        "type": "object",
        "properties": {key: leaf for key, (leaf, _) in leaves.items()},
        "required": keys,
        "additionalProperties": False,
    }
    values = st.tuples(*(values for _, values in leaves.values())).map(
        lambda drawn: dict(zip(keys, drawn, strict=True))
    )
    return schema, values  # in the schema's order


@st.composite
def tool_sets(draw: st.DrawFn) -> list[tuple[Tool, st.SearchStrategy[Any]]]:
    names = draw(
        st.lists(st.sampled_from(["add", "add2", "a.b", "browser_open", "browser_x"]), unique=True, min_size=2)
    )
    return [(Tool(name, schema), values) for name in names for schema, values in [draw(schemas())]]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_what_is_written_well_passes_and_is_read_back(data: st.DataObject) -> None:
    pairs = data.draw(tool_sets())
    tools = tuple(tool for tool, _ in pairs)
    allowed = data.draw(st.lists(st.sampled_from(tools), min_size=1, unique_by=lambda t: t.name))
    choice = ToolChoice(data.draw(st.sampled_from(["auto", "required"])), tuple(t for t in tools if t in allowed))
    values = {tool.name: value for tool, value in pairs}
    calls = [
        (tool.name, json.dumps(data.draw(values[tool.name]), ensure_ascii=False))
        for tool in data.draw(st.lists(st.sampled_from(choice.tools), min_size=1, max_size=3))
    ]
    text = "\n".join(write_call(*call) for call in calls)
    tag = structural_tag(choice)
    assert accepts(tag, text)
    content, read = parse_reply(text)
    assert (content, [(call.name, call.arguments) for call in read]) == ("", calls)
    assert accepts(tag, "Let me see.\n" + text) == (choice.mode == "auto")
    assert accepts(tag, "No call.") == (choice.mode == "auto")
    single = structural_tag(choice, parallel=False)
    assert accepts(single, text) == (len(calls) == 1)
    for tool in tools:
        assert begins(tag, f'{OPEN}\n{{"name": "{tool.name}"') == (tool in choice.tools)
    for begin in (f'{OPEN}\n{{"name": "nope"', f"{OPEN}x", f'{OPEN}\n{{"arguments"'):
        assert not begins(tag, begin)
    wrong = write_call(choice.tools[0].name, '{"no such": 1}')
    assert not begins(tag, wrong)
    none = structural_tag(ToolChoice("none", tools))
    assert accepts(none, "Let me see. <tool")
    assert not begins(none, text)
    assert not begins(none, "Let me see. " + OPEN)


def walk(tag: str, seed: int, limit: int = 3000) -> str:
    """A reply of a model that likes all tokens equally, held to a grammar."""
    matcher, chance = xgrammar.GrammarMatcher(COMPILER.compile_structural_tag(tag)), random.Random(seed)
    mask, ids = xgrammar.allocate_token_bitmask(1, SIZE), []
    while not matcher.is_terminated():
        matcher.fill_next_token_bitmask(mask)
        bits = ((mask[0][:, None] >> torch.arange(32)) & 1).flatten()[:SIZE]
        token = chance.choice(bits.nonzero().flatten().tolist())
        assert matcher.accept_token(token)
        ids.append(token)
        assert len(ids) < limit
    return TOKENIZER.decode(ids[:-1])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_a_random_model_writes_only_calls_that_parse_and_validate(data: st.DataObject, seed: int) -> None:
    tools = tuple(tool for tool, _ in data.draw(tool_sets()))
    one = data.draw(st.booleans())
    choice = ToolChoice("required", tools[:1] if one else tools, one)
    content, calls = parse_reply(walk(structural_tag(choice), seed))
    assert content == ""
    assert len(calls) == 1 if one else calls
    for call in calls:
        (schema,) = [tool.schema for tool in choice.tools if tool.name == call.name]
        arguments = json.loads(call.arguments)
        assert list(arguments) == list(schema["properties"])
        for key, leaf in schema["properties"].items():
            assert valid(arguments[key], leaf), (arguments[key], leaf)


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """JSON schema for the leaves above."""
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case _:
            return isinstance(value, list) and len(value) <= 3 and all(isinstance(item, bool) for item in value)


@pytest.mark.parametrize("arguments", [
    '{"s": "</tool_call>"}', '{"s": "\\ud800"}', '{"s": "\\\\</tool_call>\\""}', '{"n": 1e999}',
    '{"n": %s}' % ("1" * 5000),
    '{\n  "s" : "x" ,\n  "n": -0.5E+2\n}', "{ }",
])  # fmt: skip
def test_the_parser_reads_all_that_the_grammar_allows(arguments: str) -> None:
    schema = {"type": "object", "properties": {"s": {"type": "string"}, "n": {"type": "number"}}}
    text = write_call("f", arguments)
    assert accepts(structural_tag(ToolChoice("required", (Tool("f", schema),))), text)
    content, (call,) = parse_reply(text)
    assert (content, call.name, call.arguments) == ("", "f", arguments)


@pytest.mark.parametrize("bounds", [{"maxLength": 500}, {"minLength": 200}, {"minLength": 2, "maxLength": 128}])
def test_control_characters_in_strings_of_bounded_length(bounds: dict[str, int]) -> None:
    schema = {"type": "object", "properties": {"s": {"type": "string", **bounds}}, "required": ["s"]}
    tag = structural_tag(ToolChoice("required", (Tool("f", schema),)))
    long = "é" * bounds.get("maxLength", 300)
    assert accepts(tag, write_call("f", json.dumps({"s": long}, ensure_ascii=False)))
    if "maxLength" in bounds:
        assert not begins(tag, write_call("f", json.dumps({"s": long + "é"}, ensure_ascii=False)))
    raw = write_call("f", '{\t"s": "\x05' + "x" * 210 + '\t"}')
    if accepts(tag, raw):
        _, (call,) = parse_reply(raw)
        assert json.loads(call.arguments) == {"s": "\x05" + "x" * 210 + "\t"}
    else:
        assert bounds.get("maxLength") == 128


def test_a_reply_in_json_with_and_without_tools() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tools = (Tool("f", schema),)
    call, reply = write_call("f", '{"a": 1}'), '{"a": 2}'
    for choice, takes_call, takes_json in (
        (None, False, True), (ToolChoice("none", tools), False, True), (ToolChoice("auto", tools), True, True),
        (ToolChoice("required", tools), True, False),
    ):  # fmt: skip
        tag = structural_tag(choice, reply_schema=schema)
        assert (accepts(tag, call), accepts(tag, reply)) == (takes_call, takes_json)
        assert not accepts(tag, '{"a": "x"}')
        assert not begins(tag, "text")


def test_an_open_thinking_block_comes_first() -> None:
    tools = (Tool("f", {"type": "object"}),)
    tag = structural_tag(parse_choice("required", tools), thinking=True)
    call = write_call("f", "{}")
    assert accepts(tag, f"Hm.\n</think>\n\n{call}")
    assert not begins(tag, call)
    assert not accepts(tag, "Hm.\n</think>\n\nNo.")


def test_control_tokens_and_padding_are_never_allowed() -> None:
    matcher = xgrammar.GrammarMatcher(COMPILER.compile_structural_tag(structural_tag(None)))
    mask = xgrammar.allocate_token_bitmask(1, SIZE)
    matcher.fill_next_token_bitmask(mask)
    bits = ((mask[0][:, None] >> torch.arange(32)) & 1).flatten()[:SIZE].tolist()
    assert not any(bits[TOKENIZER.vocab_size :])
    for text, token in TOKENIZER.special_tokens.items():
        assert bits[token] == (token in TOKENIZER.eos_token_ids), text
    assert bits[TOKENIZER.encode("</tool_call>")[0]]
    assert not bits[TOKENIZER.encode(OPEN)[0]]


def test_the_format_is_told_from_the_template() -> None:
    assert call_format(TOKENIZER.chat_template) == "hermes"
    assert call_format("{{ messages }}") is None
