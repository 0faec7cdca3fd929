"""Services as child processes: start one, learn where it listens, and stop it with everything it started.

Used by the demo and by tests; a deployment starts its services by other means.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO

LISTENING = re.compile(r"listening on (http://\S+)")


class ServiceFailed(Exception):
    """A service ended, or said nothing in time, instead of listening."""


class Service:
    """A child process that prints `… listening on http://…` when it is ready.

    It leads a process group of its own, so that a Ctrl-C in the terminal reaches only us, and we stop it in order.

    Args:
        name: for messages.
        arguments: of the Python interpreter, such as `["-m", "sandbox", "--port", "0"]`.
        timeout_s: seconds within which it must listen.
        env: variables to set beside our own.

    Raises:
        ServiceFailed: with the last lines that it wrote.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], *, timeout_s: float = 60.0, env: dict[str, str] | None = None
    ):
        self.name = name
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )
        self._found: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"{name}-output", daemon=True)
        self._reader.start()
        try:
            self.url = self._await_url(timeout_s)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that the service wrote to its standard error."""
        size = os.fstat(self._log.fileno()).st_size
        data = os.pread(self._log.fileno(), 16384, max(0, size - 16384))
        return "\n".join(data.decode(errors="replace").splitlines()[-lines:])

    def stop(self, grace_s: float = 10.0) -> None:
        """Ask it to end, wait, and end what is left of its process group. Stopping twice does nothing."""
        if self._process.returncode is not None:
            return
        ended = time.monotonic() + grace_s
        # `Popen` would reap a leader that has ended. As long as it is not reaped, nobody else can get its number.
        os.kill(self.pid, signal.SIGTERM)
        while time.monotonic() < ended and not _has_ended(self.pid):
            time.sleep(0.02)
        # Not permitted: what is left of the group runs as another user, and is its service's to end.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=1)
        self._log.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                match = LISTENING.search(line.decode(errors="replace"))
                if match:
                    self._found.put(match[1])
        self._found.put(None)

    def _await_url(self, timeout_s: float) -> str:
        try:
            url = self._found.get(timeout=timeout_s)
        except queue.Empty:
            message = f"the {self.name} did not listen within {timeout_s:g} s:\n{self.log_tail()}"
            raise ServiceFailed(message) from None
        if url is None:
            raise ServiceFailed(f"the {self.name} ended instead of listening:\n{self.log_tail()}")
        return url


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
