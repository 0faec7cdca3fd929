"""Tokenizer directories made on the fly: byte-level BPE and byte-fallback BPE, with chat templates in several
styles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "the quick brown fox jumps over the lazy dog " * 3,
    'user assistant system tool 0 1 2 3 4 5 6 7 8 9 + - = { } " : , name arguments',
    "你好 世界 naïve café — “quotes” 😀 😃 🎉 Привет мир",
    '{"name": "add", "arguments": {"a": 1, "b": 2}}',
]

CHATML = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

LLAMA3 = """{{- '<|begin_of_text|>' -}}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + (m.content or '')|trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""

HERMES = """{%- if tools -%}
{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' -%}{{ messages[0].content + '\\n' }}{%- endif -%}
{{ '<tools>' }}{%- for t in tools -%}{{ '\\n' + (t | tojson) }}{%- endfor -%}{{ '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' -%}
{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' + (m.content or '') }}
{%- for c in m.tool_calls or [] -%}
{{ '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' + (c.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' -%}
{%- if loop.previtem is not defined or loop.previtem.role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- elif m.role == 'system' -%}
{%- if not loop.first -%}{{ raise_exception('a system message must be the first') }}{%- endif -%}
{%- else -%}{{ raise_exception('unknown role ' + m.role) }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

STYLES = {"chatml": CHATML, "llama3": LLAMA3, "hermes": HERMES, "none": None}
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>")  # fmt: skip
MARKS = ("<tool_call>", "</tool_call>")


def byte_level(vocab_size: int = 420, special_marks: bool = False) -> Tokenizer:
    """A byte-level BPE with the control tokens of all styles; every byte string is some token sequence."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    marks = [AddedToken(text, special=special_marks, normalized=False) for text in MARKS]
    (tokenizer.add_special_tokens if special_marks else tokenizer.add_tokens)(marks)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """A SentencePiece-like BPE: words with a leading mark for the space, unknown characters as <0xNN>."""
    words = sorted({c for text in TEXTS for c in text if c.isascii() and not c.isspace()})
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", *words]:
        vocab.setdefault(piece, len(vocab))
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def save(directory: Path, tokenizer: Tokenizer, style: str = "chatml", config: dict[str, Any] | None = None) -> Path:
    """Write a model directory that has a tokenizer, a template and a config.json; weights may lie there already."""
    directory.mkdir(parents=True, exist_ok=True)
    eos = "<|eot_id|>" if style == "llama3" else "<|im_end|>"
    if tokenizer.token_to_id(eos) is None:
        eos = "</s>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, clean_up_tokenization_spaces=False)
    fast.chat_template = STYLES[style]
    fast.save_pretrained(str(directory))
    path = directory / "config.json"
    config = {"model_type": "qwen3"} | (json.loads(path.read_text()) if path.exists() else {}) | (config or {})
    path.write_text(json.dumps(config | {"eos_token_id": tokenizer.token_to_id(eos)}))
    return directory
