"""The loop of a synchronous trainer: collect groups, update, publish, again. Also: how good is the policy now.

Everything it does is in other modules; this is the order.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from agentserve.sdk import Client
from rollout.coordinator import Rollout
from rollout.train.grpo import GRPOTrainer, Metrics
from rollout.trajectory import Group
from rollout.weights import publish_weights


@dataclass(frozen=True)
class StepReport:
    """One step of `reinforce`: from 1, the version its weights were published as, and the seconds of each part."""

    step: int
    version: int
    metrics: Metrics
    rollout_s: float
    train_s: float
    publish_s: float


def reinforce(
    rollout: Rollout, trainer: GRPOTrainer, engine: Client, batches: Iterable[Sequence[Any]]
) -> Iterator[StepReport]:
    """Train on each batch of tasks in turn, yielding after each step.

    Every batch is sampled by the weights that the step before published, so trajectories are on-policy. The seed of
    a step's sampling follows from the rollout's seed and the step, so a task may come again.

    Args:
        rollout: inside its `with`.
        engine: where the rollout's tokens are sampled, and the new weights go.
    """
    version = engine.health().weight_version
    for step, tasks in enumerate(batches, 1):
        started = time.monotonic()
        groups = rollout.collect(tasks, seed=rollout.seed * 1_000_003 + step)
        collected = time.monotonic()
        metrics = trainer.step(groups)
        trained = time.monotonic()
        version += 1
        publish_weights(engine, trainer.model, version)
        published = time.monotonic()
        yield StepReport(step, version, metrics, collected - started, trained - collected, published - trained)


@dataclass(frozen=True)
class Evaluation:
    """Rewards of attempts at held-out tasks, by task, in the order of the tasks."""

    groups: tuple[Group, ...]

    @property
    def rewards(self) -> list[float]:
        """Of every attempt that infrastructure did not break."""
        return [reward for group in self.groups for reward in group.rewards]

    @property
    def mean(self) -> float:
        """Mean reward. Raises ValueError when every attempt failed for reasons of infrastructure."""
        if not self.rewards:
            raise ValueError("no attempt could be evaluated: the infrastructure failed in all of them")
        return sum(self.rewards) / len(self.rewards)


def evaluate(rollout: Rollout, tasks: Sequence[Any], *, attempts: int = 1, seed: int = 0) -> Evaluation:
    """Attempt each task `attempts` times with the engine's current weights, always with the same seeds."""
    return Evaluation(tuple(rollout.collect(tasks, group_size=attempts, seed=seed)))
