"""Delta rendering: only what is new is rendered, and the log reads as the template would have written it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentserve.demo.template import CHAT_TEMPLATE as DEMO_TEMPLATE
from agentserve.session.log import Piece, TokenLog
from agentserve.session.template import DeltaRenderer
from agentserve.tokenizer import Tokenizer
from tests.session.tokenizer_kit import byte_level, save

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
CALL = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
END = {"chatml": "<|im_end|>", "hermes": "<|im_end|>", "demo": "<|im_end|>", "llama3": "<|eot_id|>"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "call_1"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root: Path = tmp_path_factory.mktemp("models")
    made = {style: Tokenizer(save(root / style, byte_level(), style)) for style in ("chatml", "llama3", "hermes")}
    made["demo"] = Tokenizer(save(root / "demo-style", byte_level(), "chatml"))
    made["demo"]._hf.chat_template = DEMO_TEMPLATE
    return made


class Conversation:
    """A log and, beside it, the history that a client would have kept."""

    def __init__(self, style: str, tokenizer: Tokenizer, tools: list[dict[str, Any]] | None = None) -> None:
        self.tokenizer, self.tools, self.end = tokenizer, tools, END[style]
        self.renderer = DeltaRenderer(tokenizer)
        self.ends = frozenset(tokenizer.eos_token_ids)
        self.log, self.history, self.deltas = TokenLog(), [], []

    def turn(self, messages: list[dict[str, Any]], reply: str, ended: bool = True) -> list[Piece]:
        if not self.history:
            pieces = self.renderer.opening(messages, self.tools)
        else:
            pieces = self.renderer.delta(messages, self.tools, self.log.last, self.ends)
        for piece in pieces:
            self.log.append(piece)
        ids = self.tokenizer.encode(reply + (self.end if ended else ""), add_special_tokens=False)
        self.log.append_sampled(ids, [-1.0] * len(ids), [0] * len(ids))
        calls = [{"type": "function", "id": "call_1", "function": {"name": "add", "arguments": {"a": 1}}}]
        content = reply.removesuffix(CALL)
        self.history += [*messages, {"role": "assistant", "content": content, "tool_calls": calls * (content != reply)}]
        return pieces

    def text(self) -> str:
        return self.tokenizer.decode(self.log.ids().tolist(), skip_special_tokens=False)

    def rendered(self) -> str:
        return self.tokenizer.render(self.history, self.tools, add_generation_prompt=False)


@pytest.mark.parametrize("style", ["chatml", "llama3", "hermes", "demo"])
def test_the_log_reads_as_the_template_writes_the_whole(style: str, tokenizers: dict[str, Tokenizer]) -> None:
    talk = Conversation(style, tokenizers[style])
    talk.turn([{"role": "system", "content": "Be kind."}, user("hello")], "hi there")
    talk.turn([user("more")], "less")
    talk.turn([user("and more")], "enough")
    assert talk.rendered().startswith(talk.text())
    separator = talk.rendered()[len(talk.text()) :]
    assert separator == ("" if style == "llama3" else "\n")
    by_role = [segment.role for segment in talk.log.segments]
    tail = [] if style == "llama3" else ["assistant"]
    assert by_role == [
        "system", "user", "assistant", "assistant",
        *tail, "user", "assistant", "assistant",
        *tail, "user", "assistant", "assistant",
    ]  # fmt: skip
    assert [segment.loss for segment in talk.log.segments if segment.loss] == [True] * 3
    sampled = [
        talk.tokenizer.decode(talk.log.ids()[segment.start : segment.end].tolist())
        for segment in talk.log.segments
        if segment.loss
    ]
    assert sampled == ["hi there", "less", "enough"]


@pytest.mark.parametrize("style", ["chatml", "llama3", "hermes", "demo"])
def test_a_reply_that_was_cut_off_gets_its_end_unsampled(style: str, tokenizers: dict[str, Tokenizer]) -> None:
    talk = Conversation(style, tokenizers[style])
    talk.turn([user("hello")], "hi th", ended=False)
    (end,) = talk.ends
    pieces = talk.turn([user("more")], "less")
    assert pieces[0].role == "assistant"
    assert pieces[0].ids[0] == end
    assert talk.rendered().startswith(talk.text())
    place = talk.log.ids().tolist().index(end, talk.log.segments[-len(pieces) - 1].start)
    assert talk.log.loss_mask()[place] == 0


@pytest.mark.parametrize("style", ["hermes", "demo"])
def test_tool_results_are_grouped_as_the_template_groups_them(style: str, tokenizers: dict[str, Tokenizer]) -> None:
    talk = Conversation(style, tokenizers[style], TOOLS)
    talk.turn([{"role": "system", "content": "Be kind."}, user("add")], f"adding{CALL}")
    pieces = talk.turn([tool("first"), tool("second")], "done")
    assert [piece.role for piece in pieces] == ["assistant", "tool", "tool", "assistant"]
    assert talk.rendered().startswith(talk.text())
    texts = [talk.tokenizer.decode(piece.ids, skip_special_tokens=False) for piece in pieces]
    assert "first" in texts[1]
    assert "second" not in texts[1]
    assert "second" in texts[2]
    assert texts[3].endswith("<|im_start|>assistant\n")


def test_the_past_is_what_was_sampled_not_what_it_reads_like(tokenizers: dict[str, Tokenizer]) -> None:
    """The model spelled a word letter by letter; retokenizing its text would give other ids."""
    tokenizer = tokenizers["chatml"]
    talk = Conversation("chatml", tokenizer)
    talk.turn([user("spell")], "ok")
    letters = [i for letter in "quick" for i in tokenizer.encode(letter, add_special_tokens=False)]
    assert letters != tokenizer.encode("quick", add_special_tokens=False)
    before = talk.log.ids().tolist()
    talk.log.append_sampled(letters, [-1.0] * 5, [0] * 5)
    for piece in talk.renderer.delta([user("next")], None, talk.log.last, talk.ends):
        talk.log.append(piece)
    assert talk.log.ids().tolist()[: len(before) + 5] == before + letters


def test_nothing_new_continues_a_cut_reply_and_opens_another_after_an_ended_one(
    tokenizers: dict[str, Tokenizer],
) -> None:
    talk = Conversation("chatml", tokenizers["chatml"])
    talk.turn([user("count")], "one two", ended=False)
    assert talk.renderer.delta([], None, talk.log.last, talk.ends) == []
    talk.turn([], " three")
    (newline, prompt) = talk.renderer.delta([], None, talk.log.last, talk.ends)
    assert talk.tokenizer.decode(newline.ids) == "\n"
    assert talk.tokenizer.decode(prompt.ids, skip_special_tokens=False) == "<|im_start|>assistant\n"


def test_refusals_are_value_errors(tokenizers: dict[str, Tokenizer]) -> None:
    renderer = DeltaRenderer(tokenizers["hermes"])
    with pytest.raises(ValueError, match="a system message must be the first"):
        renderer.delta([{"role": "system", "content": "now"}], None, 0, frozenset())
    tokenizer = tokenizers["llama3"]
    template = tokenizer._hf.chat_template
    tokenizer._hf.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    try:
        with pytest.raises(ValueError, match="rewrites replies"):
            DeltaRenderer(tokenizer).delta([user("x")], None, 0, frozenset())
    finally:
        tokenizer._hf.chat_template = template
