"""The real server with the demo model, the real sandbox, the real trainer."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from agentserve.demo import MODEL_DIR
from agentserve.demo import tasks as demo
from agentserve.models import load_model
from agentserve.sdk import Agent, AgentResult, AsyncClient, Client
from rollout import AgentSpec, Rollout, Trajectory
from rollout.demo import ENGINE_FLAGS
from rollout.processes import Service
from rollout.train.grpo import GRPOConfig, GRPOTrainer, token_logprobs
from rollout.train.loop import reinforce
from rollout.weights import publish_weights

SPEC = AgentSpec(system=demo.SYSTEM, max_turns=6, sampling={"temperature": 1.0, "max_tokens": 64})


class Spy(httpx.AsyncHTTPTransport):
    """Keeps every turn's reply as it came over the wire, by session."""

    def __init__(self) -> None:
        super().__init__(trust_env=False)
        self.turns: dict[str, list[dict[str, Any]]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if request.method == "POST" and request.url.path.endswith("/turns"):
            body = await response.aread()
            reply = json.loads(body)
            self.turns.setdefault(reply["session_id"], []).append(reply)
            return httpx.Response(response.status_code, headers=response.headers, content=body)
        return response


def graded(task: demo.Task, result: AgentResult[Any]) -> float:
    return demo.score(task, result.text)


async def test_what_is_trained_is_exactly_what_was_sampled(engine_url: str, sandbox_url: str):
    spy = Spy()
    sessions: dict[str, str] = {}

    def reward(task: demo.Task, result: AgentResult[Any]) -> float:
        sessions[f"{task.id}"] = result.session_id or ""
        return graded(task, result)

    tasks = demo.tasks("train", 20, seed=5)
    async with AsyncClient(engine_url, transport=spy) as client:
        rollout = Rollout(client, sandbox_url, SPEC, reward, group_size=1, concurrency=8, seed=5)
        async with rollout:
            got = [each async for each in rollout.trajectories(tasks)]
        assert await client.sessions() == [] or all(s["status"] != "open" for s in await client.sessions())
    assert [each.status for each in got] == ["ok"] * len(tasks)
    assert sum(len(each.tools) for each in got) >= len(tasks) // 2
    for each in got:
        replies = spy.turns[sessions[each.task_id]]
        assert len(replies) == len(each.turns)
        wire = [pair for reply in replies for pair in zip(reply["token_ids"], reply["logprobs"], strict=True)]
        columns = zip(each.token_ids, each.logprobs, each.loss_mask, strict=True)
        assert [(token, logprob) for token, logprob, flag in columns if flag] == wire
        whole = [i for reply in replies for i in (*reply["prompt_token_ids"], *reply["token_ids"])]
        assert each.token_ids == whole
    model = load_model(MODEL_DIR)
    with torch.no_grad():
        ours, _ = token_logprobs(model, got)
    recorded = [lp for each in got for lp, flag in zip(each.logprobs, each.loss_mask, strict=True) if flag]
    # One definition of the model, two ways through it: they differ by float32 rounding only.
    gap = (ours - torch.tensor(recorded)).abs()
    assert gap.mean() < 1e-5
    assert gap.max() < 1e-3


def only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


async def test_a_killed_engine_ends_every_episode_as_an_infrastructure_failure(sandbox_url: str):
    """Nothing hangs, nothing is lost, and nothing becomes a reward of 0."""
    with Service("server", ["-m", "agentserve", "serve", "demo", *ENGINE_FLAGS]) as service:
        engine = only_child(service.pid)
        tasks = demo.tasks("train", 30, seed=6)
        got: list[Trajectory] = []
        async with Rollout(service.url, sandbox_url, SPEC, graded, group_size=2, concurrency=8) as rollout:
            async for each in rollout.trajectories(tasks):
                got.append(each)
                if len(got) == 5:
                    os.kill(engine, signal.SIGKILL)
    assert len({each.episode_id for each in got}) == len(got) == 60
    lost = [each for each in got if each.status == "infra_error"]
    assert len(lost) >= 40
    assert all(each.reward is None and each.error for each in lost)
    assert all(each.reward is not None for each in got if each not in lost)


def test_every_turn_after_the_first_finds_its_past_in_the_cache(engine_url: str, sandbox_url: str):
    (task,) = demo.tasks("held_out", 1, seed=1001, kinds=["total_lines"])
    with Client(engine_url) as client:
        options: Any = {"system": demo.SYSTEM, "max_tokens": 64, "temperature": 0.0}
        with Agent(client, sandbox=sandbox_url, **options) as agent:
            result = agent.run(task.prompt, files=task.files)
        assert len(result.turns) > 1
        assert result.tools[0].status == "ok"
        for before, turn in zip(result.turns, result.turns[1:], strict=False):
            assert turn.cached >= before.prompt + before.completion - 1 - 16  # all but a page
        assert result.session is not None
        result.session.close()


def test_published_weights_serve_and_stamp_the_tokens(engine_url: str, sandbox_url: str):
    """Training steps move the served model: version by version, with no gap between trainer and engine."""
    trainer = GRPOTrainer(load_model(MODEL_DIR), GRPOConfig(learning_rate=1e-4))
    with Client(engine_url) as client:
        start = client.health().weight_version
        rollout = Rollout(client.url, sandbox_url, SPEC, graded, group_size=6, concurrency=12, seed=2)
        with rollout:
            batches = [demo.tasks("train", 4, seed=seed) for seed in (11, 12, 13)]
            reports = list(reinforce(rollout, trainer, client, batches))
            assert [report.version for report in reports] == [start + 1, start + 2, start + 3]
            (group,) = rollout.collect(demo.tasks("train", 1, seed=14))
        for each in group.trajectories:
            assert {v for v, flag in zip(each.weight_versions, each.loss_mask, strict=True) if flag} == {start + 3}
        for report in reports:
            assert report.metrics.tokens > 0
            assert report.metrics.gap_mean < 1e-5
            assert report.metrics.gap_max < 1e-3
            assert report.metrics.ratio == pytest.approx(1, abs=1e-4)
        publish_weights(client, load_model(MODEL_DIR), start + 4)
