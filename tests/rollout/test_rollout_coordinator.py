import asyncio
import random
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from fake_server import END, FakeSandbox, FakeServer, Refusal, call_text
from hypothesis import given, settings
from hypothesis import strategies as st

from agentserve.sdk import AgentResult, AgentserveError, AsyncClient
from rollout import AgentSpec, Episode, Group, Rollout, Trajectory
from rollout.trajectory import TokenMismatch


class Question(msgspec.Struct, frozen=True):
    id: str
    prompt: str = "How many?"
    files: dict[str, bytes] = {}


def questions(count: int) -> list[Question]:
    return [Question(f"t{index}", files={"a.txt": b"x"}) for index in range(count)]


def model(messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    """Calls a tool once, then answers by its seed."""
    if messages[-1]["role"] == "tool":
        return f"The answer is {options['seed'] % 10}."
    return call_text("shell", command="ls")


def graded(task: Question, result: AgentResult[Any]) -> float:
    return float(result.text.endswith(("0.", "1.", "2.")))


def rollout_of(server: FakeServer, service: FakeSandbox | None, reward: Any = graded, **options: Any) -> Rollout:
    client = AsyncClient("http://fake", transport=server.transport())
    return Rollout(client, service, AgentSpec(system="s"), reward, **options)


async def test_every_attempt_comes_out_once_with_exactly_its_tokens():
    server, service = FakeServer(model, delay_s=0.001), FakeSandbox(run=lambda *_: (0, "a.txt", ""))
    async with rollout_of(server, service, concurrency=5, group_size=4) as rollout:
        groups = [group async for group in rollout.groups(questions(6))]
    assert sorted(group.group_id for group in groups) == sorted(f"0/t{index}" for index in range(6))
    for group in groups:
        assert [each.attempt for each in group.trajectories] == [0, 1, 2, 3]
        for each in group.trajectories:
            assert each.status == "ok"
            said = call_text("shell", command="ls") + END + each.text + END
            sampled = [i for i, flag in zip(each.token_ids, each.loss_mask, strict=True) if flag]
            assert "".join(map(chr, sampled)) == said
            assert each.reward == float(each.seed % 10 < 3)
            assert {v for v, f in zip(each.weight_versions, each.loss_mask, strict=True) if f} == {0}
            assert {v for v, f in zip(each.weight_versions, each.loss_mask, strict=True) if not f} == {-1}
            assert [record.text for record in each.tools] == ["a.txt"]
            assert each.num_sampled == len(sampled)
            assert each.oldest_version == 0
            assert msgspec.json.decode(msgspec.json.encode(each), type=Trajectory) == each
    assert 1 < server.most_running <= 5
    assert not service.alive
    assert server.open_sessions() == []


async def test_seeds_depend_on_run_task_and_attempt_alone():
    seeds = []
    for concurrency in (1, 7):
        server, service = FakeServer(model), FakeSandbox()
        async with rollout_of(server, service, concurrency=concurrency, group_size=3, seed=4) as rollout:
            got = [each async for each in rollout.trajectories(questions(4))]
        seeds.append({each.episode_id: each.seed for each in got})
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0].values())) == 12
    task = Question("t0")
    assert Episode(task, 0, 4).seed == seeds[0]["4/t0/0"] != Episode(task, 0, 5).seed


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**16))
def test_nothing_is_lost_when_infrastructure_fails(count: int, size: int, concurrency: int, seed: int):
    """Whatever breaks, in whatever order: every episode comes out once, and no failure becomes a reward."""
    chance = random.Random(seed)

    def flaky(*_: Any) -> tuple[int, str, str]:
        if chance.random() < 0.3:
            raise ConnectionError("lost")
        return 0, "a.txt", ""

    def moody(messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
        if chance.random() < 0.2:
            raise Refusal(503, "engine died")
        return model(messages, options)

    async def run() -> None:
        server, service = FakeServer(moody), FakeSandbox(run=flaky)
        options: dict[str, Any] = {"concurrency": concurrency, "group_size": size, "infra_retries": 1}
        async with rollout_of(server, service, **options) as rollout:
            got = [each async for each in rollout.trajectories(questions(count))]
        assert sorted(each.episode_id for each in got) == sorted(
            f"0/t{i}/{j}" for i in range(count) for j in range(size)
        )
        for each in got:
            assert (each.status == "infra_error") == (each.reward is None) == (each.error is not None)
            assert each.retries in (0, 1)
            assert each.status != "infra_error" or each.retries == 1
        assert not service.alive
        assert server.open_sessions() == []

    asyncio.run(run())


async def test_infra_failures_stay_out_of_the_group():
    server, service = FakeServer(model), FakeSandbox(run=lambda *_: (0, "", ""), broken=2)
    async with rollout_of(server, service, concurrency=1, group_size=4, infra_retries=0) as rollout:
        (group,) = [group async for group in rollout.groups(questions(1))]
    assert [each.status for each in group.trajectories] == ["infra_error", "infra_error", "ok", "ok"]
    assert len(group.usable) == len(group.rewards) == 2
    assert "the sandbox service is down" in str(group.trajectories[0].error)


async def test_a_retry_is_the_same_episode():
    server, service = FakeServer(model), FakeSandbox(run=lambda *_: (0, "", ""), broken=1)
    async with rollout_of(server, service, group_size=1) as rollout:
        (again,) = [each async for each in rollout.trajectories(questions(1))]
        (plain,) = [each async for each in rollout.trajectories(questions(1))]
    assert (again.retries, plain.retries) == (1, 0)
    assert again.token_ids == plain.token_ids


async def test_a_reward_function_that_fails_is_no_reward_of_zero():
    async def broken(task: Question, result: AgentResult[Any]) -> float:
        raise KeyError("answer key")

    async with rollout_of(FakeServer(model), FakeSandbox(), reward=broken, group_size=1) as rollout:
        (got,) = [each async for each in rollout.trajectories(questions(1))]
    assert (got.status, got.reward) == ("infra_error", None)
    assert "KeyError: 'answer key'" in str(got.error)


async def test_a_wrong_request_ends_the_run_and_cleans_up():
    server, service = FakeServer(model, delay_s=0.01), FakeSandbox()
    client = AsyncClient("http://fake", transport=server.transport())
    spec = AgentSpec(sampling={"temperature": -1.0})
    async with Rollout(client, service, spec, graded, concurrency=4) as rollout:
        with pytest.raises(AgentserveError, match="temperature"):
            [each async for each in rollout.trajectories(questions(3))]
    assert not service.alive
    assert server.open_sessions() == []


async def test_closing_early_cancels_what_is_in_flight():
    server, service = FakeServer(model), FakeSandbox(run=lambda *_: (0, "", ""), delay_s=0.02)

    def endless() -> Any:
        index = 0
        while True:
            yield Question(f"t{index}", files={"a": b""})
            index += 1

    async with (
        rollout_of(server, service, concurrency=6, group_size=2) as rollout,
        aclosing(rollout.trajectories(endless())) as trajectories,
    ):
        async for _ in trajectories:
            break
    assert service.created > 1
    assert not service.alive
    assert server.open_sessions() == []


async def test_a_log_that_is_not_what_was_sampled_is_an_error():
    server, service = FakeServer(model), FakeSandbox()

    def forge(task: Question, result: AgentResult[Any]) -> float:
        server.sessions[result.session_id or ""].token_ids[-1] += 1
        return 1.0

    async with rollout_of(server, service, group_size=1) as rollout:
        got = [each async for each in rollout.trajectories(questions(1))]
        # The log was read before the reward, so this forgery comes too late.
        assert got[0].status == "ok"

        def rewrite(messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
            for session in server.sessions.values():
                if session.messages is messages:
                    session.token_ids[0] += len(session.turns)
                    session.token_ids[1] += len(session.turns)
                    session.sampled[0] = int(bool(session.turns))
            return model(messages, options)

        server.model = rewrite
        with pytest.raises(TokenMismatch, match="differs from what its 2 turns reported"):
            [each async for each in rollout.trajectories(questions(1), seed=9)]


def test_collect_for_trainers_without_an_event_loop():
    server, service = FakeServer(model), FakeSandbox(run=lambda *_: (0, "", ""))
    rollout = rollout_of(server, service, group_size=2, concurrency=3)
    with pytest.raises(RuntimeError, match="inside"):
        rollout.collect(questions(1))
    with rollout:
        groups = rollout.collect(questions(5))
        assert [group.group_id for group in groups] == [f"0/t{index}" for index in range(5)]
        assert len(rollout.collect(questions(2), group_size=1)[0].trajectories) == 1
        with pytest.raises(ValueError, match="same id"):
            rollout.collect([Question("a"), Question("a")])
    with pytest.raises(ValueError, match="at least 1"):
        rollout_of(server, service, concurrency=0)


def trajectory(**changes: Any) -> Trajectory:
    made: dict[str, Any] = {
        "task_id": "t",
        "group_id": "g",
        "episode_id": "e",
        "attempt": 0,
        "seed": 0,
        "status": "ok",
        "reward": 1.0,
        "token_ids": [1, 2],
        "loss_mask": [0, 1],
        "logprobs": [0.0, -1.0],
        "weight_versions": [-1, 3],
    }
    return Trajectory(**(made | changes))


def test_trajectories_refuse_what_cannot_be():
    assert trajectory().oldest_version == 3
    with pytest.raises(ValueError, match="differ in length"):
        trajectory(logprobs=[0.0])
    with pytest.raises(ValueError, match="token 0 is to be trained but was not sampled"):
        trajectory(loss_mask=[1, 1])
    with pytest.raises(ValueError, match="infra_error with reward 0"):
        trajectory(status="infra_error", reward=0.0)
    with pytest.raises(ValueError, match="ok with reward None"):
        trajectory(reward=None)
    lost = trajectory(status="infra_error", reward=None)
    assert Group("g", (trajectory(), lost)).rewards == [1.0]
