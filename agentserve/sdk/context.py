"""What one agent run owns: its sandbox, made when first needed and deleted with the run, and what tools may
ask.

Sandboxes are reached by HTTP through `sandbox.client` only; the client is imported when a URL is first used.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class SandboxUnavailable(Exception):
    """The sandbox service failed, lost the sandbox or could not be reached: not the agent's doing."""


class SandboxRefusal(Exception):
    """The sandbox service refused a call as such: a path outside the workspace, no such file, too large."""


class ExecOutcome(Protocol):
    """What came of a command in a sandbox (`sandbox.client.ExecResult`)."""

    @property
    def status(self) -> str: ...
    @property
    def exit_code(self) -> int | None: ...
    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...
    @property
    def reason(self) -> str | None: ...


class SandboxService(Protocol):
    """The part of `sandbox.client.AsyncSandboxClient` that agents use."""

    async def create(self, *, ttl_s: float | None = None) -> Any: ...
    async def exec(
        self,
        sandbox_id: str,
        command: str | list[str],
        *,
        stdin: Any = None,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
        timeout_s: float | None = None,
    ) -> ExecOutcome: ...
    async def write_file(self, sandbox_id: str, path: str, data: bytes) -> Any: ...
    async def read_file(self, sandbox_id: str, path: str) -> bytes: ...
    async def delete(self, sandbox_id: str) -> Any: ...
    async def aclose(self) -> Any: ...


class Sandbox:
    """One sandbox of a run. Calls raise `SandboxRefusal` or `SandboxUnavailable`."""

    def __init__(self, service: SandboxService, sandbox_id: str):
        self.service = service
        self.id = sandbox_id

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        stdin: str | bytes | None = None,
        timeout_s: float | None = None,
    ) -> ExecOutcome:
        """Run a command (a string runs in a shell) and return its status, exit code and output."""
        argv = command if isinstance(command, str) else list(command)
        return await self._guard(self.service.exec(self.id, argv, stdin=stdin, timeout_s=timeout_s))

    async def write_file(self, path: str, data: bytes) -> None:
        """Put a file; a relative path is relative to the working directory."""
        await self._guard(self.service.write_file(self.id, path, data))

    async def read_file(self, path: str) -> bytes:
        """Get a file's bytes."""
        return await self._guard(self.service.read_file(self.id, path))

    async def _guard(self, call: Coroutine[Any, Any, T]) -> T:
        try:
            return await call
        except Exception as error:
            message = f"sandbox {self.id}: {error or type(error).__name__}"
            raise (SandboxRefusal if _is_refusal(error) else SandboxUnavailable)(message) from error


class Context:
    """Handed to tools whose first parameter is annotated `Context`: the run they belong to.

    Attributes:
        session_id: the session that the tool call belongs to.
        metadata: what the caller of `run` attached to the run.
    """

    def __init__(
        self,
        service: SandboxService | None = None,
        *,
        session_id: str = "",
        files: Mapping[str, bytes] | None = None,
        ttl_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ):
        self.session_id = session_id
        self.metadata = dict(metadata or {})
        self._service = service
        self._files = dict(files or {})
        self._ttl_s = ttl_s
        self._sandbox: Sandbox | None = None
        self._creating = asyncio.Lock()
        self._closed = False

    async def sandbox(self) -> Sandbox:
        """The run's sandbox, created (with the run's files in it) at the first call.

        Raises:
            SandboxUnavailable: the service failed, or the agent has none.
        """
        async with self._creating:
            if self._closed:
                raise SandboxUnavailable("this run is over and its sandbox deleted")
            if self._sandbox is None:
                if self._service is None:
                    raise SandboxUnavailable("this agent has no sandbox: give Agent(..., sandbox=URL)")
                # Not cancellable half-way: an answer that nobody waits for would leave a sandbox behind.
                self._sandbox = await finish(self._create(self._service))
            box, files, self._files = self._sandbox, self._files, {}
            await asyncio.gather(*(box.write_file(path, data) for path, data in files.items()))
            return box

    async def _create(self, service: SandboxService) -> Sandbox:
        options: dict[str, Any] = {} if self._ttl_s is None else {"ttl_s": self._ttl_s}
        try:
            sandbox = Sandbox(service, (await service.create(**options)).id)
        except Exception as error:
            raise SandboxUnavailable(f"no sandbox could be created: {error or type(error).__name__}") from error
        self._sandbox = sandbox
        return sandbox

    async def aclose(self) -> None:
        """Delete the sandbox, if there is one. A service that fails now will do it by its time limit."""
        self._closed = True
        if self._service is not None and self._sandbox is not None:
            try:
                await self._service.delete(self._sandbox.id)
            except Exception:
                return
            finally:
                self._sandbox = None


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even when the caller is cancelled meanwhile; the cancellation comes after
    it.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _is_refusal(error: Exception) -> bool:
    """By the service's HTTP status: what it found wrong with the call, not with itself or the sandbox's
    life.
    """
    status, kind = getattr(error, "status", None), getattr(error, "type", None)
    return status in (400, 403, 409, 413) or (status == 404 and kind == "file_not_found")


def connect(sandbox: str | SandboxService | None) -> SandboxService | None:
    """A sandbox service from its URL; anything else is passed through."""
    if not isinstance(sandbox, str):
        return sandbox
    from sandbox.client import AsyncSandboxClient

    return AsyncSandboxClient(sandbox)
