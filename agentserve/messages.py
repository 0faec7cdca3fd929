"""What server and engine send each other: msgspec structs in two tagged unions, packed with msgpack.

Prompts travel as int32 bytes. Nothing here knows HTTP, text or tensors.
"""

from __future__ import annotations

import msgspec

from agentserve.core import SamplingParams, TokenOutput


class Generate(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Run a request.

    Attributes:
        prompt: int32 little-endian token ids.
        namespace: separates caches (tenant, adapter).
        grammar: what the reply may be, an xgrammar structural tag as JSON; None leaves it free. The vocabulary must
            have been sent before.
    """

    request_id: str
    prompt: bytes
    params: SamplingParams
    namespace: str = ""
    grammar: str | None = None


class SetVocabulary(msgspec.Struct, frozen=True, tag=True):
    """What grammars need to know of the tokenizer: xgrammar's serialized `TokenizerInfo`. Sent before the first one."""

    info: str


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request; unknown and finished ids are ignored."""

    request_id: str


class UpdateWeights(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Copy the tensors of a safetensors file image into the model at the next step boundary."""

    call_id: str
    version: int
    payload: bytes


class FlushCache(msgspec.Struct, frozen=True, tag=True):
    """Forget every cached prefix that no request is using."""

    call_id: str


class GetStats(msgspec.Struct, frozen=True, tag=True):
    """Ask for `Stats` as the reply's result."""

    call_id: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the engine process after the current step."""


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's counters and gauges; counters only grow.

    Pages: `pages_total = pages_free + pages_cached + pages_held + pages_retiring`, where held pages are private to
    running requests and retiring ones wait for the last step that may read them.
    """

    pages_total: int
    pages_free: int
    pages_cached: int
    pages_held: int
    pages_retiring: int
    waiting: int
    running: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    generated_tokens: int
    requests: int
    finished: dict[str, int]
    retractions: int
    evicted_pages: int
    weight_version: int
    step_seconds: float
    overlap_wait_seconds: float


class Ready(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The engine can take requests; what the server must know of it."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    weight_version: int
    num_pages: int
    page_size: int
    dtype: str


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """All that one commit made visible."""

    outputs: list[TokenOutput]
    stats: Stats


class Reply(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The answer to a message that carried a `call_id`: an error text, or None and the stats after it."""

    call_id: str
    error: str | None = None
    stats: Stats | None = None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine ends because of this error."""

    error: str


ToEngine = Generate | SetVocabulary | Abort | UpdateWeights | FlushCache | GetStats | Shutdown
FromEngine = Ready | Outputs | Reply | Failed

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)

encode = _encoder.encode
decode_to_engine = _to_engine.decode
decode_from_engine = _from_engine.decode
