"""The demo model's chat template: ChatML with tools, in the manner of Qwen3.

It is append-only: what it renders for `messages[:k]` begins what it renders for every longer list. For that,
the user turn that gathers tool results stays open until something else follows (a message, or the generation
prompt).
"""

CHAT_TEMPLATE = r"""{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content is not none and content is defined -%}
{%- for part in content -%}
{%- if part.type != 'text' -%}
{{ raise_exception('content parts must be of type text, not ' ~ part.type) }}
{%- endif -%}
{{ part.text }}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set state = namespace(open=false) -%}
{%- for message in messages -%}
{%- if state.open and message.role != 'tool' -%}
{{ '<|im_end|>\n' }}{%- set state.open = false -%}
{%- endif -%}
{%- if loop.first and (tools or message.role == 'system') -%}
{{ '<|im_start|>system\n' }}
{%- if message.role == 'system' -%}{{ text_of(message.content) }}{%- endif -%}
{%- if tools -%}
{%- if message.role == 'system' -%}{{ '\n\n' }}{%- endif -%}
{{ '# Tools\n\n<tools>' }}
{%- for tool in tools -%}{{ '\n' ~ (tool | tojson) }}{%- endfor -%}
{{ '\n</tools>\n\nCall a tool like this:\n<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>' }}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- if message.role == 'system' -%}
{%- if not loop.first -%}{{ '<|im_start|>system\n' ~ text_of(message.content) ~ '<|im_end|>\n' }}{%- endif -%}
{%- elif message.role == 'user' -%}
{{ '<|im_start|>user\n' ~ text_of(message.content) ~ '<|im_end|>\n' }}
{%- elif message.role == 'assistant' -%}
{%- set content = text_of(message.content) -%}
{{ '<|im_start|>assistant\n' }}
{%- if message.reasoning_content is string and message.reasoning_content -%}
{{ '<think>\n' ~ message.reasoning_content ~ '\n</think>\n\n' }}
{%- endif -%}
{{ content }}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
{%- if content or not loop.first -%}{{ '\n' }}{%- endif -%}
{{ '<tool_call>\n{"name": "' ~ function.name ~ '", "arguments": ' }}
{%- if function.arguments is string -%}{{ function.arguments }}
{%- else -%}{{ function.arguments | tojson }}{%- endif -%}
{{ '}\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- elif message.role == 'tool' -%}
{{ '\n' if state.open else '<|im_start|>user\n' }}
{{- '<tool_response>\n' ~ text_of(message.content) ~ '\n</tool_response>' }}
{%- set state.open = true -%}
{%- else -%}
{{ raise_exception('role must be system, user, assistant or tool, not ' ~ message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if state.open -%}{{ '<|im_end|>\n' }}{%- endif -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}"""
"""Jinja over `messages`, `tools` and `add_generation_prompt`; it needs `tojson` and `raise_exception`."""
