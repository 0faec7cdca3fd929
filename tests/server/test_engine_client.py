"""The client of the engine process: tokens, aborts, calls, full queues, and every way the process can die."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from agentserve.config import EngineConfig
from agentserve.core import SamplingParams
from agentserve.server.engine_client import EngineClient, EngineDead, EngineRefused, QueueFull

FAKE = str(Path(__file__).with_name("fake_engine.py"))
PROMPT = np.arange(10, 50, dtype=np.int32)


@asynccontextmanager
async def engine(*flags: str, **config: int) -> AsyncIterator[EngineClient]:
    settings = EngineConfig(model_dir="none", **config)  # pyright: ignore[reportArgumentType]
    async with EngineClient(settings, command=[sys.executable, FAKE, *flags]) as client:
        yield client


async def ids(client: EngineClient, **params: int) -> list[int]:
    tokens: list[int] = []
    async for output in client.generate(PROMPT, SamplingParams(**params)):  # pyright: ignore[reportArgumentType]
        tokens += output.token_ids
    return tokens


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (what is waited for is another process)
            await asyncio.sleep(0.01)


async def test_tokens_of_many_requests_reach_their_own_readers() -> None:
    async with engine() as client:
        results = await asyncio.gather(*(ids(client, max_tokens=5 + i, seed=i) for i in range(20)))
        assert results == [[(i * 7 + j * 13) % 90 + 3 for j in range(5 + i)] for i in range(20)]
        assert client.in_flight == 0
        stats = await client.stats()
        assert stats.finished == {"length": 20}
        assert client.ready is not None
        assert client.ready.page_size == 16
        assert client.max_len == 2048


async def test_a_stream_that_is_left_aborts_its_request() -> None:
    async with engine("--delay", "0.01") as client:
        with client.generate(PROMPT, SamplingParams(max_tokens=1000)) as stream:
            async for _ in stream:
                break
        await until(lambda: client.latest is not None and client.latest.finished == {"abort": 1})
        task = asyncio.create_task(ids(client, max_tokens=1000))
        await until(lambda: client.latest is not None and client.latest.running == 1)
        reader = client.generate(PROMPT, SamplingParams(max_tokens=1000))
        reader.fail(TimeoutError("late"))
        with pytest.raises(TimeoutError, match="late"):
            await anext(reader)
        with pytest.raises(StopAsyncIteration):
            await anext(reader)
        task.cancel()
        assert client.in_flight == 1  # a cancelled reader that did not close its stream has not ended it
        client.fail_all("cleared")
        await until(lambda: client.latest is not None and client.latest.running == 0)


async def test_calls_change_the_engine_or_say_why_not() -> None:
    async with engine() as client:
        assert await client.update_weights(3, b"weights") == 3
        with pytest.raises(EngineRefused, match="version must be greater than 3, got 2"):
            await client.update_weights(2, b"weights")
        await ids(client, max_tokens=2)
        output = await anext(client.generate(PROMPT, SamplingParams(max_tokens=1)))
        assert output.weight_versions == [3]
        assert output.cached_tokens == 32
        await client.flush_cache()
        assert (await anext(client.generate(PROMPT, SamplingParams(max_tokens=1)))).cached_tokens == 0


async def test_a_full_queue_is_refused_at_once() -> None:
    async with engine("--delay", "0.02", max_running=1, max_waiting=2) as client:
        streams = [client.generate(PROMPT, SamplingParams(max_tokens=100)) for _ in range(3)]
        with pytest.raises(QueueFull, match="max_waiting is 2"):
            client.generate(PROMPT, SamplingParams(max_tokens=100))
        for stream in streams:
            stream.close()
        client.generate(PROMPT, SamplingParams(max_tokens=1)).close()


async def test_killing_the_process_fails_everyone_at_once() -> None:
    async with engine("--delay", "0.01") as client:
        tasks = [asyncio.create_task(ids(client, max_tokens=1000)) for _ in range(5)]
        await until(lambda: client.latest is not None and client.latest.running == 5)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        async with asyncio.timeout(2):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, EngineDead) and "SIGKILL" in str(r) for r in results)
        assert not client.alive
        with pytest.raises(EngineDead, match="SIGKILL"):
            client.generate(PROMPT, SamplingParams())
        with pytest.raises(EngineDead, match="SIGKILL"):
            await client.stats()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ([sys.executable, FAKE, "--fail", "no such model"], "the engine failed: no such model"),
        ([sys.executable, "-c", "raise SystemExit(3)"], "the engine process ended with exit code 3"),
    ],
)
async def test_a_failed_start_says_why(command: list[str], reason: str) -> None:
    client = EngineClient(EngineConfig(model_dir="none"), command=command)
    with pytest.raises(EngineDead, match=reason):
        await client.start()
    assert not client.alive


async def test_a_start_that_takes_too_long_ends_the_process() -> None:
    client = EngineClient(EngineConfig(model_dir="none"), command=[sys.executable, FAKE, "--mute"])
    with pytest.raises(EngineDead, match=r"not ready within 0\.2 s"):
        await client.start(timeout_s=0.2)
    assert client.pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(client.pid, 0)
