"""Decoders and their checkpoints: configuration, definition, loading and saving."""

from agentserve.layers.attention import PackedStep, PagedStep
from agentserve.models.config import ModelConfig
from agentserve.models.decoder import Decoder
from agentserve.models.loader import DTYPES, destination, load_model, load_weights, read_config, save_model

__all__ = [
    "DTYPES",
    "Decoder",
    "ModelConfig",
    "PackedStep",
    "PagedStep",
    "destination",
    "load_model",
    "load_weights",
    "read_config",
    "save_model",
]
