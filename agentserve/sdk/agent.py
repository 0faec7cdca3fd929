"""The agent loop: model turns and tool calls in one append-only session, as typed events or as one result.

`AsyncAgent` is the loop; `Agent` is the same for callers without an event loop. What tools do is in `tools`,
who owns the sandbox in `context`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Unpack

from agentserve.sdk.client import AsyncClient, AsyncSession
from agentserve.sdk.context import Context, SandboxService, SandboxUnavailable, connect, finish
from agentserve.sdk.result import (
    AgentResult,
    AgentStatus,
    Done,
    Event,
    TextDelta,
    ToolCall,
    ToolRecord,
    ToolResult,
    TurnDone,
    TurnRecord,
    turn_record,
)
from agentserve.sdk.sync import BackgroundLoop, Client, Session
from agentserve.sdk.tools import Tool, ToolOutcome, sandbox_tools
from agentserve.sdk.types import (
    AgentserveError,
    CallRequest,
    Delta,
    Message,
    Sampling,
    Turn,
    check_sampling,
)


class AsyncAgent:
    """A model with tools. Every run has a session of its own, and a sandbox of its own if a tool needs one.

    Args:
        client: the server.
        tools: made by `@tool` or `sandbox_tools()`; None gives `sandbox_tools()` when there is a sandbox.
        sandbox: URL of a sandbox service, or a client of one.
        system: the system prompt.
        max_turns: model turns after which a run ends with status `max_turns`.
        sandbox_ttl_s: seconds after which the service deletes a sandbox even if nobody asks.
        session_ttl_s: seconds of idleness after which the server closes a run's session.
        sampling: options of every turn, such as `temperature=0.0`.

    Raises:
        ValueError: two tools of one name, or a sandbox tool without a sandbox.
        TypeError: an unknown sampling option.
    """

    def __init__(
        self,
        client: AsyncClient,
        *,
        tools: Sequence[Tool[Any, Any]] | None = None,
        sandbox: str | SandboxService | None = None,
        system: str | None = None,
        max_turns: int = 8,
        sandbox_ttl_s: float | None = None,
        session_ttl_s: float | None = None,
        **sampling: Unpack[Sampling],
    ):
        if tools is None:
            tools = sandbox_tools() if sandbox is not None else []
        if max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, got {max_turns}")
        check_sampling(sampling)
        self.client = client
        self.tools = {each.name: each for each in tools}
        if len(self.tools) != len(tools):
            raise ValueError(f"tool names must differ, got {[each.name for each in tools]}")
        homeless = [each.name for each in tools if each.needs_sandbox and sandbox is None]
        if homeless:
            raise ValueError(f"tool {homeless[0]!r} runs in a sandbox: give the agent sandbox=URL")
        self.system = system
        self.max_turns = max_turns
        self.sandbox_ttl_s = sandbox_ttl_s
        self.session_ttl_s = session_ttl_s
        self.sampling = sampling
        self._owns_sandbox_client = isinstance(sandbox, str)
        self._sandbox = connect(sandbox)

    async def __aenter__(self) -> AsyncAgent:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections that the agent opened itself (to the sandbox service)."""
        if self._owns_sandbox_client and self._sandbox is not None:
            await self._sandbox.aclose()

    async def run(
        self,
        task: str,
        *,
        files: Mapping[str, bytes] | None = None,
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AgentResult[AsyncSession]:
        """Work on a task to its end.

        Args:
            task: the user's message.
            files: put into the sandbox's working directory, which is then made before the first turn.
            seed: of this run's sampling.
            metadata: kept with the session on the server, and shown to tools.

        Raises:
            AgentserveError: the server refused the request itself (a wrong option, say).
            SandboxRefusal: the sandbox service refused a file of `files` (its path, its size).

        A server or sandbox that fails on the way is no exception but status `infra_error`.
        """
        result: AgentResult[AsyncSession] | None = None
        async for event in self._drive(task, files, seed, metadata, stream=False):
            if isinstance(event, Done):
                result = event.result
        assert result is not None
        return result

    def stream(
        self,
        task: str,
        *,
        files: Mapping[str, bytes] | None = None,
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Like `run`, as events; the last one is `Done`. To stop early, close it (`contextlib.aclosing`)."""
        return self._drive(task, files, seed, metadata, stream=True)

    async def _drive(
        self,
        task: str,
        files: Mapping[str, bytes] | None,
        seed: int | None,
        metadata: Mapping[str, str] | None,
        stream: bool,
    ) -> AsyncGenerator[Event, None]:
        session: AsyncSession | None = None
        context = Context(self._sandbox, files=files, ttl_s=self.sandbox_ttl_s, metadata=metadata)
        turns: list[TurnRecord] = []
        status: AgentStatus = "max_turns"
        error: str | None = None
        complete = False
        try:
            try:
                if files:
                    await context.sandbox()
                session = await self._open(metadata)
                context.session_id = session.id
                messages: list[Message] = [{"role": "user", "content": task}]
                while status == "max_turns" and len(turns) < self.max_turns:
                    reply: Turn | None = None
                    async with aclosing(self._turn(session, messages, seed, stream)) as parts:
                        async for part in parts:
                            if isinstance(part, Delta):
                                yield TextDelta(part.text)
                            else:
                                reply = part
                    assert reply is not None
                    # A cut reply ends the run: a call in it may be cut too.
                    calls = () if reply.finish_reason == "length" else reply.tool_calls
                    for call in calls:
                        yield ToolCall(call.id, call.function.name, call.function.arguments)
                    tools = await self._call_all(calls, context)
                    for record in tools:
                        yield ToolResult(record)
                    turns.append(turn_record(reply, tools))
                    yield TurnDone(turns[-1])
                    failed = [record for record in tools if record.status == "infra_error"]
                    if failed:
                        status, error = "infra_error", f"tool {failed[0].name!r}: {failed[0].text}"
                    elif not calls:
                        status = "length" if reply.finish_reason == "length" else "ok"
                    messages = [_tool_message(record) for record in tools]
            except SandboxUnavailable as failure:
                status, error = "infra_error", str(failure)
            except AgentserveError as failure:
                if failure.code == "context_length_exceeded" and turns:
                    status, error = "length", failure.message
                elif failure.infra:
                    status, error = "infra_error", str(failure)
                else:
                    raise
            complete = True
        finally:
            # Runs on success, error, cancellation and early close alike.
            await finish(self._clean_up(context, None if complete else session))
        text = turns[-1].text if turns else ""
        yield Done(AgentResult(text=text, status=status, turns=tuple(turns), session=session, error=error))

    async def _open(self, metadata: Mapping[str, str] | None) -> AsyncSession:
        schemas = [each.schema for each in self.tools.values()] or None
        return await self.client.session(system=self.system, tools=schemas, metadata=metadata, ttl_s=self.session_ttl_s)

    async def _turn(
        self, session: AsyncSession, messages: list[Message], seed: int | None, stream: bool
    ) -> AsyncGenerator[Delta | Turn, None]:
        sampling = self.sampling if seed is None else Sampling({**self.sampling, "seed": seed})
        if stream:
            async with aclosing(session.stream_turn(messages, **sampling)) as parts:
                async for part in parts:
                    yield part
        else:
            yield await session.turn(messages, **sampling)

    async def _call_all(self, calls: Sequence[CallRequest], context: Context) -> tuple[ToolRecord, ...]:
        """Run the calls at once; the records stand in call order."""
        return tuple(await asyncio.gather(*(self._call(call, context) for call in calls)))

    async def _call(self, call: CallRequest, context: Context) -> ToolRecord:
        name = call.function.name
        if name in self.tools:
            outcome = await self.tools[name].invoke(call.function.arguments, context)
        else:
            known = ", ".join(self.tools) or "none"
            outcome = ToolOutcome(text=f"there is no tool {name!r}; tools are: {known}", status="tool_error")
        return ToolRecord(
            id=call.id,
            name=name,
            arguments=call.function.arguments,
            status=outcome.status,
            text=outcome.text,
            exit_code=outcome.exit_code,
            duration_s=outcome.duration_s,
        )

    async def _clean_up(self, context: Context, session: AsyncSession | None) -> None:
        await context.aclose()
        if session is not None:
            try:
                await session.close()
            except AgentserveError:
                return  # the server is gone, or closes it by its time limit


class Agent:
    """`AsyncAgent` for callers without an event loop; see there for arguments and errors.

    >>> with Client("http://127.0.0.1:8000") as client:
    ...     result = Agent(client, sandbox="http://127.0.0.1:8900").run("What is 12 * 12?")
    """

    def __init__(
        self,
        client: Client,
        *,
        tools: Sequence[Tool[Any, Any]] | None = None,
        sandbox: str | SandboxService | None = None,
        system: str | None = None,
        max_turns: int = 8,
        sandbox_ttl_s: float | None = None,
        session_ttl_s: float | None = None,
        **sampling: Unpack[Sampling],
    ):
        self.background = client.background
        self.asynchronous = AsyncAgent(
            client.asynchronous,
            tools=tools,
            sandbox=sandbox,
            system=system,
            max_turns=max_turns,
            sandbox_ttl_s=sandbox_ttl_s,
            session_ttl_s=session_ttl_s,
            **sampling,
        )

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that the agent opened itself (to the sandbox service)."""
        if not self.background.closed:
            self.background.run(self.asynchronous.aclose())

    def run(
        self,
        task: str,
        *,
        files: Mapping[str, bytes] | None = None,
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AgentResult[Session]:
        """Work on a task to its end. Ctrl-C stops it and deletes its sandbox."""
        work = self.asynchronous.run(task, files=files, seed=seed, metadata=metadata)
        return _with_session(self.background.run(work), self.background)

    def stream(
        self,
        task: str,
        *,
        files: Mapping[str, bytes] | None = None,
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[Event]:
        """Like `run`, as events; the last one is `Done`. Closing the iterator stops the run."""
        events = self.asynchronous.stream(task, files=files, seed=seed, metadata=metadata)
        for event in self.background.iterate(events):
            yield Done(_with_session(event.result, self.background)) if isinstance(event, Done) else event


def _with_session(result: AgentResult[AsyncSession], background: BackgroundLoop) -> AgentResult[Session]:
    session = None if result.session is None else Session(background, result.session)
    return replace(result, session=session)  # pyright: ignore[reportReturnType, reportArgumentType]


def _tool_message(record: ToolRecord) -> Message:
    return {"role": "tool", "tool_call_id": record.id, "content": record.text}
