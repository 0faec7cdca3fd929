"""Isolated machines for agents: a service of its own, and its clients. Imports nothing from agentserve or rollout."""

from sandbox.client import AsyncSandboxClient, SandboxClient
from sandbox.schema import (
    Capabilities,
    ExecEvent,
    ExecResult,
    FileInfo,
    Health,
    Limits,
    SandboxError,
    SandboxInfo,
)

__all__ = [
    "AsyncSandboxClient",
    "Capabilities",
    "ExecEvent",
    "ExecResult",
    "FileInfo",
    "Health",
    "Limits",
    "SandboxClient",
    "SandboxError",
    "SandboxInfo",
]
