"""The overlap loop's traps, one by one, on the fake model."""

import numpy as np
import pytest

from agentserve.core import SamplingParams, State
from agentserve.scheduler import QueueFull, Scheduler
from agentserve.testing import FakeRunner, oracle

VOCAB = 50


def make(overlap: bool = True, **settings) -> Scheduler:
    sizes = {"num_pages": 64, "page_size": 4, "max_len": 128, "max_running": 8} | settings
    runner_sizes = {name: sizes[name] for name in ("num_pages", "page_size", "max_len", "max_running")}
    runner = FakeRunner(vocab_size=VOCAB, **runner_sizes)
    return Scheduler(runner, vocab_size=VOCAB, eos_ids=(0,), overlap=overlap, **sizes)


def add(scheduler: Scheduler, name: str, prompt: list[int], **params) -> None:
    params = {"temperature": 0.0, "max_tokens": 10, "ignore_eos": True} | params
    scheduler.add(name, np.array(prompt, np.int32), SamplingParams(**params))


def drain(scheduler: Scheduler) -> dict[str, tuple[list[int], str]]:
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    while scheduler.has_work:
        for output in scheduler.step():
            assert output.request_id not in ends, "a word after the end"
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason:
                ends[output.request_id] = output.finish_reason
        scheduler.check()
    return {name: (tokens[name], ends[name]) for name in ends}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("steps", range(8))
def test_abort_in_every_state(overlap, steps):
    """Queued (0 steps), mid-chunk, in flight, decoding, finished but unread: the rest is untouched, pages come back."""
    scheduler = make(overlap, max_batch_tokens=8)
    add(scheduler, "stays", [1, 2, 3], max_tokens=6)
    add(scheduler, "goes", list(range(1, 21)), max_tokens=6)
    said: dict[str, list[int]] = {"stays": [], "goes": []}
    ends: dict[str, str] = {}

    def step() -> None:
        for output in scheduler.step():
            said[output.request_id] += output.token_ids
            if output.finish_reason:
                assert ends.setdefault(output.request_id, output.finish_reason) == output.finish_reason
        scheduler.check()

    for _ in range(steps):
        step()
    ended_before = "goes" in ends
    for name in ("goes", "goes", "nobody"):
        scheduler.abort(name)
    while scheduler.has_work:
        step()
    assert said["stays"] == oracle([1, 2, 3], 6, VOCAB)
    assert said["goes"] == oracle(list(range(1, 21)), 6, VOCAB)[: len(said["goes"])]
    assert ends == {"stays": "length", "goes": "length" if ended_before else "abort"}
    stats = scheduler.stats()
    assert stats.pages_free + stats.pages_cached == stats.pages_total


def test_nothing_follows_a_stop_token():
    prompt = [3, 1, 4]
    free = oracle(prompt, 30, VOCAB)
    stop = free[5]
    scheduler = make()
    add(scheduler, "a", prompt, stop_token_ids=(stop,), max_tokens=30)
    tokens, reason = drain(scheduler)["a"]
    assert tokens == free[: free.index(stop) + 1]
    assert reason == "stop"


def test_rows_and_pages_are_not_reused_while_a_step_may_read_them():
    scheduler = make(max_running=2, num_pages=32)
    for i in range(12):
        add(scheduler, f"r{i}", [1 + i, 2, 3, 4, 5], max_tokens=1 + i % 4)
    while scheduler.has_work:
        in_flight = scheduler._in_flight
        scheduler.step()
        if in_flight is not None and scheduler._in_flight is not None:
            plan = scheduler._in_flight[0]
            free, _ = scheduler.manager.pool.snapshot()
            assert not set((plan.write_slots // 4).tolist()) & set(free)
            busy = {request.row for request in scheduler.queue.running}
            retiring = {row for _, row in scheduler.queue.retiring_rows}
            assert set(plan.rows.tolist()) <= busy | retiring


def test_one_token_requests_end_on_their_prefill_step():
    scheduler = make()
    for i in range(5):
        add(scheduler, f"r{i}", [1 + i], max_tokens=1)
    assert {name: len(tokens) for name, (tokens, _) in drain(scheduler).items()} == {f"r{i}": 1 for i in range(5)}
    assert scheduler.stats().steps == 1


def test_overlap_plans_no_row_that_max_tokens_rules_out():
    for overlap in (True, False):
        scheduler = make(overlap)
        add(scheduler, "a", [1, 2, 3], max_tokens=7)
        drain(scheduler)
        assert scheduler.stats().computed_tokens == 3 + 6


def test_a_request_that_skips_steps_loses_nothing():
    """A retracted request waits while others run, with a token of its own still in flight."""
    scheduler = make(num_pages=12, watermark=0.0)
    prompts = {f"r{i}": [1 + i] * 10 for i in range(3)}
    for name, prompt in prompts.items():
        add(scheduler, name, prompt, max_tokens=20)
    results = drain(scheduler)
    assert scheduler.stats().retractions > 0
    for name, prompt in prompts.items():
        assert results[name][0] == oracle(prompt, 20, VOCAB)


def test_the_oldest_request_is_never_retracted():
    scheduler = make(num_pages=16, max_len=60, watermark=0.0)
    for i in range(6):
        add(scheduler, f"r{i}", [1 + i] * 8, max_tokens=40)
    seen = set()
    while scheduler.has_work:
        before = min(scheduler.requests.values(), key=lambda request: request.order)
        scheduler.step()
        if before.id in seen:
            assert before.state is not State.WAITING
        seen.add(before.id)
    assert scheduler.stats().retractions > 0


def test_the_queue_is_bounded():
    scheduler = make(max_waiting=3)
    for i in range(3):
        add(scheduler, f"r{i}", [1])
    with pytest.raises(QueueFull, match="max_waiting is 3"):
        add(scheduler, "r3", [1])
    assert len(drain(scheduler)) == 3


def test_decodes_go_on_beside_a_long_prefill():
    scheduler = make(max_batch_tokens=16)
    add(scheduler, "short", [1, 2], max_tokens=20)
    for _ in range(3):
        scheduler.step()
    add(scheduler, "long", list(np.arange(100) % 40 + 1), max_tokens=2)
    steps_without = 0
    while "long" in scheduler.requests and "short" in scheduler.requests:
        said = {output.request_id for output in scheduler.step()}
        steps_without = 0 if "short" in said else steps_without + 1
        assert steps_without == 0


def test_flush_while_running_is_deferred_for_what_is_held():
    scheduler = make()
    add(scheduler, "a", list(range(1, 30)))
    for _ in range(3):
        scheduler.step()
    scheduler.flush_cache()
    scheduler.check()
    assert drain(scheduler)["a"][0][-3:] == oracle(list(range(1, 30)), 10, VOCAB)[-3:]


@pytest.mark.parametrize("length", [3, 4, 5, 7, 8, 9, 15, 16, 17])
def test_page_boundary_lengths_hit_and_miss_alike(length):
    prompt = [(7 * i) % 40 + 1 for i in range(length)]
    scheduler = make()
    for turn in range(3):
        add(scheduler, f"t{turn}", prompt, max_tokens=6)
        assert drain(scheduler)[f"t{turn}"][0] == oracle(prompt, 6, VOCAB)
    assert scheduler.committer.counters.cached_tokens == 2 * ((length - 1) // 4 * 4)
