"""Which template styles preserve their prefix, and what is shown of those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentserve.demo.template import CHAT_TEMPLATE as DEMO
from agentserve.session.check import CONTEXT, CONVERSATIONS, SHOWN, Difference, TemplateCheck, check_template
from agentserve.tokenizer import Tokenizer
from tests.session.tokenizer_kit import CHATML, HERMES, LLAMA3, byte_level, save

# In the style of Qwen3: reasoning of replies before the last question is dropped.
QWEN3 = """{%- if tools -%}
{{ '<|im_start|>system\\n<tools>\\n' + (tools | tojson) + '\\n</tools><|im_end|>\\n' }}{%- endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set text = m.content or '' -%}{%- set thought = m.reasoning_content or '' -%}
{%- if '</think>' in text -%}
{%- set thought = text.split('</think>')[0].split('<think>')[-1] | trim -%}
{%- set text = text.split('</think>')[-1] | trim -%}
{%- endif -%}
{{ '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and thought -%}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif -%}
{{ text }}
{%- for c in m.tool_calls or [] -%}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' -%}
{{ '<|im_start|>user\\n<tool_response>' + m.content + '</tool_response><|im_end|>\\n' }}
{%- else -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# In the style of Mistral: no system role of its own, the tools stand before the last question, wherever that is.
MISTRAL = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- if tools and loop.index0 == ns.last -%}
{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif -%}
{{ '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' and m.tool_calls -%}
{{ '[TOOL_CALLS]' }}{%- for c in m.tool_calls -%}
{%- if c.id | length != 9 -%}{{ raise_exception('ids have nine characters') }}{%- endif -%}
{{ (c.function | tojson) + c.id }}{%- endfor -%}{{ '</s>' }}
{%- elif m.role == 'assistant' -%}{{ m.content + '</s>' }}
{%- elif m.role == 'tool' -%}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- else -%}{{ raise_exception('no role ' + m.role) }}{%- endif -%}
{%- endfor -%}"""

# A prompt that opens a thought, which the finished reply does not hold.
OPENS_THOUGHT = CHATML.replace("assistant\\n", "assistant\\n<think>\\n")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("models") / "any"
    return Tokenizer(save(directory, byte_level(), "chatml"))


def check(tokenizer: Tokenizer, template: str) -> TemplateCheck:
    tokenizer._hf.chat_template = template
    found = check_template(tokenizer)
    names = [*found.preserved, *(d.conversation for d in found.differences), *found.refused]
    assert sorted(names) == sorted(CONVERSATIONS)
    return found


@pytest.mark.parametrize("template", [CHATML, LLAMA3, HERMES, DEMO])
def test_these_styles_preserve_their_prefix(tokenizer: Tokenizer, template: str) -> None:
    found = check(tokenizer, template)
    assert found.ok, list(found.lines())
    assert {"plain", "system", "tools"} <= set(found.preserved)
    assert all("continues the one before" in line for line in list(found.lines())[: len(found.preserved)])


def shown(difference: Difference) -> tuple[str, str]:
    """What differs, after what both have."""
    same = min(difference.at, CONTEXT)
    assert difference.before[:same] == difference.after[:same]
    assert len(difference.before) <= CONTEXT + SHOWN
    return difference.before[same:], difference.after[same:]


def test_dropped_reasoning_is_found(tokenizer: Tokenizer) -> None:
    found = check(tokenizer, QWEN3)
    assert not found.ok
    assert set(found.preserved) == {"plain", "system", "tools"}
    by_name = {difference.conversation: difference for difference in found.differences}
    for name in ("reasoning in a field", "reasoning in the text"):
        difference = by_name[name]
        assert (difference.messages, difference.added) == (2, ("user",))
        before, after = shown(difference)
        assert before.startswith("<think>\nthought one\n</think>\n\nfirst<|im_end|>")
        assert after.startswith("first<|im_end|>\n<|im_start|>user\ntwo")
    between = by_name["reasoning between tool calls"]  # kept while tools are called, dropped with the next question
    assert (between.messages, between.added) == (4, ("user",))
    text = "\n".join(found.lines())
    assert "reasoning in a field: 2 messages are rendered anew when these follow: user" in text
    assert "<think>\\nthought one" in text


def test_tools_that_move_are_found_and_a_role_that_is_refused_is_said(tokenizer: Tokenizer) -> None:
    found = check(tokenizer, MISTRAL)
    assert {d.conversation for d in found.differences} == {"tools", "reasoning between tool calls"}
    tools = found.differences[0]
    assert (tools.messages, tools.added) == (6, ("user",))
    before, after = shown(tools)
    assert (tools.at, before[:17], after[:6]) == (1, "AVAILABLE_TOOLS][", "INST]o")
    assert list(found.refused) == ["system"]
    assert "no role system" in found.refused["system"]
    assert any("system: refused" in line for line in found.lines())


def test_a_prompt_that_the_reply_does_not_keep_is_found(tokenizer: Tokenizer) -> None:
    assert OPENS_THOUGHT != CHATML
    found = check(tokenizer, OPENS_THOUGHT)
    plain = next(difference for difference in found.differences if difference.conversation == "plain")
    assert (plain.messages, plain.added) == (1, ("assistant",))
    assert shown(plain) == ("<think>\n", "first<|im_end|>\n")
    assert "reasoning in the text" in found.preserved


def test_no_template_or_one_that_refuses_all_is_an_error(tokenizer: Tokenizer) -> None:
    tokenizer._hf.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        check_template(tokenizer)
    tokenizer._hf.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ValueError, match="never"):
        check_template(tokenizer)
