"""The demo model's tokenizer: a small byte-level BPE in which every digit is a token of its own.

Made from the training conversations, saved in the form transformers reads, chat template included.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agentserve.demo.template import CHAT_TEMPLATE

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_CONTROL = (END_OF_TEXT, TURN_START, TURN_END)
# As in Qwen3, these are tokens of their own but no control tokens: decoding with skip_special_tokens keeps
# them.
_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

# Pieces that merges never cross: a word or punctuation with the space *after* it (so that a word copied from
# a line of its own to the end of a sentence is the same token in both), one digit, or white space.
_PIECES = r"\p{L}+ ?|\p{N}| ?[^\s\p{L}\p{N}]+(?: [^\s\p{L}\p{N}]+)* ?|\s+"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Learn merges from `texts`: a tokenizer of at most `vocab_size` tokens that encodes any text.

    The special tokens have the first ids. Encoding adds nothing; decoding gives back exactly the text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*_CONTROL, *_MARKS],
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer flags all of them as control tokens, whatever their own flag says.
    described = json.loads(tokenizer.to_str())
    for token in described["added_tokens"]:
        token["special"] = token["content"] in _CONTROL
    tokenizer = Tokenizer.from_str(json.dumps(described))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja to `directory`."""
    tokenizer.save_pretrained(str(directory))
