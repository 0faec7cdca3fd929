"""Tool definitions and OpenAI's spellings of a choice: what is read, and what each mistake is told."""

from __future__ import annotations

from typing import Any

import pytest

from agentserve.control.tools import ToolError, check_schema, parse_choice, parse_tools


def tool(name: str, **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


RAW = [tool("browser_open"), tool("shell", strict=True), tool("browser_click", parameters={"properties": {}})]
TOOLS = parse_tools(RAW)


def names(choice: Any) -> list[str]:
    return [t.name for t in parse_choice(choice, TOOLS).tools]


def test_definitions() -> None:
    assert [(t.name, t.strict) for t in TOOLS] == [("browser_open", False), ("shell", True), ("browser_click", False)]
    assert TOOLS[0].schema == {"type": "object", "properties": {}, "additionalProperties": False}
    assert TOOLS[2].schema == {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("raw", "param", "words"),
    [
        ([tool("a b")], "tools.0.function.name", "letters"),
        ([tool("x" * 65)], "tools.0.function.name", "64"),
        ([tool("a"), tool("a")], "tools.1.function.name", "two tools"),
        ([tool("a", parameters={"type": "array"})], "tools.0.function.parameters", "object"),
        ([tool("a"), tool("b", parameters=[])], "tools.1.function.parameters", "object"),
    ],
)
def test_a_wrong_definition_is_named(raw: list[dict[str, Any]], param: str, words: str) -> None:
    with pytest.raises(ToolError, match=words) as caught:
        parse_tools(raw)
    assert caught.value.param == param


def function(name: str, flat: bool) -> dict[str, Any]:
    return {"type": "function"} | ({"name": name} if flat else {"function": {"name": name}})


@pytest.mark.parametrize("flat", [False, True])
def test_every_spelling_of_a_choice(flat: bool) -> None:
    for mode in ("none", "auto", "required"):
        assert parse_choice(mode, TOOLS).mode == mode
        assert len(names(mode)) == 3
    assert parse_choice(None, TOOLS).mode == "auto"
    named = parse_choice(function("shell", flat), TOOLS)
    assert (named.mode, named.one, [t.name for t in named.tools]) == ("required", True, ["shell"])
    for mode in ("auto", "required"):
        inner = {"mode": mode, "tools": [function("shell", flat), function("browser_*", flat)]}
        allowed = {"type": "allowed_tools"} | (inner if flat else {"allowed_tools": inner})
        assert parse_choice(allowed, TOOLS).mode == mode
        assert not parse_choice(allowed, TOOLS).one
        assert names(allowed) == ["browser_open", "shell", "browser_click"]
        inner = inner | {"tools": [function("browser_*", flat)]}
        allowed = {"type": "allowed_tools"} | (inner if flat else {"allowed_tools": inner})
        assert names(allowed) == ["browser_open", "browser_click"]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("any", "must be 'none', 'auto', 'required'"),
        (3, "must be"),
        ({"type": "tool"}, "must be"),
        ({"type": "function"}, "needs a name"),
        ({"type": "function", "name": 3}, "needs a name"),
        ({"type": "function", "name": "shell", "extra": 1}, "fields name"),
        ({"type": "function", "function": "shell"}, "fields name"),
        (function("nope", True), "no tool is named 'nope'; there are: 'browser_open', 'shell', 'browser_click'"),
        (function("browser_*", True), "no tool is named 'browser_"),
        ({"type": "allowed_tools"}, "mode"),
        ({"type": "allowed_tools", "mode": "none", "tools": [function("shell", True)]}, "mode"),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, "at least one"),
        ({"type": "allowed_tools", "mode": "auto", "tools": ["shell"]}, "an entry must be"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [function("x_*", True)]}, "no tool is named"),
    ],
)
def test_a_wrong_choice_is_told(choice: Any, words: str) -> None:
    with pytest.raises(ToolError) as caught:
        parse_choice(choice, TOOLS)
    assert words in str(caught.value)
    assert caught.value.param.startswith("tool_choice")


def test_required_needs_tools() -> None:
    with pytest.raises(ToolError, match="needs tools"):
        parse_choice("required", [])


@pytest.mark.parametrize(
    "schema", [{"type": "wat"}, {"enum": []}, {"$ref": "#/nope"}, {"pattern": "[", "type": "string"}]
)
def test_a_schema_without_a_grammar_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ToolError, match="cannot be enforced") as caught:
        check_schema({"type": "object", "properties": {"a": schema}}, "here")
    assert caught.value.param == "here"


def test_strict_refuses_what_would_not_be_enforced() -> None:
    schema = {"type": "object", "properties": {"not": {"type": "array", "uniqueItems": True}}, "required": ["not"]}
    check_schema(schema, "here")
    with pytest.raises(ToolError, match="'uniqueItems' cannot be enforced"):
        check_schema(schema, "here", strict=True)
    check_schema({"type": "object", "properties": {"not": {"const": {"if": 1}}}}, "here", strict=True)
