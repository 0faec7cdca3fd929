"""The loop: which rows run in the next step, and when its tokens become visible."""

from agentserve.scheduler.scheduler import QueueFull, Runner, Scheduler, StepHandle

__all__ = ["QueueFull", "Runner", "Scheduler", "StepHandle"]
