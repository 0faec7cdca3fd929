"""How a model writes a tool call, and how it is read back: `<tool_call>` blocks as Hermes and Qwen write
them.

Reading never loses text: what looks like a call but is none stays in the content.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import msgspec

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKS = (OPEN, CLOSE)


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
        msgspec.json.decode(block.arguments, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeEncodeError):
        return None
    return ToolCall(block.name, bytes(block.arguments).decode()) if block.name else None


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
