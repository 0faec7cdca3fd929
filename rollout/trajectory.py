"""What an episode leaves: exactly the tokens that were sampled, what they were sampled with, and the reward.

Trajectories are made from the server's token log, never by tokenizing text again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from agentserve.sdk import AgentResult, SessionLog, ToolRecord, TurnRecord

Status: TypeAlias = Literal["ok", "max_turns", "length", "infra_error"]


class Trajectory(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt at one task.

    The four token lists are of one length T. `loss_mask[t]` is 1 where the policy sampled token t; there
    `logprobs[t]` is the sampled token's log-probability (natural log) and `weight_versions[t]` the weights
    that sampled it; elsewhere they are 0.0 and -1.

    Attributes:
        task_id, attempt: which attempt at which task; `group_id` is shared by the attempts that share a
            baseline.
        episode_id: names this attempt in this run.
        status: `infra_error` says nothing about the policy: such a trajectory has no reward and no tokens,
            and groups leave it out.
        reward: None only when the status is `infra_error`.
        sampling: the options that the tokens were sampled with.
        retries: how often infrastructure failed before this result.
    """

    task_id: str
    group_id: str
    episode_id: str
    attempt: int
    seed: int
    status: Status
    token_ids: list[int] = []
    loss_mask: list[int] = []
    logprobs: list[float] = []
    weight_versions: list[int] = []
    reward: float | None = None
    text: str = ""
    turns: tuple[TurnRecord, ...] = ()
    sampling: dict[str, Any] = {}
    error: str | None = None
    retries: int = 0
    duration_s: float = 0.0

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.loss_mask), len(self.logprobs), len(self.weight_versions)}
        if len(lengths) != 1:
            raise ValueError(f"{self.episode_id}: token lists differ in length: {sorted(lengths)}")
        for index, (flag, version) in enumerate(zip(self.loss_mask, self.weight_versions, strict=True)):
            if flag and version < 0:
                raise ValueError(f"{self.episode_id}: token {index} is to be trained but was not sampled")
        if (self.reward is None) != (self.status == "infra_error"):
            raise ValueError(f"{self.episode_id}: status {self.status} with reward {self.reward}")

    @property
    def tools(self) -> tuple[ToolRecord, ...]:
        """All tool calls, in order."""
        return tuple(record for turn in self.turns for record in turn.tools)

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return sum(self.loss_mask)

    @property
    def oldest_version(self) -> int | None:
        """The oldest weights that sampled a token of it."""
        return min((v for v in self.weight_versions if v >= 0), default=None)


class Group(msgspec.Struct, frozen=True):
    """The attempts at one task that share a baseline, by attempt."""

    group_id: str
    trajectories: tuple[Trajectory, ...]

    @property
    def usable(self) -> tuple[Trajectory, ...]:
        """The attempts that say something about the policy."""
        return tuple(each for each in self.trajectories if each.status != "infra_error")

    @property
    def rewards(self) -> list[float]:
        """Rewards of the usable attempts."""
        return [each.reward for each in self.usable if each.reward is not None]


class TokenMismatch(Exception):
    """The session's log is not what the turns said was appended and sampled: the append-only promise is
    broken.
    """


class Tokens(NamedTuple):
    """The token columns of a trajectory."""

    token_ids: list[int]
    loss_mask: list[int]
    logprobs: list[float]
    weight_versions: list[int]


def sampled_tokens(log: SessionLog, result: AgentResult[Any]) -> Tokens:
    """The token columns of a `Trajectory` from a session's log, checked against what each turn reported.

    Raises:
        TokenMismatch: they differ, at the first differing token.
        ValueError: the log or the turns came without tokens.
    """
    if log.token_ids is None or log.loss_mask is None or log.logprobs is None or log.weight_versions is None:
        raise ValueError(f"the log of session {log.id} came without tokens: ask with tokens=True")
    # The first turn's delta may or may not begin with the system segment, so runs are aligned from the end.
    said: list[int] = []
    sampled: list[int] = []
    for turn in result.turns:
        if turn.appended_ids is None or turn.sampled_ids is None:
            raise ValueError(f"turn {turn.turn} of {log.id} came without token ids: ask with return_token_ids")
        said += [*turn.appended_ids, *turn.sampled_ids]
        sampled += [0] * len(turn.appended_ids) + [1] * len(turn.sampled_ids)
    start = len(log.token_ids) - len(said)
    same = start >= 0 and log.token_ids[start:] == said and log.loss_mask[start:] == sampled
    if not same or any(log.loss_mask[:start]):
        at = _first_difference(log.token_ids[max(start, 0) :], said)
        raise TokenMismatch(
            f"session {log.id}: the log ({len(log.token_ids)} tokens) differs from what its {len(result.turns)} "
            f"turns reported ({len(said)} tokens), first at token {max(start, 0) + at}"
        )
    return Tokens(log.token_ids, log.loss_mask, log.logprobs, log.weight_versions)


def _first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
