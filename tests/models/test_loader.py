"""Checkpoints that are damaged or foreign are refused, and the message says which part."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentserve.models import ModelConfig, load_model, read_config, save_model


@pytest.fixture
def copy(checkpoint, tmp_path):
    _, directory = checkpoint("Llama")
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_unknown_architectures_are_named(copy):
    edit_config(copy, architectures=["GPT9ForCausalLM"])
    with pytest.raises(ValueError, match="'GPT9ForCausalLM' is not one of"):
        load_model(copy)


def test_unknown_rope_scalings_are_named(copy):
    edit_config(copy, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
    with pytest.raises(ValueError, match="rope type 'spiral'"):
        load_model(copy)


def test_missing_tensors_are_named(copy):
    edit_tensors(copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors, the first is 'model.layers.1.mlp.up_proj.weight'"):
        load_model(copy)


def test_surplus_tensors_are_named(copy):
    edit_tensors(copy, lambda tensors: tensors.update({"model.extra": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"'model.extra' is not part of this LlamaForCausalLM"):
        load_model(copy)


def test_wrong_shapes_are_named(copy):
    edit_tensors(copy, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \[3\], this model's is \[64\]"):
        load_model(copy)


def test_missing_files_are_named(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such weight file"):
        load_model(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        load_model(copy)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_saved_models_are_what_they_were(family, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    reference, directory = checkpoint(family, tie_word_embeddings=True)
    save_model(load_model(directory), tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert ModelConfig.from_hf(read_config(tmp_path).to_hf()) == read_config(tmp_path)


def test_older_config_spellings_are_read():
    base = {"architectures": ["LlamaForCausalLM"], "vocab_size": 10, "hidden_size": 8, "intermediate_size": 8,
            "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 64}  # fmt: skip
    old = ModelConfig.from_hf(base | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert (old.rope.theta, old.rope.type, old.rope.factor) == (5e5, "linear", 4.0)
    assert ModelConfig.from_hf(base | {"eos_token_id": [3, 4]}).eos_token_ids == (3, 4)
    assert ModelConfig.from_hf(base | {"torch_dtype": "bfloat16"}).dtype == "bfloat16"
