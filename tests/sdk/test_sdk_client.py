import asyncio
import concurrent.futures
import json
import subprocess
import sys
import threading
from typing import Any

import httpx
import pytest
import torch
from fake_server import END, FakeServer, Refusal
from safetensors.torch import load

from agentserve.sdk import AgentserveError, AsyncClient, BackgroundLoop, Client, Delta, Turn


def echo(messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    return f"you said {messages[-1]['content']}"


async def test_a_session_from_opening_to_close():
    server = FakeServer(echo)
    async with AsyncClient("http://fake", transport=server.transport()) as client:
        assert (await client.health()).weight_version == 0
        assert await client.models() == ["fake"]
        assert await client.stats() == {"steps": 3}
        session = await client.session(system="Be brief.", metadata={"run": "1"}, ttl_s=60)
        assert server.sessions[session.id].opening == {
            "system": "Be brief.",
            "metadata": {"run": "1"},
            "ttl_s": 60,
        }
        first = await session.turn("hello", return_token_ids=True, logprobs=True, temperature=0.5)
        assert first.text == "you said hello"
        assert first.finish_reason == "stop"
        assert first.token_ids == [ord(c) for c in "you said hello" + END]
        assert first.logprobs is not None
        assert len(first.logprobs) == len(first.token_ids)
        second = await session.turn([{"role": "user", "content": "again"}])
        assert second.token_ids is None
        assert second.report.cached == first.report.prompt + len(first.token_ids)
        assert second.report.prompt == second.report.cached + second.report.computed
        await session.turn(token_ids=[104, 105])
        log = await session.log(tokens=True)
        assert [entry.turn for entry in log.turns] == [0, 1, 2]
        assert log.token_ids is not None
        assert log.loss_mask is not None
        assert len(log.token_ids) == len(log.loss_mask)
        sampled = [i for i, flag in zip(log.token_ids, log.loss_mask, strict=True) if flag]
        assert sampled[: len(first.token_ids)] == first.token_ids
        assert (await session.log()).token_ids is None
        assert [entry["status"] for entry in await client.sessions()] == ["open"]
        await session.close()
        await session.close()
        assert server.open_sessions() == []
    assert server.bodies[0] == {
        "messages": [{"role": "user", "content": "hello"}],
        "return_token_ids": True,
        "logprobs": True,
        "temperature": 0.5,
    }


async def test_streaming_gives_the_same_turn():
    server = FakeServer(echo)
    async with AsyncClient("http://fake", transport=server.transport()) as client:
        parts = [part async for part in (await client.session()).stream_turn("hello")]
        whole = await (await client.session()).turn("hello")
    assert isinstance(parts[-1], Turn)
    assert "".join(part.text for part in parts[:-1]) == whole.text
    assert all(isinstance(part, Delta) for part in parts[:-1])
    assert parts[-1].message == whole.message
    assert parts[-1].usage == whole.usage


async def test_errors_carry_status_type_field_and_message():
    server = FakeServer(echo)
    async with AsyncClient("http://fake", transport=server.transport(), retries=2) as client:
        session = await client.session()
        with pytest.raises(AgentserveError, match="temperature must be 0 or more") as caught:
            await session.turn("x", temperature=-1.0)
        assert (caught.value.status, caught.value.param) == (400, "temperature")
        assert caught.value.type == "invalid_request_error"
        assert not caught.value.infra
        with pytest.raises(TypeError, match="unknown sampling option 'temprature'"):
            await session.turn("x", temprature=1.0)  # pyright: ignore
        with pytest.raises(TypeError, match="exactly one"):
            await session.turn("x", token_ids=[1])
        server.failures = [Refusal(429, "queue full")] * 2
        assert (await session.turn("patience")).text == "you said patience"
        server.failures = [Refusal(429, "queue full")] * 3
        with pytest.raises(AgentserveError) as caught:
            await session.turn("no more patience")
        assert caught.value.status == 429
        server.failures = [Refusal(429, "queue full")] * 2
        assert [part async for part in session.stream_turn("patience")][-1].text == "you said patience"
        server.failures = [Refusal(503, "engine died")]
        with pytest.raises(AgentserveError, match="engine died") as caught:
            [part async for part in session.stream_turn("x")]
        assert caught.value.infra
        await session.close()
        with pytest.raises(AgentserveError) as caught:
            await session.turn("x")
        assert caught.value.status == 410


async def test_a_server_that_is_not_there_and_one_that_breaks_off():
    async with AsyncClient("http://127.0.0.1:9") as client:
        with pytest.raises(AgentserveError, match=r"127\.0\.0\.1:9") as caught:
            await client.health()
        assert caught.value.infra

    def half(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("turns"):
            error = {"error": {"message": "engine died", "type": "server_error"}}
            failed = "x" in request.content.decode()
            return httpx.Response(200, text=f"data: {json.dumps(error)}\n\n" if failed else 'data: {"text":"a"}\n\n')
        return httpx.Response(201, json={"id": "sess_1"}) if request.method == "POST" else httpx.Response(200)

    async with AsyncClient("http://fake", transport=httpx.MockTransport(half)) as client:
        session = await client.session()
        with pytest.raises(AgentserveError, match="ended before the reply was complete"):
            [part async for part in session.stream_turn("b")]
        with pytest.raises(AgentserveError, match="engine died"):
            [part async for part in session.stream_turn("x")]
        with pytest.raises(AgentserveError, match="something else than expected"):
            await client.stats()


async def test_an_unhealthy_server_is_an_answer():
    reply = httpx.Response(503, json={"status": "unhealthy", "reason": "engine died"})
    async with AsyncClient("http://fake", transport=httpx.MockTransport(lambda _: reply)) as client:
        assert (await client.health()).reason == "engine died"


async def test_completions():
    server = FakeServer(echo)
    async with AsyncClient("http://fake", transport=server.transport()) as client:
        assert (await client.complete("abc")).text == "cba"
        done = await client.complete([97, 98], return_token_ids=True)
        assert done.token_ids == [98, 97]


def test_weights_travel_as_safetensors():
    server = FakeServer(echo)
    with Client("http://fake", transport=server.transport()) as client:
        fused = torch.arange(12.0).reshape(4, 3)
        assert client.update_weights(3, {"a": fused[:2], "b": fused[2:], "c": fused.T}) == 3
        version, data = server.weights[0]
        assert version == 3
        tensors = load(data)
        assert torch.equal(tensors["a"], fused[:2])
        assert torch.equal(tensors["c"], fused.T)
        assert client.update_weights(4, data) == 4
        with pytest.raises(AgentserveError, match="greater than 4") as caught:
            client.update_weights(4, data)
        assert caught.value.param == "version"
        client.flush_cache()
        assert server.flushes == 1


def test_the_sync_client_says_the_same():
    server = FakeServer(echo)
    with Client("http://fake", transport=server.transport()) as client:
        assert client.health().status == "ok"
        assert client.models() == ["fake"]
        assert client.stats() == {"steps": 3}
        assert client.complete("ab").text == "ba"
        with client.session(system="s") as session:
            assert session.turn("hello").text == "you said hello"
            parts = list(session.stream_turn("more"))
            assert parts[-1].text == "you said more"
            assert len(session.log(tokens=True).turns) == 2
        assert client.sessions()[0]["status"] == "closed"
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.health()
    assert not [t for t in threading.enumerate() if t.name == "agentserve-sdk"]


def test_the_background_loop_refuses_to_wait_for_itself_and_cleans_up():
    loop = BackgroundLoop()
    cleaned = threading.Event()

    async def inside() -> None:
        with pytest.raises(RuntimeError, match="own event loop"):
            loop.run(asyncio.sleep(0))

    async def count() -> Any:
        try:
            for index in range(100):
                yield index
        finally:
            cleaned.set()

    loop.run(inside())
    items = loop.iterate(count())
    assert [next(items), next(items)] == [0, 1]
    items.close()  # pyright: ignore
    assert cleaned.is_set()

    # Another thread that waits when the loop is closed is told, not left waiting.
    told: list[BaseException] = []

    def wait() -> None:
        try:
            loop.run(asyncio.sleep(60))
        except BaseException as error:
            told.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    loop.run(asyncio.sleep(0.05))
    loop.close()
    waiter.join(timeout=10)
    assert [type(error) for error in told] == [concurrent.futures.CancelledError]


def test_the_sdk_loads_without_torch():
    code = "import sys, agentserve.sdk; print([m for m in ('torch', 'transformers', 'fastapi') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
