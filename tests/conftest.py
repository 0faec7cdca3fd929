"""Shared by all suites: small random checkpoints that transformers and we both read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

logging.getLogger("transformers").setLevel(logging.ERROR)
# the models here are too small to share out, and threads that spin starve the servers under test
torch.set_num_threads(1)

BASE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 7,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def reference_model(family: str, seed: int = 0, **settings: Any) -> Any:
    """A random transformers model whose logits are spread enough that greedy choices are no coin flips."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**(BASE | settings))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.5)
    model.generation_config.eos_token_id = config.eos_token_id
    return model


@torch.no_grad()
def reference_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by the reference's own forward and cache."""
    past, ids, out = None, torch.tensor([prompt]), []
    for _ in range(count):
        step = model(ids, past_key_values=past, use_cache=True)
        past, token = step.past_key_values, int(step.logits[0, -1].argmax())
        out.append(token)
        ids = torch.tensor([[token]])
    return out


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """`checkpoint(family, **settings)` → (transformers model, its directory), made once for the same settings."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(family: str, max_shard_size: str = "5GB", **settings: Any) -> tuple[Any, Path]:
        key = repr((family, max_shard_size, sorted(settings.items(), key=repr)))
        if key not in made:
            model = reference_model(family, **settings)
            directory = tmp_path_factory.mktemp(family.lower())
            model.save_pretrained(directory, max_shard_size=max_shard_size)
            made[key] = model, directory
        return made[key]

    return make
