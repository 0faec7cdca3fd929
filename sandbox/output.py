"""Bounded memory of a command's output: the head and the tail are kept, what lies between is counted and dropped.

Decoding is deterministic: bytes that are not UTF-8 become ``\\xNN``. Reading the pipes happens in the backend.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Decoded output: `truncated` bytes are missing at character `cut` (None when nothing is)."""

    text: str
    truncated: int
    cut: int | None


class OutputBuffer:
    """Keeps at most `limit` bytes of what is fed: the first half and the last half."""

    def __init__(self, limit: int) -> None:
        self._head_limit = (limit + 1) // 2
        self._tail_limit = limit - self._head_limit
        self._head = bytearray()
        self._tail = bytearray()
        self.total = 0

    def feed(self, data: bytes) -> bytes:
        """Take more output. Returns the part that went to the head: what may be passed on at once."""
        self.total += len(data)
        room = self._head_limit - len(self._head)
        live = data[:room] if room > 0 else b""
        self._head += live
        rest = data[len(live) :]
        if rest:
            self._tail += rest[-self._tail_limit :] if self._tail_limit else b""
            if len(self._tail) > 2 * self._tail_limit + 65536:
                del self._tail[: -self._tail_limit]
        return live

    def parts(self) -> tuple[bytes, int, bytes]:
        """Head, number of bytes dropped after it, tail. Characters cut in two at the gap are dropped whole."""
        tail = bytes(self._tail[-self._tail_limit :]) if self._tail_limit else b""
        dropped = self.total - len(self._head) - len(tail)
        head = bytes(self._head)
        if dropped:
            decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
            decoder.decode(head)
            kept_head = head[: len(head) - len(decoder.getstate()[0])]
            start = 0
            while start < min(3, len(tail)) and tail[start] & 0xC0 == 0x80:
                start += 1
            dropped += len(head) - len(kept_head) + start
            head, tail = kept_head, tail[start:]
        return head, dropped, tail

    def text(self) -> Text:
        head, dropped, tail = self.parts()
        if not dropped:
            return Text((head + tail).decode("utf-8", "backslashreplace"), 0, None)
        shown = head.decode("utf-8", "backslashreplace")
        return Text(shown + tail.decode("utf-8", "backslashreplace"), dropped, len(shown))


class StreamDecoder:
    """Turns pieces of output into text, holding back a character that is cut at the end of a piece."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def feed(self, data: bytes, final: bool = False) -> str:
        return self._decoder.decode(data, final)
