"""The forward pass of a plan: table writes, model, sampler, on one device and in launch order.

The runner owns the tensors (KV pool, token table, page table, weights) and no policy. On the CPU a worker thread
stands in for the device's stream, so that a launched step runs while the next one is planned.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from agentserve.config import EngineConfig
from agentserve.core import StepPlan, StepResult
from agentserve.engine import sampler
from agentserve.kernels import paged_attention
from agentserve.models import DTYPES, Decoder, PagedStep, destination, load_model, load_weights, read_config


class ModelRunner:
    """Runs plans on a model.

    Args:
        model: the decoder; its parameters stay where they are for the runner's life.
        num_pages, page_size: the KV pool; one dummy page is added.
        max_running, max_len: rows and columns of the token table.
        overlap: run steps on a worker thread; otherwise inside `launch`.
    """

    def __init__(
        self, model: Decoder, *, num_pages: int, page_size: int, max_running: int, max_len: int, overlap: bool
    ):
        config = model.config
        self.model = model
        self.page_size = page_size
        self.device = model.embed_tokens.device
        self.weight_version = 0
        shape = (config.num_layers, num_pages + 1, page_size, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=model.embed_tokens.dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)
        self.token_table = torch.zeros((max_running, max_len), dtype=torch.int64, device=self.device)
        pages = -(-max_len // page_size)
        # read on the host when a step is laid out, so it stays there
        self.page_table = np.full((max_running, pages), num_pages, np.int64)
        self._stream = ThreadPoolExecutor(1, thread_name_prefix="device") if overlap else None

    @classmethod
    def from_config(cls, config: EngineConfig, model_dir: Path) -> ModelRunner:
        """Load a model directory as the configuration says."""
        if config.threads:
            torch.set_num_threads(config.threads)
        model_config = read_config(model_dir)
        name = model_config.dtype if config.dtype == "auto" else config.dtype
        if name not in DTYPES:
            raise ValueError(f"config.json: dtype {name!r} is not served; choose dtype float32 or bfloat16")
        model = load_model(model_dir, dtype=DTYPES[name], device=config.device)
        return cls(
            model,
            num_pages=config.num_pages,
            page_size=config.page_size,
            max_running=config.max_running,
            max_len=resolve_max_len(config, model_config.max_position),
            overlap=config.overlap,
        )

    def launch(self, plan: StepPlan) -> Future[StepResult]:
        """Start a step after all that were launched before it."""
        if self._stream is not None:
            return self._stream.submit(self._run, plan)
        done: Future[StepResult] = Future()
        done.set_result(self._run(plan))
        return done

    def update_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy named checkpoint tensors into the parameters, between two steps; waits until that is done.

        Raises:
            ValueError: an unknown name or a wrong shape; nothing has been copied then.
        """
        views = self.model.checkpoint_views()
        for name, tensor in tensors.items():
            destination(self.model, views, name, tensor)
        if self._stream is not None:
            self._stream.submit(self._copy_weights, version, tensors).result()
        else:
            self._copy_weights(version, tensors)

    def close(self) -> None:
        """Finish launched steps and end the worker thread."""
        if self._stream is not None:
            self._stream.shutdown(wait=True)

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> StepResult:
        start = time.perf_counter()
        for row, at, ids in plan.id_writes:
            self.token_table[row, at : at + len(ids)] = torch.from_numpy(ids).to(self.device)
        for row, at, pages in plan.page_writes:
            self.page_table[row, at : at + len(pages)] = pages
        longest = -(-int(plan.context_lengths.max()) // self.page_size)
        layout = paged_attention.plan(
            plan.query_start,
            plan.context_lengths,
            self.page_table[plan.rows, :longest],
            self.page_size,
            self.device,
        )
        positions = torch.from_numpy(plan.positions).to(self.device)
        slots = torch.from_numpy(plan.write_slots).to(self.device)
        token_ids = self.token_table[torch.from_numpy(plan.token_rows).to(self.device), positions]
        step = PagedStep(self.keys, self.values, positions, slots, layout)
        hidden = self.model(token_ids, step)
        if not plan.samples:
            return StepResult([], [], [], self.weight_version, time.perf_counter() - start)
        last = torch.tensor([sample.token for sample in plan.samples], device=self.device)
        sampled = sampler.sample(self.model.logits(hidden[last]), plan.samples, self.token_table, plan.masks)
        rows = torch.tensor([sample.row for sample in plan.samples], device=self.device)
        columns = torch.tensor([sample.position for sample in plan.samples], device=self.device)
        self.token_table[rows, columns] = sampled.token_ids
        seconds = time.perf_counter() - start
        return StepResult(
            sampled.token_ids.tolist(), sampled.logprobs, sampled.top, self.weight_version, seconds, sampled.unmasked
        )

    def _copy_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        load_weights(self.model, tensors.items(), partial=True)
        self.weight_version = version


def resolve_max_len(config: EngineConfig, max_position: int) -> int:
    """The longest prompt plus output: what the configuration says, the model can and the pool holds.

    Raises:
        ValueError: `max_model_len` is more than the model's positions.
    """
    if config.max_model_len > max_position:
        raise ValueError(f"max_model_len is {config.max_model_len}, the model has {max_position} positions")
    return min(config.max_model_len or max_position, config.num_pages * config.page_size)
