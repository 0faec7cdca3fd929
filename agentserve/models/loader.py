"""Model directories: reading a Hugging Face checkpoint into a `Decoder`, and writing one back.

Only files are handled here; which tensor goes where is `Decoder.checkpoint_views`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from agentserve.models.config import ModelConfig, token_ids
from agentserve.models.decoder import Decoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_config(model_dir: str | Path) -> ModelConfig:
    """The `config.json` of a model directory; EOS ids come from `generation_config.json` where that names them.

    Raises:
        FileNotFoundError: there is no such directory or no `config.json` in it.
        ValueError: a model that this decoder does not compute.
    """
    directory = Path(model_dir)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory}: no config.json there; give a Hugging Face model directory or 'demo'")
    raw = json.loads((directory / "config.json").read_text())
    generation = directory / "generation_config.json"
    if generation.is_file():
        ids = token_ids(json.loads(generation.read_text()).get("eos_token_id"))
        raw["eos_token_id"] = list(ids) or raw.get("eos_token_id")
    return ModelConfig.from_hf(raw)


def load_model(
    model_dir: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """A `Decoder` with the weights of a model directory (one `model.safetensors` or shards with an index).

    Raises:
        FileNotFoundError: a missing directory, `config.json` or weight file.
        ValueError: tensors that are missing, unknown or of another shape, each named.
    """
    model = Decoder(read_config(model_dir), dtype=dtype, device=device)
    load_weights(model, _checkpoint_tensors(Path(model_dir)))
    return model.requires_grad_(False)


def load_weights(model: Decoder, tensors: Iterable[tuple[str, torch.Tensor]], partial: bool = False) -> None:
    """Copy named checkpoint tensors into the model's permanent storage.

    Args:
        partial: accept that some of the model's tensors are not given (they keep their values).

    Raises:
        ValueError: an unknown name, a wrong shape, or (unless `partial`) missing names.
    """
    views = model.checkpoint_views()
    left = set(views)
    with torch.no_grad():
        for name, tensor in tensors:
            if (view := destination(model, views, name, tensor)) is not None:
                view.copy_(tensor)
                left.discard(name)
    if left and not partial:
        raise ValueError(f"checkpoint lacks {len(left)} tensors, the first is {min(left)!r}")


def destination(
    model: Decoder, views: Mapping[str, torch.Tensor], name: str, tensor: torch.Tensor
) -> torch.Tensor | None:
    """Where a checkpoint tensor goes among the model's `checkpoint_views`; None for one that is derived from others.

    Raises:
        ValueError: an unknown name or a wrong shape.
    """
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.lm_head is None):
        return None  # computed from the configuration, or a second name of the tied embedding
    if name not in views:
        raise ValueError(f"tensor {name!r} is not part of this {model.config.architecture}")
    if views[name].shape != tensor.shape:
        raise ValueError(f"tensor {name!r} has shape {list(tensor.shape)}, this model's is {list(views[name].shape)}")
    return views[name]


def save_model(model: Decoder, model_dir: str | Path) -> None:
    """Write `config.json` and `model.safetensors` with Hugging Face names, in the model's own dtype."""
    directory = Path(model_dir)
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config.to_hf() | {"dtype": str(model.embed_tokens.dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: view.detach().clone() for name, view in model.checkpoint_views().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _checkpoint_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    for file in files:
        path = directory / file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such weight file; only safetensors checkpoints are read")
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (a safetensors handle is no dict)
                yield name, shard.get_tensor(name)
