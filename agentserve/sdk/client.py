"""The asynchronous client: sessions, completions, weights. All requests of the SDK are built and read here.

`sync` wraps these classes for callers without an event loop; what an agent does with them is in `agent`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack

import httpx
import msgspec

from agentserve.sdk.types import (
    AgentserveError,
    CacheAccount,
    Completion,
    Delta,
    Health,
    Message,
    Sampling,
    SessionLog,
    Turn,
    Usage,
    check_sampling,
)

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
MAX_RETRY_WAIT_S = 30.0


class AsyncClient:
    """A connection to one agentserve server.

    Args:
        url: the server's address, such as `http://127.0.0.1:8000`.
        timeout_s: seconds without a byte from the server after which a request fails.
        retries: how often a request refused with 429 (full queue) is sent again, after its Retry-After.
        transport: an httpx transport, for tests.

    Raises (all methods):
        AgentserveError: the server refused, broke off or could not be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 600.0,
        retries: int = 8,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        self.url = url.rstrip("/")
        self.retries = retries
        self._model: str | None = None
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            transport=transport,
            trust_env=False,
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. Sessions stay open on the server."""
        await self._http.aclose()

    async def health(self) -> Health:
        """State of the server and its engine. An unhealthy server is an answer here, not an error."""
        response = await self._send("GET", "/health", accept=(503,))
        return _decode(response, Health)

    async def models(self) -> list[str]:
        """Names of the served models."""
        listed = await self._json("GET", "/v1/models", dict[str, Any])
        return [entry["id"] for entry in listed["data"]]

    async def stats(self) -> dict[str, Any]:
        """The engine's counters: pages, tokens computed and cached, steps, retractions."""
        return await self._json("GET", "/v1/stats", dict[str, Any])

    async def session(
        self,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        messages: Sequence[Message] | None = None,
        metadata: Mapping[str, str] | None = None,
        ttl_s: float | None = None,
    ) -> AsyncSession:
        """Open a session. `tools` (OpenAI's form) are fixed for its life; `ttl_s` seconds of idleness close
        it.
        """
        body = {"system": system, "tools": tools, "messages": messages, "metadata": metadata, "ttl_s": ttl_s}
        opened = await self._json("POST", "/v1/sessions", dict[str, Any], body)
        return AsyncSession(self, opened["id"])

    async def sessions(self, sort: Literal["recent", "missed"] | None = None) -> list[dict[str, Any]]:
        """The server's sessions: id, status, turns, last_used, prompt_tokens, cached_tokens, missed_tokens.

        Args:
            sort: `recent` gives the last used first, `missed` those with the most missed tokens; else the oldest.
        """
        query = "" if sort is None else f"?sort={sort}"
        return (await self._json("GET", f"/v1/sessions{query}", dict[str, Any]))["data"]

    async def complete(self, prompt: str | Sequence[int], **sampling: Unpack[Sampling]) -> Completion:
        """Continue a text or a list of token ids, outside any session."""
        options = check_sampling(sampling)
        if options.pop("logprobs", False):
            options["logprobs"] = options.pop("top_logprobs", 0)
        body = {"model": await self._model_name(), "prompt": prompt, **options}
        reply = await self._json("POST", "/v1/completions", dict[str, Any], body)
        choice = reply["choices"][0]
        return Completion(
            text=choice["text"],
            finish_reason=choice["finish_reason"],
            usage=msgspec.convert(reply["usage"], Usage),
            token_ids=choice.get("token_ids"),
            logprobs=(choice.get("logprobs") or {}).get("token_logprobs"),
        )

    async def update_weights(self, version: int, tensors: Mapping[str, torch.Tensor] | bytes) -> int:
        """Put new weights into the running engine, between two steps. Tokens sampled later carry `version`.

        Args:
            version: greater than every version before.
            tensors: all or some tensors by their Hugging Face names, or the bytes of a safetensors file.
        """
        data = tensors if isinstance(tensors, bytes) else _safetensors(tensors)
        response = await self._send(
            "POST",
            "/v1/weights",
            content=data,
            params={"version": str(version)},
            headers={"content-type": "application/octet-stream"},
        )
        return _decode(response, dict[str, int])["version"]

    async def flush_cache(self) -> None:
        """Forget every cached prefix that no running request holds."""
        await self._send("POST", "/v1/cache/flush")

    async def _model_name(self) -> str:
        if self._model is None:
            self._model = (await self.models())[0]
        return self._model

    async def _json(self, method: str, path: str, kind: type[T], body: Mapping[str, Any] | None = None) -> T:
        content = None if body is None else _encode(body)
        headers = None if body is None else {"content-type": "application/json"}
        return _decode(await self._send(method, path, content=content, headers=headers), kind)

    async def _send(self, method: str, path: str, accept: Sequence[int] = (), **options: Any) -> httpx.Response:
        for attempt in range(self.retries + 1):
            try:
                response = await self._http.request(method, path, **options)
            except httpx.HTTPError as error:
                raise _unreachable(self.url, error) from error
            if response.status_code < 400 or response.status_code in accept:
                return response
            if response.status_code != 429 or attempt == self.retries:
                raise _error(response)
            await asyncio.sleep(_retry_after(response))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The `data:` objects of a streamed reply, up to `[DONE]`."""
        options: dict[str, Any] = {"content": _encode(body), "headers": {"content-type": "application/json"}}
        for attempt in range(self.retries + 1):
            try:
                async with self._http.stream("POST", path, **options) as response:
                    if response.status_code < 400:
                        async for line in response.aiter_lines():
                            data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                            if data == "[DONE]":
                                return
                            if data:
                                yield msgspec.json.decode(data, type=dict[str, Any])
                        raise AgentserveError("the stream ended before the reply was complete")
                    await response.aread()
                    if response.status_code != 429 or attempt == self.retries:
                        raise _error(response)
                    wait = _retry_after(response)
            except httpx.HTTPError as error:
                raise _unreachable(self.url, error) from error
            await asyncio.sleep(wait)


class AsyncSession:
    """A handle on a session of the server: an append-only token log that grows by turns."""

    def __init__(self, client: AsyncClient, session_id: str):
        self.client = client
        self.id = session_id

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def turn(
        self,
        messages: str | Sequence[Message] | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        **sampling: Unpack[Sampling],
    ) -> Turn:
        """Append messages (a string is one user message) or token ids, and let the model reply."""
        body = _turn_body(messages, token_ids, sampling)
        return await self.client._json("POST", f"/v1/sessions/{self.id}/turns", Turn, body)

    async def stream_turn(
        self,
        messages: str | Sequence[Message] | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncGenerator[Delta | Turn, None]:
        """Like `turn`, yielding each `Delta` as it is sampled and the whole `Turn` last."""
        body = _turn_body(messages, token_ids, sampling) | {"stream": True}
        # A stream that is left early closes its connection here, and the server aborts the request.
        async with aclosing(self.client._events(f"/v1/sessions/{self.id}/turns", body)) as events:
            async for event in events:
                if "error" in event:
                    raise _error_from(event["error"], 500)
                yield msgspec.convert(event, Turn if event.get("type") == "turn" else Delta)

    async def log(self, *, tokens: bool = False) -> SessionLog:
        """The session's turns and segments; with `tokens`, every id, its mask, logprob and weight version."""
        query = "?tokens=true" if tokens else ""
        return await self.client._json("GET", f"/v1/sessions/{self.id}{query}", SessionLog)

    async def cache(self) -> CacheAccount:
        """What the cache gave each turn, and why it did not give more."""
        return await self.client._json("GET", f"/v1/sessions/{self.id}/cache", CacheAccount)

    async def fork(self, count: int = 1, *, at_turn: int | None = None) -> list[AsyncSession]:
        """Open sessions that begin with this one's first `at_turn` turns (default: all). Costs no compute."""
        body = {"count": count, "at_turn": at_turn}
        forked = await self.client._json("POST", f"/v1/sessions/{self.id}/fork", dict[str, list[str]], body)
        return [AsyncSession(self.client, session_id) for session_id in forked["sessions"]]

    async def rewind(self, to_turn: int) -> None:
        """Keep the first `to_turn` turns only; 0 is before the first."""
        body = {"to_turn": to_turn}
        await self.client._json("POST", f"/v1/sessions/{self.id}/rewind", dict[str, Any], body)

    async def close(self) -> None:
        """Close the session; one that is gone already is no error."""
        try:
            await self.client._send("DELETE", f"/v1/sessions/{self.id}")
        except AgentserveError as error:
            if error.status not in (404, 410):
                raise


def _turn_body(
    messages: str | Sequence[Message] | None, token_ids: Sequence[int] | None, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    if (messages is None) == (token_ids is None):
        raise TypeError("a turn takes either messages or token_ids, exactly one of them")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return {"messages": messages, "token_ids": token_ids, **check_sampling(sampling)}


def _encode(body: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode({key: value for key, value in body.items() if value is not None})


def _decode(response: httpx.Response, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except msgspec.MsgspecError as error:
        message = f"{response.request.url} answered something else than expected: {error}"
        raise AgentserveError(message, status=response.status_code, type="protocol_error") from error


def _error(response: httpx.Response) -> AgentserveError:
    try:
        detail = msgspec.json.decode(response.content, type=dict[str, Any])["error"]
    except (msgspec.MsgspecError, KeyError):
        return AgentserveError(response.text[:500], status=response.status_code, type="http_error")
    return _error_from(detail, response.status_code)


def _error_from(detail: Mapping[str, Any], status: int) -> AgentserveError:
    return AgentserveError(
        str(detail.get("message")),
        status=status,
        type=str(detail.get("type")),
        param=detail.get("param"),
        code=detail.get("code"),
    )


def _unreachable(url: str, error: httpx.HTTPError) -> AgentserveError:
    return AgentserveError(f"no reply from {url}: {error or type(error).__name__}")


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(float(response.headers.get("retry-after", 1.0)), MAX_RETRY_WAIT_S)
    except ValueError:
        return 1.0


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    # Views of a fused weight share storage, which safetensors refuses: each gets its own.
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
