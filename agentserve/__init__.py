"""agentserve: a radix-cache engine, its server and its SDK, for people who build and train LLM agents.

`LLM` and `SamplingParams` run the engine in this process; `Client`, `Agent` and `tool` talk to a server. Everything
is imported when first used, so that `import agentserve` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentserve.core import SamplingParams
    from agentserve.engine.llm import LLM, Completion
    from agentserve.sdk import Agent, AsyncClient, Client, sandbox_tools, tool

_HOMES = {
    "LLM": "agentserve.engine.llm",
    "Completion": "agentserve.engine.llm",
    "SamplingParams": "agentserve.core",
    "Agent": "agentserve.sdk",
    "AsyncClient": "agentserve.sdk",
    "Client": "agentserve.sdk",
    "sandbox_tools": "agentserve.sdk",
    "tool": "agentserve.sdk",
}

__all__ = ["LLM", "Agent", "AsyncClient", "Client", "Completion", "SamplingParams", "sandbox_tools", "tool"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'agentserve' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
