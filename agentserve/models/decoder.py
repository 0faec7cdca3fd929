"""The decoder: Llama, Mistral, Qwen2 and Qwen3 are this file with different dials.

It is written against `step.attend`: with a `PagedStep` it serves, with a `PackedStep` it trains. It knows neither
pages nor requests, and reads no files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from agentserve.layers.attention import Step
from agentserve.layers.linear import Linear
from agentserve.layers.norm import RMSNorm
from agentserve.layers.rotary import Rotary, rotate
from agentserve.models.config import ModelConfig


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; Qwen3 normalizes each head of q and k first."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.layer = layer
        self.window = config.windows[layer]
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv_proj = Linear(
            config.hidden_size,
            {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size},
            config.qkv_bias,
            dtype,
            device,
        )
        self.o_proj = Linear(q_size, {"o_proj": config.hidden_size}, config.o_bias, dtype, device)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype, device) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype, device) if config.qk_norm else None

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, step: Step) -> torch.Tensor:
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = step.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, self.layer, self.window)
        return self.o_proj(mixed.reshape(x.shape[0], -1))


class MLP(nn.Module):
    """Gated feed-forward: `down(silu(gate(x)) · up(x))` (SwiGLU; Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        size = config.intermediate_size
        parts = {"gate_proj": size, "up_proj": size}
        self.gate_up_proj = Linear(config.hidden_size, parts, config.mlp_bias, dtype, device)
        self.down_proj = Linear(size, {"down_proj": config.hidden_size}, config.mlp_bias, dtype, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.self_attn = Attention(config, layer, dtype, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.mlp = MLP(config, dtype, device)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, step: Step) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, step)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A causal language model. Parameters are allocated once and only ever copied into."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.config = config
        size = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        self.layers = nn.ModuleList(Layer(config, i, dtype, device) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.lm_head = None if config.tie_embeddings else nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        self.rotary = Rotary(config.rope, config.head_dim, device)

    def forward(self, token_ids: torch.Tensor, step: Step) -> torch.Tensor:
        """`token_ids [T]` int64 → final hidden states `[T, hidden]`, normalized, ready for `logits`."""
        x = F.embedding(token_ids, self.embed_tokens)
        cos, sin = self.rotary.at(step.positions, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, step)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden [N, hidden]` → `[N, vocab]` float32."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head).float()

    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Random weights to train from: normal with deviation `std`, biases zero, norms one."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, view in self.checkpoint_views().items():
                if name.endswith("norm.weight"):
                    view.fill_(1.0)
                elif name.endswith(".bias"):
                    view.zero_()
                else:
                    view.copy_(torch.randn(view.shape, generator=generator) * std)

    def checkpoint_views(self) -> dict[str, torch.Tensor]:
        """Every tensor of a Hugging Face checkpoint of this model, by its name there, as a view of our storage.

        Loading, publishing and saving all go through these views: copying into one changes the served weights.
        """
        views = {
            "model.embed_tokens.weight": self.embed_tokens.data,
            "model.norm.weight": self.norm.weight.data,
        }
        if self.lm_head is not None:
            views["lm_head.weight"] = self.lm_head.data
        for path, module in self.layers.named_modules(prefix="model.layers"):
            parent = path.rpartition(".")[0]
            if isinstance(module, Linear):
                views |= {f"{parent}.{name}": view for name, view in module.views().items()}
            elif isinstance(module, RMSNorm):
                views[f"{path}.weight"] = module.weight.data
        return views
