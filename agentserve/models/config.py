"""What a decoder needs to know about itself, read from a Hugging Face `config.json`.

`ModelConfig` is the union of the four families' dials (biases, q/k norms, windows, rope); the families differ
here and nowhere else. Weights and files are the loader's business.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agentserve.layers.rotary import ROPE_TYPES, RopeConfig

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shape and dials of one decoder. `windows[i]` is layer i's sliding window in tokens, or None for all."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Read the dictionary of a `config.json`.

        Raises:
            ValueError: an architecture, activation or rope scaling that this decoder does not compute.
        """
        names = config.get("architectures") or ["none"]
        if names[0] not in ARCHITECTURES:
            raise ValueError(f"config.json: architecture {names[0]!r} is not one of {sorted(ARCHITECTURES)}")
        family = ARCHITECTURES[names[0]]
        if (activation := config.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"config.json: hidden_act {activation!r} is not supported, only 'silu'")
        heads = config["num_attention_heads"]
        layers = config["num_hidden_layers"]
        attention_bias = bool(config.get("attention_bias", False)) and family in ("llama", "qwen3")
        eos = config.get("eos_token_id")
        return cls(
            architecture=names[0],
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position=config.get("max_position_embeddings", 2048),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=_rope(config),
            windows=_windows(config, family, layers),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            eos_token_ids=token_ids(eos),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `from_hf` and transformers read back as this model."""
        rope: dict[str, Any] = {"rope_theta": self.rope.theta, "rope_type": self.rope.type}
        if self.rope.type != "default":
            rope["factor"] = self.rope.factor
        if self.rope.type in ("llama3", "yarn"):
            rope["original_max_position_embeddings"] = self.rope.original_max_position
        if self.rope.type == "llama3":
            rope |= {
                "low_freq_factor": self.rope.low_freq_factor,
                "high_freq_factor": self.rope.high_freq_factor,
            }
        if self.rope.type == "yarn":
            rope |= {"beta_fast": self.rope.beta_fast, "beta_slow": self.rope.beta_slow}
            rope |= {"truncate": self.rope.truncate}
            optional = {name: getattr(self.rope, name) for name in ("mscale", "mscale_all_dim", "attention_factor")}
            rope |= {name: value for name, value in optional.items() if value is not None}
        window = next((w for w in self.windows if w is not None), None)
        family = ARCHITECTURES[self.architecture]
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_embeddings,
            "dtype": self.dtype,
            "eos_token_id": list(self.eos_token_ids) if len(self.eos_token_ids) != 1 else self.eos_token_ids[0],
        }
        if family in ("llama", "qwen3"):
            config["attention_bias"] = self.o_bias
        if family == "llama":
            config["mlp_bias"] = self.mlp_bias
        if family != "llama":
            config["sliding_window"] = window
        if family in ("qwen2", "qwen3"):
            config["use_sliding_window"] = window is not None
            config["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in self.windows]
        return config


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """An `eos_token_id` entry (absent, one id, or a list of ids) as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _rope(config: dict[str, Any]) -> RopeConfig:
    # transformers 5 writes rope_parameters; older checkpoints write rope_theta beside rope_scaling
    raw = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"config.json: rope type {kind!r} is not one of {ROPE_TYPES}")
    max_position = config.get("max_position_embeddings", 2048)
    original = raw.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    factor = raw.get("factor")
    if kind == "yarn" and factor is None:
        factor = max_position / (original or max_position)
    return RopeConfig(
        theta=float(raw.get("rope_theta") or config.get("rope_theta") or 10000.0),
        type=kind,
        factor=float(factor or 1.0),
        original_max_position=int(original or max_position),
        low_freq_factor=float(raw.get("low_freq_factor", 1.0)),
        high_freq_factor=float(raw.get("high_freq_factor", 4.0)),
        beta_fast=float(raw.get("beta_fast") or 32.0),
        beta_slow=float(raw.get("beta_slow") or 1.0),
        mscale=raw.get("mscale"),
        mscale_all_dim=raw.get("mscale_all_dim"),
        attention_factor=raw.get("attention_factor"),
        truncate=bool(raw.get("truncate", True)),
    )


def _windows(config: dict[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    if family == "llama":
        return (None,) * layers
    if family == "mistral":
        return (config.get("sliding_window", 4096),) * layers
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in types)
