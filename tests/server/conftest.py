"""A real uvicorn on a free port, in a thread, with the fake engine behind it."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from agentserve.config import EngineConfig, ServerConfig
from agentserve.server.app import create_app
from agentserve.server.generation import Serving
from agentserve.tokenizer import Tokenizer
from tests.session.tokenizer_kit import byte_level, save

FAKE = str(Path(__file__).with_name("fake_engine.py"))
ENGINE_FIELDS = set(EngineConfig.__struct_fields__)


@dataclass
class Running:
    """A running server and what tests need of it."""

    url: str
    parts: Serving
    script: Path | None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.parts.tokenizer

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def say(self, *replies: str | list[int], end: str = "<|im_end|>") -> None:
        """What the fake engine answers next, in order; texts end their turn."""
        assert self.script is not None
        ids = [self.tokenizer.encode(r + end, False) if isinstance(r, str) else r for r in replies]
        self.script.write_text(json.dumps(ids))

    def leave(self, path: str, body: dict[str, Any], lines: int = 8, seconds: float = 0.4) -> None:
        """Send a request and close the connection after some lines of the reply, or some seconds without any."""
        with contextlib.suppress(httpx.ReadTimeout), httpx.Client(timeout=seconds, trust_env=False) as http:  # noqa: SIM117
            with http.stream("POST", self.url + path, json=body) as reply:
                for number, _ in enumerate(reply.iter_lines()):
                    if number == lines:
                        return
                raise AssertionError("the reply ended before the client could leave")

    def until(self, condition: Callable[[], Any], seconds: float = 5) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "what was waited for did not happen"
            time.sleep(0.01)


@contextmanager
def serve(
    model_dir: Path, command: list[str] | None = None, script: Path | None = None, **fields: Any
) -> Iterator[Running]:
    """Run a server; `fields` are of either config."""
    engine = EngineConfig(model_dir=str(model_dir), **{k: v for k, v in fields.items() if k in ENGINE_FIELDS})
    server = ServerConfig(port=0, **{k: v for k, v in fields.items() if k not in ENGINE_FIELDS})
    app = create_app(engine, server, engine_command=command)
    runner = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        while not runner.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = runner.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", app.state.serving, script)
    finally:
        runner.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a tokenizer and a Hermes-style template, but no weights."""
    return save(tmp_path_factory.mktemp("models") / "tiny", byte_level(), "hermes")


@pytest.fixture(scope="session")
def fake_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """`fake_server(*flags, delay=…, **config)` → a running server with a fake engine of its own."""
    eos = str(Tokenizer(model_dir).eos_token_ids[0])
    with ExitStack() as stack:

        def make(*flags: str, directory: Path = model_dir, delay: float = 0.0, **fields: Any) -> Running:
            script = tmp_path_factory.mktemp("script") / "replies.json"
            command = [sys.executable, FAKE, "--script", str(script), "--delay", str(delay), "--eos", eos, *flags]
            return stack.enter_context(serve(directory, command, script, **fields))

        yield make


@pytest.fixture(scope="session")
def shared_server(fake_server: Callable[..., Running]) -> Running:
    """One fast server for tests that leave nothing behind."""
    return fake_server(max_model_len=512)


@pytest.fixture
def server(shared_server: Running) -> Running:
    """The shared server with an empty script."""
    assert shared_server.script is not None
    shared_server.script.write_text("[]")
    return shared_server
