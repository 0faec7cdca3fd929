"""What one turn cost: where its prompt's tokens came from, and how long it took. Numbers only."""

from __future__ import annotations

from typing import Any

import msgspec


class TurnReport(msgspec.Struct, frozen=True, kw_only=True):
    """One turn. `prompt = cached + computed` tokens; `completion` tokens were sampled.

    `weight_versions` are the oldest and the newest that sampled, empty when nothing was.
    """

    turn: int
    prompt: int
    cached: int
    completion: int
    ttft_ms: float
    total_ms: float
    finish_reason: str
    weight_versions: tuple[int, ...]

    @property
    def computed(self) -> int:
        """Prompt tokens that the engine had to compute."""
        return self.prompt - self.cached

    def report(self) -> dict[str, int]:
        """Where the prompt came from."""
        return {"prompt": self.prompt, "cached": self.cached, "computed": self.computed}

    def timings(self) -> dict[str, float]:
        """Milliseconds to the first token and to the end."""
        return {"ttft_ms": self.ttft_ms, "total_ms": self.total_ms}

    def entry(self) -> dict[str, Any]:
        """The turn as `GET /v1/sessions/{id}` lists it."""
        return {
            "turn": self.turn, **self.report(), "completion": self.completion, **self.timings(),
            "finish_reason": self.finish_reason, "weight_versions": list(self.weight_versions),
        }  # fmt: skip
