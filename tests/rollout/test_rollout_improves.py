"""The demo's RL run with its own settings makes the policy better on tasks it never trained on."""

import pytest

from agentserve.sdk import Client
from rollout.demo import Settings, train


class Silent:
    def phase(self, text: str) -> None: ...
    def evaluated(self, when: str, evaluation: object) -> None: ...
    def step(self, report: object) -> None: ...


@pytest.mark.slow
def test_a_short_rl_run_raises_held_out_success(engine_url: str, sandbox_url: str):
    with Client(engine_url) as client:
        outcome = train(client, sandbox_url, Settings(), Silent())  # pyright: ignore[reportArgumentType]
    assert outcome.after.mean - outcome.before.mean >= 0.15
    assert max(report.metrics.gap_mean for report in outcome.reports) < 1e-5
    assert max(report.metrics.gap_max for report in outcome.reports) < 2e-3
    assert sum(report.metrics.failed for report in outcome.reports) == 0
