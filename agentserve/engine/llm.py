"""`LLM`: the engine inside your process, for notebooks, trainers and tests.

The same scheduler and runner as the server's engine process, without sockets. Text goes through
`agentserve.tokenizer`; token ids need no tokenizer at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import torch

from agentserve.config import EngineConfig
from agentserve.core import FINISH_STOP, SamplingParams, TokenOutput
from agentserve.engine.build import build_engine
from agentserve.messages import Stats
from agentserve.scheduler import QueueFull
from agentserve.tokenizer import Detokenizer, Tokenizer, resolve_model_dir

Prompt = str | Sequence[int]


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """What `LLM.generate` gives for one prompt.

    Attributes:
        token_ids: sampled ids, the end token included where there is one.
        text: the reply, without the end token or the stop string; "" if the model has no tokenizer.
        logprobs: of each sampled token, if asked for.
        top_logprobs: the likeliest (id, logprob) pairs at each token, as many as asked for.
        finish_reason: "stop" or "length".
        cached_tokens: prompt tokens whose keys and values were found in the cache.
        weight_versions: the weights that sampled each token.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    logprobs: list[float] | None
    top_logprobs: list[list[tuple[int, float]]] | None
    finish_reason: str
    cached_tokens: int
    weight_versions: list[int]


class _Collector:
    # gathers one request's outputs; a stop string ends it here, where text is known
    def __init__(self, prompt: list[int], params: SamplingParams, tokenizer: Tokenizer | None):
        self.prompt = prompt
        self.params = params
        self.detokenizer = Detokenizer(tokenizer, params.stop) if tokenizer else None
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[list[tuple[int, float]]] = []
        self.versions: list[int] = []
        self.text: list[str] = []
        self.cached = 0
        self.finish_reason: str | None = None

    def push(self, output: TokenOutput) -> bool:
        """Take an output; whether the request has just ended on a stop string and must be aborted."""
        if self.finish_reason is not None:
            return False
        self.cached = output.cached_tokens
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.top += output.top_logprobs
        self.versions += output.weight_versions
        self.finish_reason = output.finish_reason
        if self.detokenizer is not None:
            # the engine stops on ids only, and then the last one is that stop: an id of the reply, but no text
            ids = output.token_ids[:-1] if output.finish_reason == FINISH_STOP else output.token_ids
            self.text.append(self.detokenizer.push(ids))
            if self.detokenizer.stopped:
                self._cut(self.detokenizer.tokens_used)
                ended_by_engine = output.finish_reason is not None
                self.finish_reason = FINISH_STOP
                return not ended_by_engine
            if self.finish_reason is not None:
                self.text.append(self.detokenizer.finish())
        return False

    def _cut(self, count: int) -> None:
        for values in (self.token_ids, self.logprobs, self.top, self.versions):
            del values[count:]

    def completion(self) -> Completion:
        wanted = self.params.logprobs is not None
        return Completion(
            prompt_token_ids=self.prompt,
            token_ids=self.token_ids,
            text="".join(self.text),
            logprobs=self.logprobs if wanted else None,
            top_logprobs=self.top if wanted else None,
            finish_reason=self.finish_reason or "",
            cached_tokens=self.cached,
            weight_versions=self.versions,
        )


class LLM:
    """An engine in this process.

    Args:
        model_dir: a Hugging Face model directory, or "demo" for the shipped model.
        config: any field of `EngineConfig`: device, dtype, page_size, kv_tokens, max_batch_tokens, overlap, …

    Raises:
        FileNotFoundError: no such model.
        TypeError, ValueError: an unknown or impossible setting; the message names it.
    """

    def __init__(self, model_dir: str, **config: Any):
        self.config = EngineConfig(model_dir=str(model_dir), **config)
        self._directory = resolve_model_dir(self.config.model_dir)
        self.scheduler, self.runner = build_engine(self.config, self._directory)
        self._requests = 0
        self._closed = False

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model directory's tokenizer, loaded when first used."""
        return Tokenizer(self._directory)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        namespace: str = "",
    ) -> list[Completion]:
        """Complete prompts (texts or token ids), batched together; results in the prompts' order.

        One `SamplingParams` serves all prompts; a sequence gives one to each. An interrupted call aborts its requests.

        Raises:
            ValueError: a prompt that is empty, too long or has ids outside the vocabulary, and which one.
        """
        listed = _as_list(prompts)
        given = [params or SamplingParams()] * len(listed) if not isinstance(params, Sequence) else list(params)
        if len(given) != len(listed):
            raise ValueError(f"params has {len(given)} entries for {len(listed)} prompts: give one, or one each")
        if self._closed:
            raise RuntimeError("this LLM was shut down")
        collectors: dict[str, _Collector] = {}
        pending = []
        for i, (prompt, each) in enumerate(zip(listed, given, strict=True)):
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            self._requests += 1
            name = f"llm-{self._requests}"
            collectors[name] = _Collector(ids, each, self._tokenizer_for(prompt, each))
            pending.append((i, name, np.asarray(ids, np.int32), each))
        try:
            self._run(pending, collectors, namespace)
        except BaseException:
            self._abort(collectors)
            raise
        return [collector.completion() for collector in collectors.values()]

    def update_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace weights (all or some, by their Hugging Face names) in place; later tokens carry `version`.

        Raises:
            ValueError: the version does not grow, or a tensor does not fit; nothing has changed then.
        """
        self.scheduler.update_weights(version, tensors)

    def flush_cache(self) -> int:
        """Forget all cached prefixes; the number of pages freed."""
        return self.scheduler.flush_cache()

    def stats(self) -> Stats:
        """Pages free, cached and held; tokens computed and cached; steps and retractions."""
        return self.scheduler.stats()

    def shutdown(self) -> None:
        """Abort what runs and free the engine; further calls of `generate` raise RuntimeError."""
        if not self._closed:
            self._closed = True
            self._abort(self.scheduler.requests)
            self.runner.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def _run(
        self,
        pending: list[tuple[int, str, np.ndarray, SamplingParams]],
        collectors: dict[str, _Collector],
        namespace: str,
    ) -> None:
        # all prompts are checked before any runs; the queue is fed as it drains, so any number of prompts fits
        for i, name, ids, params in pending:
            try:
                self.scheduler.validate(name, ids, params)
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}") from None
        waiting = iter(pending)
        held = next(waiting, None)
        left = len(collectors)
        while left:
            while held is not None:
                _, name, ids, params = held
                try:
                    self.scheduler.add(name, ids, params, namespace)
                except QueueFull:
                    break
                held = next(waiting, None)
            for output in self.scheduler.step():
                collector = collectors.get(output.request_id)
                if collector is None:
                    continue  # left over from an interrupted call
                was_open = collector.finish_reason is None
                if collector.push(output):
                    self.scheduler.abort(output.request_id)
                left -= was_open and collector.finish_reason is not None
        while self.scheduler.has_work:
            self.scheduler.step()

    def _abort(self, names: Mapping[str, object]) -> None:
        for name in list(names):
            self.scheduler.abort(name)
        while self.scheduler.has_work:
            self.scheduler.step()

    def _tokenizer_for(self, prompt: Prompt, params: SamplingParams) -> Tokenizer | None:
        if isinstance(prompt, str) or params.stop or (self._directory / "tokenizer_config.json").is_file():
            return self.tokenizer
        return None


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed: list[Any] = list(prompts)
    return [listed] if listed and isinstance(listed[0], int) else listed
