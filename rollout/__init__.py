"""Rollouts: episodes of an agent against an engine and a sandbox, as trajectories that a trainer learns from.

Running episodes is `coordinator`, what they leave is `trajectory`, learning from them is `rollout.train`,
and putting the new weights into the running engine is `rollout.weights`. Nothing here needs torch but the
last two.
"""

from rollout.coordinator import Rollout
from rollout.episode import AgentSpec, Episode, Task
from rollout.trajectory import Group, Trajectory

__all__ = ["AgentSpec", "Episode", "Group", "Rollout", "Task", "Trajectory"]
