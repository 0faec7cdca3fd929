"""The Python SDK: clients of the server, tools from functions, and the agent loop.

It needs neither torch nor a tokenizer: text and token ids go over HTTP.
"""

from agentserve.sdk.agent import Agent, AsyncAgent
from agentserve.sdk.client import AsyncClient, AsyncSession
from agentserve.sdk.context import Context, Sandbox, SandboxRefusal, SandboxUnavailable
from agentserve.sdk.result import (
    AgentResult,
    Done,
    Event,
    TextDelta,
    ToolCall,
    ToolRecord,
    ToolResult,
    TurnDone,
    TurnRecord,
)
from agentserve.sdk.sync import BackgroundLoop, Client, Session
from agentserve.sdk.tools import InfraError, Tool, ToolOutcome, sandbox_tools, tool
from agentserve.sdk.types import (
    AgentserveError,
    CacheAccount,
    CacheTotal,
    CacheTurn,
    Completion,
    Delta,
    Health,
    Message,
    Sampling,
    SessionLog,
    Turn,
)

__all__ = [
    "Agent",
    "AgentResult",
    "AgentserveError",
    "AsyncAgent",
    "AsyncClient",
    "AsyncSession",
    "BackgroundLoop",
    "CacheAccount",
    "CacheTotal",
    "CacheTurn",
    "Client",
    "Completion",
    "Context",
    "Delta",
    "Done",
    "Event",
    "Health",
    "InfraError",
    "Message",
    "Sampling",
    "Sandbox",
    "SandboxRefusal",
    "SandboxUnavailable",
    "Session",
    "SessionLog",
    "TextDelta",
    "Tool",
    "ToolCall",
    "ToolOutcome",
    "ToolRecord",
    "ToolResult",
    "Turn",
    "TurnDone",
    "TurnRecord",
    "sandbox_tools",
    "tool",
]
