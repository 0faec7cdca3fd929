"""How a model writes a tool call: reading it back, and the grammar that holds the sampler to it. `<tool_call>` blocks
as Hermes and Qwen write them.

Reading never loses text: what looks like a call but is none stays in the content.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

import msgspec

from agentserve.control.tools import BY_NAME, NOT_SCHEMAS, Tool, ToolChoice

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKS = (OPEN, CLOSE)
END_OF_THINKING = "</think>"
# In a row, inside JSON. Enough for indented text; without a limit a model could write white space for ever.
MAX_WHITE_SPACE = 16
MAX_REPEAT = 128  # xgrammar 0.2.8 fails on patterns that count further
# one that JSON writes without an escape; by its end, since classes by what they leave out allow bytes that are no UTF-8
_CHARACTER = "[ !#-\\[\\]-\ud7ff\ue000-\U0010ffff]"
_CANONICAL = re.compile(r'\s*\{"name": "([^"\\]+)", "arguments": (.*)\}\s*', re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f]")
_STRING = re.compile(r'"(?:[^"\\\r\n]|\\.)*(")?')


@dataclass(frozen=True)
class ToolCall:
    """One call. `arguments` is the JSON text of an object, as the model wrote it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def to_openai(self) -> dict[str, Any]:
        """The call as an entry of an OpenAI message's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class _Block(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


def parse_block(text: str) -> ToolCall | None:
    """The call that a block's inside describes, or None if it is not `{"name": str, "arguments": object}`."""
    try:
        block = msgspec.json.decode(text.encode(), type=_Block)
        name, arguments = block.name, bytes(block.arguments).decode()
    except (msgspec.MsgspecError, UnicodeEncodeError):
        # the grammar allows what msgspec does not read: numbers too large for a float, half a surrogate pair, and in
        # long strings control characters, which are escaped here
        match = _CANONICAL.fullmatch(text)
        if match is None:
            return None
        name, arguments = match[1], _STRING.sub(lambda string: _CONTROL.sub(_escape, string[0]), match[2])
    try:
        is_object = isinstance(json.loads(arguments, parse_int=float), dict)
    except (ValueError, RecursionError):
        return None
    return ToolCall(name, arguments) if name and is_object else None


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def _in_string(text: str) -> bool:
    """Whether JSON text stops inside a string that can still go on."""
    place = 0
    while (match := _STRING.search(text, place)) is not None:
        if match[1] is None:
            return match.end() == len(text) or text[match.end() :] == "\\"
        place = match.end()
    return False


class ToolCallParser:
    """Reads a reply as it comes: `push` and `finish` give text that is content, and calls that are complete.

    White space between content and a call belongs to the format and is dropped; content before and after
    calls is joined by a newline. A block that is not a call, or never closed, is content, word for word.
    """

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []
        self._held = ""  # may be the beginning of an opening mark
        self._space = ""  # white space that is content only if content follows
        self._after_call = False
        self._any_content = False
        self._block: list[str] | None = None  # what an open block holds so far
        self._tail = ""  # its end, which may be the beginning of a closing mark

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take more text: (content that became certain, calls that became complete)."""
        content: list[str] = []
        calls: list[ToolCall] = []
        while text:
            text = self._outside(text, content) if self._block is None else self._inside(text, content, calls)
        self.calls += calls
        return "".join(content), calls

    def finish(self) -> str:
        """The reply has ended: the rest of its content."""
        rest = self._held
        if self._block is not None:
            rest = OPEN + "".join(self._block) + self._tail
        content: list[str] = []
        self._emit(rest, content)
        if not self._after_call:
            content.append(self._space)
        self._held, self._space, self._block, self._tail = "", "", None, ""
        return "".join(content)

    def _outside(self, text: str, content: list[str]) -> str:
        text = self._held + text
        start = text.find(OPEN)
        if start >= 0:
            self._held, self._block = "", []
            self._emit(text[:start], content)
            return text[start + len(OPEN) :]
        keep = next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)
        self._held = text[len(text) - keep :]
        self._emit(text[: len(text) - keep], content)
        return ""

    def _inside(self, text: str, content: list[str], calls: list[ToolCall]) -> str:
        assert self._block is not None
        text = self._tail + text
        end = text.find(CLOSE)
        while end >= 0 and _in_string("".join(self._block) + text[:end]):
            end = text.find(CLOSE, end + 1)  # it is part of an argument
        if end < 0:
            cut = max(0, len(text) - len(CLOSE) + 1)
            self._block.append(text[:cut])
            self._tail = text[cut:]
            return ""
        inside, rest = "".join(self._block) + text[:end], text[end + len(CLOSE) :]
        self._block, self._tail = None, ""
        call = parse_block(inside)
        if call is not None:
            calls.append(call)
            self._space, self._after_call = "", True
            return rest
        self._emit(OPEN, content)
        return inside + CLOSE + rest  # a call may begin inside what was none

    def _emit(self, text: str, content: list[str]) -> None:
        text = self._space + text
        if self._after_call:
            text = text.lstrip()
            if text and self._any_content:
                text = "\n" + text
        certain = text.rstrip()
        self._space = text[len(certain) :]
        if certain:
            self._after_call, self._any_content = False, True
            content.append(certain)


def parse_reply(text: str) -> tuple[str, list[ToolCall]]:
    """A whole reply: its content, and its calls in order."""
    parser = ToolCallParser()
    content, calls = parser.push(text)
    return content + parser.finish(), calls


def call_format(chat_template: str) -> str | None:
    """The format in which a model with this template writes calls: "hermes", or None if it is none of ours."""
    return "hermes" if OPEN in chat_template and CLOSE in chat_template else None


def write_call(name: str, arguments: str) -> str:
    """A call as the model's template writes it. `arguments` is the JSON text of an object."""
    return f'{OPEN}\n{{"name": "{name}", "arguments": {arguments}}}\n{CLOSE}'


def structural_tag(
    choice: ToolChoice | None,
    parallel: bool = True,
    reply_schema: dict[str, Any] | None = None,
    thinking: bool = False,
) -> str:
    """The grammar of a reply, an xgrammar structural tag as JSON.

    Properties come in the order of their schema.

    Args:
        choice: what may be called; None where there are no tools, or where the model's format is not known.
        parallel: whether a reply may hold several calls.
        reply_schema: what a reply without calls must be; None is any text.
        thinking: the prompt has opened a thinking block, so the reply is thoughts first.
    """
    mode = "none" if choice is None or not choice.tools else choice.mode
    if reply_schema is not None:
        body = _json(reply_schema)
        if choice is not None and mode == "auto":
            body = {"type": "or", "elements": [_calls(choice, parallel), body]}
    else:
        body = {"type": "any_text", "excludes": [OPEN]}
    if choice is not None and mode == "required":
        body = _calls(choice, parallel)
    elif choice is not None and mode == "auto" and reply_schema is None:
        tags = [_tag(tool) for tool in choice.tools]
        body = {"type": "triggered_tags", "triggers": [OPEN], "tags": tags, "stop_after_first": not parallel}
    if thinking and body["type"] not in ("any_text", "triggered_tags"):
        thoughts = {"type": "any_text", "excludes": [OPEN]}
        block = {"type": "tag", "begin": "", "content": thoughts, "end": END_OF_THINKING}
        body = {"type": "sequence", "elements": [block, {"type": "regex", "pattern": "[ \\n]{0,4}"}, body]}
    return json.dumps({"type": "structural_tag", "format": body}, separators=(",", ":"))


def _calls(choice: ToolChoice, parallel: bool) -> dict[str, Any]:
    """Calls and nothing else, at least one."""
    return {
        "type": "tags_with_separator",
        "tags": [_tag(tool) for tool in choice.tools],
        "separator": "\n",
        "at_least_one": True,
        "stop_after_first": choice.one or not parallel,
    }


def _tag(tool: Tool) -> dict[str, Any]:
    begin, end = write_call(tool.name, "\0").split("\0")
    return {"type": "tag", "begin": begin, "content": _json(tool.schema), "end": end}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": _lengths(schema), "max_whitespace_cnt": MAX_WHITE_SPACE}


def _lengths(schema: Any, named: bool = False) -> Any:
    """The schema with strings of bounded length as patterns: for bare lengths xgrammar allows raw control characters,
    which are no JSON. Where the length is more than a pattern can count to, the parser escapes them.

    Args:
        named: this is no schema but holds some by name.
    """
    if isinstance(schema, list):
        return [_lengths(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if named:
        return {name: _lengths(value) for name, value in schema.items()}
    out = {
        word: value if word in NOT_SCHEMAS else _lengths(value, named=word in BY_NAME) for word, value in schema.items()
    }
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    bounded = schema.keys() & {"minLength", "maxLength"} and (high or low) <= MAX_REPEAT
    if bounded and not schema.keys() & {"pattern", "format"}:
        out = {word: value for word, value in out.items() if word not in ("minLength", "maxLength")}
        out["pattern"] = f"^{_CHARACTER}{{{low},{high}}}$"
    return out
