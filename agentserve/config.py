"""Configuration of the engine and the server. Every field is a flag of `agentserve serve`; defaults live here only."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine: a model on a device, its KV pool and its step budget.

    Field help (the second part of each annotation) becomes the flag's help text.

    Raises:
        ValueError: a field out of range; the message names it.
    """

    model_dir: Annotated[str, "Hugging Face model directory, or 'demo' for the shipped model"]
    device: Annotated[str, "torch device: cpu, cuda, cuda:1"] = "cpu"
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "weights and KV; auto takes the checkpoint's"] = "auto"
    page_size: Annotated[int, "tokens per KV page"] = 16
    kv_tokens: Annotated[int, "tokens the KV pool holds"] = 65536
    max_model_len: Annotated[int, "longest prompt plus output; 0 takes the model's own limit"] = 0
    max_batch_tokens: Annotated[int, "tokens computed in one step"] = 512
    max_running: Annotated[int, "requests in one step"] = 64
    max_waiting: Annotated[int, "requests queued before new ones are refused with 429"] = 1024
    watermark: Annotated[float, "share of pages kept free for running requests when admitting"] = 0.02
    overlap: Annotated[bool, "plan and commit while the device computes"] = True
    threads: Annotated[int, "torch threads for one operation on the CPU; 0 leaves torch's choice"] = 0
    seed: Annotated[int, "seeds the draws of requests that bring no seed"] = 0

    def __post_init__(self) -> None:
        for name in ("page_size", "kv_tokens", "max_batch_tokens", "max_running", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_model_len", "threads", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark must be in [0, 1), got {self.watermark}")
        if self.kv_tokens < self.page_size:
            raise ValueError(f"kv_tokens ({self.kv_tokens}) must hold at least one page ({self.page_size} tokens)")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype must be auto, float32 or bfloat16, got {self.dtype!r}")

    @property
    def num_pages(self) -> int:
        """Pages in the pool, the dummy page not counted."""
        return self.kv_tokens // self.page_size


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP side: where it listens, what it calls the model, how long it waits.

    Raises:
        ValueError: a field out of range; the message names it.
    """

    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[int, "port to listen on; 0 takes a free one"] = 8000
    served_model_name: Annotated[str, "model name in the API; empty takes the directory's name"] = ""
    request_timeout_s: Annotated[float, "seconds after which a request is aborted"] = 600.0
    session_ttl_s: Annotated[float, "seconds after which an idle session is closed"] = 3600.0
    max_sessions: Annotated[int, "open sessions before new ones are refused with 429"] = 4096
    log_level: Annotated[Literal["debug", "info", "warning", "error"], "how much is logged"] = "info"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")
        for name in ("request_timeout_s", "session_ttl_s", "max_sessions"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
