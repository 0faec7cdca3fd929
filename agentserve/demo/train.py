"""Make the demo model from nothing: `python -m agentserve.demo.train [--out DIR] [--seed 0] [--steps N]`.

Synthetic conversations, a fixed seed, two threads, the project's own decoder in its packed mode; loss on the
assistant's tokens only. The data is `demonstrate`'s business, the tokenizer `tokenizer`'s.
"""

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast

from agentserve.demo import MODEL_DIR
from agentserve.demo.demonstrate import Conversation, conversations, drills
from agentserve.demo.template import CHAT_TEMPLATE
from agentserve.demo.tokenizer import END_OF_TEXT, TURN_END, save_tokenizer, train_tokenizer
from agentserve.models import Decoder, ModelConfig, PackedStep, save_model

THREADS = 2


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides which model comes out; `tokens_per_step` counts prompt tokens too."""

    seed: int = 0
    steps: int = 1500
    drill_share: float = 0.4
    tokens_per_step: int = 2048
    learning_rate: float = 1.2e-3
    warmup_steps: int = 60
    weight_decay: float = 0.01
    clip: float = 1.0
    vocab_size: int = 1024
    tokenizer_conversations: int = 2000


class Example(msgspec.Struct, frozen=True):
    """One conversation as token ids; `loss[i]` says that id i is an assistant's and is learned."""

    token_ids: list[int]
    loss: list[bool]


def model_config(vocab_size: int, eos_token_ids: list[int]) -> ModelConfig:
    """Return the shape of the demo model: Qwen3, 192 wide, 4 layers, 4 query heads on 2 key heads of 48."""
    return ModelConfig.from_hf(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 48,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "eos_token_id": eos_token_ids,
        }
    )


def render(tokenizer: PreTrainedTokenizerFast, talk: Conversation, upto: int, *, prompt: bool = False) -> str:
    """Return the first `upto` messages of a conversation as text; `prompt` opens the next assistant turn."""
    text = tokenizer.apply_chat_template(
        talk.messages[:upto],
        tools=talk.tools,  # pyright: ignore[reportArgumentType]
        tokenize=False,
        add_generation_prompt=prompt,
    )
    return str(text)


def encode(tokenizer: PreTrainedTokenizerFast, talk: Conversation) -> Example:
    """Return a conversation as it is at serving time: prompts encoded by themselves, replies after them.

    An assistant's turn is learned up to and with `<|im_end|>`; the line break after it belongs to the next
    prompt.
    """
    token_ids: list[int] = []
    loss: list[bool] = []
    done = 0
    for index, message in enumerate(talk.messages):
        if message["role"] != "assistant":
            continue
        start = len(render(tokenizer, talk, index, prompt=True))
        whole = render(tokenizer, talk, index + 1)
        end = whole.rindex(TURN_END) + len(TURN_END)
        for piece, learned in ((whole[done:start], False), (whole[start:end], True)):
            ids = tokenizer.encode(piece, add_special_tokens=False)
            token_ids += ids
            loss += [learned] * len(ids)
        done = end
    return Example(token_ids, loss)


def batches(examples: Iterator[Example], tokens: int) -> Iterator[list[Example]]:
    """Yield lists of whole examples of at least `tokens` tokens together."""
    while True:
        batch: list[Example] = []
        while sum(len(e.token_ids) for e in batch) < tokens:
            batch.append(next(examples))
        yield batch


def loss_of(model: Decoder, batch: list[Example]) -> torch.Tensor:
    """Return the mean cross-entropy over the learned tokens of a packed batch (a scalar, float32)."""
    step = PackedStep.from_lengths([len(e.token_ids) for e in batch])
    token_ids = torch.tensor([i for e in batch for i in e.token_ids])
    # Example by example: its first token is never a target, so no target is asked of the sequence before.
    targets = torch.tensor([i for e in batch for i in range(len(e.loss)) if e.loss[i]])
    offsets = itertools.accumulate((len(e.token_ids) for e in batch), initial=0)
    targets = targets + torch.tensor([o for o, e in zip(offsets, batch, strict=False) for flag in e.loss if flag])
    hidden = model(token_ids, step)[targets - 1]
    return F.cross_entropy(model.logits(hidden), token_ids[targets])


def train(config: TrainConfig, out: Path) -> dict[str, float]:
    """Train and write a model directory to `out`. Return final loss, seconds and parameter count."""
    begun = time.monotonic()
    tokenizer = make_tokenizer(config)
    vocabulary = tokenizer.get_vocab()
    eos = [vocabulary[TURN_END], vocabulary[END_OF_TEXT]]
    model = Decoder(model_config(len(tokenizer), eos), dtype=torch.float32, device="cpu")
    initialize(model, config.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    drilled = round(config.drill_share * config.steps)
    sources = (drills(config.seed), conversations(config.seed))
    practice, lessons = (
        batches((encode(tokenizer, talk) for talk in source), config.tokens_per_step) for source in sources
    )
    average = 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=config.steps)
        for step in range(config.steps):
            loss = loss_of(model, next(practice if step < drilled else lessons))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            schedule.step()
            average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
            progress.update(bar, advance=1, description=f"loss {average:.3f}")
            if not progress.console.is_terminal and step % 50 == 0:
                progress.console.print(f"step {step}  loss {average:.4f}  {time.monotonic() - begun:.0f} s")
    save(model, tokenizer, out)
    seconds = time.monotonic() - begun
    return {"loss": average, "seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}


def initialize(model: Decoder, seed: int) -> None:
    """Draw the first weights, and point two heads of the first layer at the tokens one and two back.

    Copying is done by heads that look for what stood before the current token (induction heads; Olsson et al., 2022),
    and these need a layer below that tells each token its predecessors. Given that layer, the rest is learned in
    minutes. All tokens share one large embedding component, from which the two heads make constant queries and keys:
    rotary positions turn them, and a query turned back by d positions meets the key d positions before it.
    """
    std = 0.05
    model.init_weights(seed, std=std)
    head_dim, half, fast = model.config.head_dim, model.config.head_dim // 2, 6
    angles = model.rotary.inverse_frequencies[:fast]  # the fastest turning pairs tell neighbours apart
    views = model.checkpoint_views()
    layer = "model.layers.0.self_attn"
    with torch.no_grad():
        views["model.embed_tokens.weight"][:, 0] = 8 * std  # the same for all, so tied logits do not feel it
        views[f"{layer}.v_proj.weight"][:, 0] = 0.0
        key = views[f"{layer}.k_proj.weight"][:head_dim]  # the key head that the first two query heads share
        key *= 0.1
        key[:fast, 0] = 1.0
        for head, back in enumerate((1, 2)):
            query = views[f"{layer}.q_proj.weight"][head * head_dim : (head + 1) * head_dim]
            query *= 0.1
            query[:fast, 0] = torch.cos(-back * angles)
            query[half : half + fast, 0] = torch.sin(-back * angles)
        for norm in ("q_norm", "k_norm"):
            views[f"{layer}.{norm}.weight"].fill_(2.0)


def make_tokenizer(config: TrainConfig) -> PreTrainedTokenizerFast:
    """Train the tokenizer on rendered conversations from a seed of its own."""
    # Any tokenizer renders a template; this one exists only for that.
    renderer = train_tokenizer([CHAT_TEMPLATE], vocab_size=300)
    talks = itertools.islice(conversations(config.seed + 1), config.tokenizer_conversations)
    texts = (render(renderer, talk, len(talk.messages)) for talk in talks)
    return train_tokenizer(texts, vocab_size=config.vocab_size)


def save(model: Decoder, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the weights (rounded to bfloat16), the configuration and the tokenizer to the directory `out`."""
    out.mkdir(parents=True, exist_ok=True)
    save_model(copy.deepcopy(model).to(torch.bfloat16), out)
    generation = {
        "eos_token_id": list(model.config.eos_token_ids),
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": True,
        "temperature": 1.0,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, out)


def _rate(step: int, config: TrainConfig) -> float:
    """The learning rate's factor: linear warm-up, then half a cosine down to a hundredth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def main() -> None:
    """Read the command line and train."""
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(prog="python -m agentserve.demo.train", description=train.__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="directory to write (default: the package's)")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--tokens-per-step", type=int, default=defaults.tokens_per_step)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    options = parser.parse_args()
    if options.steps < 1 or options.tokens_per_step < 1:
        parser.error("--steps and --tokens-per-step must be at least 1")
    torch.set_num_threads(THREADS)
    config = TrainConfig(
        seed=options.seed,
        steps=options.steps,
        tokens_per_step=options.tokens_per_step,
        learning_rate=options.learning_rate,
    )
    result = train(config, options.out)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(
        f"{result['parameters']:,.0f} parameters, {size / 1e6:.1f} MB in {options.out}, "
        f"loss {result['loss']:.4f}, {result['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
