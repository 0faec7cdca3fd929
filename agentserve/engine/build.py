"""Putting an engine together from its configuration: model, runner and scheduler, the same for process and `LLM`."""

from __future__ import annotations

from pathlib import Path

from agentserve.config import EngineConfig
from agentserve.engine.runner import ModelRunner, resolve_max_len
from agentserve.scheduler import Scheduler


def build_engine(config: EngineConfig, model_dir: Path) -> tuple[Scheduler, ModelRunner]:
    """Load the model and make the scheduler that runs on it.

    Raises:
        FileNotFoundError: no such model directory or weight file.
        ValueError: a model or a setting that cannot be served; the message names it.
    """
    runner = ModelRunner.from_config(config, model_dir)
    model_config = runner.model.config
    scheduler = Scheduler(
        runner,
        num_pages=config.num_pages,
        page_size=config.page_size,
        max_len=resolve_max_len(config, model_config.max_position),
        vocab_size=model_config.vocab_size,
        eos_ids=model_config.eos_token_ids,
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        watermark=config.watermark,
        overlap=config.overlap,
        seed=config.seed,
    )
    return scheduler, runner
