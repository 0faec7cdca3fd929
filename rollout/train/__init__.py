"""The reference trainer: GRPO on trajectories, and the loop that alternates rollouts, updates and
publishing.
"""

from rollout.train.grpo import GRPOConfig, GRPOTrainer, Metrics, group_advantages

__all__ = ["GRPOConfig", "GRPOTrainer", "Metrics", "group_advantages"]
