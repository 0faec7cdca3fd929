"""Test your own agents and schedulers without weights: a fake model, its oracle, and the fuzz harness built on them."""

from agentserve.testing.fake_model import EveryNth, FakeRunner, oracle
from agentserve.testing.fuzz import Fuzz, FuzzConfig

__all__ = ["EveryNth", "FakeRunner", "Fuzz", "FuzzConfig", "oracle"]
