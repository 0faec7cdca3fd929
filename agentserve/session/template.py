"""Delta rendering: new messages become the token ids that follow what a session holds already.

The past is never rendered again. A stub conversation that ends in a marked reply is rendered with the new
messages
after it, and what the template writes after the mark is the delta: the end of the reply's turn, the
    template's own separators, the messages and the prompt for the next reply.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from agentserve.session.log import Piece

Message = dict[str, Any]


class ChatTokenizer(Protocol):
    """What rendering needs of `agentserve.tokenizer.Tokenizer`."""

    def encode_pieces(self, text: str, cuts: Sequence[int]) -> list[list[int]]:
        """Token ids of `text`, split where tokens begin at or after the given characters."""
        ...

    def render(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The chat template's text."""
        ...


class DeltaRenderer:
    """Renders what a session appends. Stateless; used from threads.

    Raises (all methods):
        ValueError: the template refuses the messages, or rewrites replies so that no delta can be told.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._mark = f"reply{secrets.token_hex(8)}"

    def opening(
        self, messages: Sequence[Message], tools: Sequence[Message] | None, generation_prompt: bool = True
    ) -> list[Piece]:
        """The beginning of a session: one piece a message, and one for the prompt of the reply."""
        whole = self._tokenizer.render(messages, tools, generation_prompt)
        cuts = [self._common(messages[:count], tools, whole) for count in range(1, len(messages))]
        cuts.append(self._common(messages, tools, whole))
        return self._pieces(whole, cuts, [message["role"] for message in messages])

    def delta(
        self, messages: Sequence[Message], tools: Sequence[Message] | None, last_id: int | None, ends: frozenset[int]
    ) -> list[Piece]:
        """What follows a reply: the end of its turn, one piece a message, and the prompt of the next reply.

        Args:
            last_id: the reply's last token. If the model ended its turn itself, the end-of-turn token is in
                the log already and is not repeated; if it was cut off, the token is added here, not sampled.
            ends: ids that end a reply. Without messages, a reply that did not end is continued: nothing is
                added.
        """
        if not messages and last_id not in ends:
            return []
        whole = self._after_mark(messages, tools, generation_prompt=True)
        cuts = [
            common_length(self._after_mark(messages[:count], tools, generation_prompt=False), whole)
            for count in range(len(messages) + 1)
        ]
        pieces = self._pieces(whole, cuts, ["assistant", *(message["role"] for message in messages)])
        first = pieces[0].ids
        if last_id is not None and first and first[0] == last_id and last_id in ends:
            pieces[0] = Piece("assistant", first[1:])
        return [piece for piece in pieces if piece.ids]

    def _after_mark(self, messages: Sequence[Message], tools: Sequence[Message] | None, generation_prompt: bool) -> str:
        stub = [{"role": "user", "content": "-"}, {"role": "assistant", "content": self._mark}]
        _, found, after = self._tokenizer.render([*stub, *messages], tools, generation_prompt).partition(self._mark)
        if not found:
            raise ValueError("the chat template rewrites replies: append token ids to this session instead of messages")
        return after

    def _common(self, messages: Sequence[Message], tools: Sequence[Message] | None, whole: str) -> int:
        try:
            return common_length(self._tokenizer.render(messages, tools, add_generation_prompt=False), whole)
        except ValueError:
            return 0  # some templates refuse to begin without a user message: its piece then holds both

    def _pieces(self, whole: str, cuts: Sequence[int], roles: Sequence[str]) -> list[Piece]:
        """The ids of `whole`, cut at the ends of messages; what is left is the prompt of the reply."""
        rising = [max(cuts[: count + 1]) for count in range(len(cuts))]
        runs = self._tokenizer.encode_pieces(whole, rising)
        return [Piece(role, ids) for role, ids in zip([*roles, "assistant"], runs, strict=True)]


def common_length(a: str, b: str) -> int:
    """Length of the longest common beginning, found by halving, since the strings are long."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
