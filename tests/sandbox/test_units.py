"""The parts that need no sandbox: kept output, path splitting, the system-call filter, configuration."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import SandboxError, files, policy
from sandbox.backends import seccomp
from sandbox.output import OutputBuffer, StreamDecoder
from sandbox.schema import Enforcement, Limits, LimitsRequest


@given(st.lists(st.binary(max_size=50), max_size=30), st.integers(0, 200))
def test_output_keeps_head_and_tail_and_counts_the_rest(pieces: list[bytes], limit: int) -> None:
    buffer = OutputBuffer(limit)
    live = b"".join(buffer.feed(piece) for piece in pieces)
    whole = b"".join(pieces)
    head, dropped, tail = buffer.parts()
    assert len(head) + dropped + len(tail) == len(whole)
    assert len(head) + len(tail) <= max(limit, 0)
    assert whole.startswith(head)
    assert whole.endswith(tail)
    assert live.startswith(head)
    if len(whole) <= limit:
        assert (head + tail, dropped) == (whole, 0)
    else:
        assert dropped <= len(whole) - limit + 6  # at most three bytes of a cut character on either side


@given(st.text(max_size=300), st.integers(8, 100))
def test_cuts_never_split_a_character(text: str, limit: int) -> None:
    buffer = OutputBuffer(limit)
    buffer.feed(text.encode())
    kept = buffer.text()
    assert text.startswith(kept.text[: kept.cut])
    assert kept.cut is None or text.endswith(kept.text[kept.cut :])


@given(st.lists(st.binary(max_size=20), max_size=20))
def test_streamed_text_is_the_text(pieces: list[bytes]) -> None:
    decoder = StreamDecoder()
    text = "".join(decoder.feed(piece) for piece in pieces) + decoder.feed(b"", final=True)
    assert text == b"".join(pieces).decode("utf-8", "backslashreplace")


@given(st.lists(st.sampled_from([b"..", b".", b"", b"a", b"workspace", b"etc", b"\xff"]), max_size=8), st.booleans())
def test_no_path_splits_into_a_way_out(parts: list[bytes], absolute: bool) -> None:
    path = (b"/" if absolute else b"") + b"/".join(parts)
    names = [part for part in parts if part not in (b"", b".")]
    if path.startswith(b"/") and not (path + b"/").startswith(b"/workspace/"):
        leads_out = True
    else:
        leads_out = b".." in names
    if leads_out:
        with pytest.raises(SandboxError):
            files.split_path(path)
    else:
        assert files.split_path(path) == names[1 if path.startswith(b"/") else 0 :]


@pytest.mark.parametrize("hidden", ["d", "."])
def test_what_cannot_be_counted_counts_as_too_much(tmp_path: Path, hidden: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"x" * 100_000)
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    used, entries = files.used_bytes(root, 100)
    assert 100_000 <= used < 200_000
    assert entries == 2
    assert files.used_bytes(root, 1)[1] == 2
    for path in (tmp_path, tmp_path / "d"):
        path.chmod(0o755)
        os.chown(path, 65500 if os.geteuid() == 0 else -1, -1)
    (tmp_path / hidden).chmod(0o300 if hidden == "d" else 0o600)
    child = os.fork()
    if child == 0:  # as an ordinary user, whom the mode binds
        try:
            if os.geteuid() == 0:
                os.setresuid(65500, 65500, 65500)
            os._exit(files.used_bytes(root, 100)[1])
        finally:
            os._exit(255)
    _, status = os.waitpid(child, 0)
    (tmp_path / hidden).chmod(0o700)
    os.close(root)
    assert os.waitstatus_to_exitcode(status) == 101


def evaluate(program: bytes, nr: int, arch: int, arg0: int = 0) -> int:
    """Run the filter as the kernel would, on one struct seccomp_data."""
    data = struct.pack("<iIQ6Q", nr if nr < 1 << 31 else nr - (1 << 32), arch, 0, arg0, 0, 0, 0, 0, 0)
    accumulator = position = 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("<HBBI", program, position * 8)
        position += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif code == 0x06:
            return value
        else:
            taken = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            position += if_true if taken else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_decides_as_written(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uname = os.uname()
    fields = (uname.sysname, uname.nodename, uname.release, uname.version, machine)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(fields))
    program = seccomp.program()
    arch = seccomp._ARCH[machine]
    allow, denied = 0x7FFF0000, 0x00050000
    for name, number in (seccomp._NUMBERS[machine] | seccomp._COMMON).items():
        assert evaluate(program, number, arch) == denied | errno.EPERM, name
    read = {"x86_64": 0, "aarch64": 63}[machine]
    assert evaluate(program, read, arch) == allow
    assert evaluate(program, read, arch ^ 1) == denied | errno.ENOSYS
    clone, opener = seccomp._CLONE[machine], seccomp._SOCKET[machine]
    assert evaluate(program, clone, arch, 0x003D0F00) == allow  # a thread
    assert evaluate(program, clone, arch, 17) == allow  # a fork
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert evaluate(program, clone, arch, 17 | flag) == denied | errno.EPERM
    assert evaluate(program, 435, arch) == denied | errno.ENOSYS
    verdicts = {family: evaluate(program, opener, arch, family) for family in range(50)}
    assert {family for family, verdict in verdicts.items() if verdict == allow} == {1, 2, 10, 16}
    assert verdicts[40] == denied | errno.EAFNOSUPPORT
    assert evaluate(program, opener, arch, (7 << 32) | 1) == allow  # only the low half is an int argument


def test_an_unknown_machine_has_no_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    uname = os.uname()
    fields = (uname.sysname, uname.nodename, uname.release, uname.version, "s390x")
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(fields))
    assert not seccomp.supported()
    with pytest.raises(ValueError, match="s390x"):
        seccomp.program()


def test_a_limit_that_cannot_hold_is_refused_only_when_asked_for() -> None:
    enforced = {name: Enforcement("cgroup") for name in Limits.__struct_fields__} | {"cpus": Enforcement("none", "why")}
    defaults = Limits()
    assert policy.check_limits(None, defaults, policy.ServiceConfig().max_limits, enforced) == defaults
    with pytest.raises(SandboxError, match="why"):
        policy.check_limits(LimitsRequest(cpus=0.5), defaults, policy.ServiceConfig().max_limits, enforced)
    asked = policy.check_limits(LimitsRequest(pids=7, cpus=None), defaults, policy.ServiceConfig().max_limits, enforced)
    assert (asked.pids, asked.cpus, asked.memory_mb) == (7, None, defaults.memory_mb)
