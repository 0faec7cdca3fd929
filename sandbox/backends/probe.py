"""The proof, at every start, that bubblewrap isolates on this machine: the real recipe runs and is looked at from
inside and from outside. Anything short of that is an error which says what to type, never a weaker mode.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.backends.base import Backend, BackendSandbox, ExecSpec, IsolationUnavailable
from sandbox.backends.recipe import Python
from sandbox.schema import Limits

INSTALL = "apt-get install bubblewrap"
_FIXED_IN = (0, 12, 0)

# Opening for append changes nothing, and is refused or allowed exactly as writing would be.
_LOOK = r"""
read go
can_write() { ( : >> "$1" ) 2>/dev/null && echo "$2=yes" || echo "$2=no"; }
can_see() { [ -e "$1" ] && echo "$2=yes" || echo "$2=no"; }
can_write /proc/sys/kernel/core_pattern core_pattern
can_write /proc/sysrq-trigger sysrq
can_write /usr/bin/env usr
can_write /etc/passwd etc
can_see /var/run/docker.sock docker_sock
can_see /run/docker.sock run_docker_sock
can_see /etc/shadow shadow
can_see /sys/fs/cgroup sys
can_write /workspace/.probe workspace
can_write /tmp/.probe tmp
echo "uid=$(id -u)"
while read -r key value; do
  case "$key" in CapEff:|CapPrm:|CapBnd:|NoNewPrivs:|Seccomp:) echo "$key$value";; esac
done < /proc/self/status
echo "interfaces=$(sed -e '1,2d' -e 's/:.*//' -e 's/ //g' /proc/net/dev | tr '\n' ' ')"
echo "routes=$(sed -e 1d /proc/net/route | wc -l)"
"""


@dataclass
class Facts:
    """What the probe saw. `isolation` names each property with whether it holds."""

    isolation: dict[str, bool] = field(default_factory=dict)
    python_version: str = ""
    notes: list[str] = field(default_factory=list)


def find_bwrap(given: str | None = None) -> tuple[str, tuple[int, ...]]:
    """The executable (the one given, or the system's) and its version. Raises IsolationUnavailable."""
    path = shutil.which(given or "bwrap", path="/usr/bin:/bin:/usr/local/bin:" + os.environ.get("PATH", ""))
    if path is None:
        raise IsolationUnavailable(f"bubblewrap ({given or 'bwrap'}) is not installed", INSTALL)
    try:
        reply = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise IsolationUnavailable(f"{path} --version failed: {error}", INSTALL) from error
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", reply)
    if match is None:
        raise IsolationUnavailable(f"{path} --version said {reply!r}, which is no version")
    version = tuple(int(part or 0) for part in match.groups())
    if version < (0, 7, 0):
        raise IsolationUnavailable(f"bubblewrap {reply.split()[-1]} is too old: 0.7.0 or newer is needed", INSTALL)
    return path, version


def known_weaknesses(version: tuple[int, ...]) -> list[str]:
    """What an operator should know about this backend here."""
    notes = [
        "shares the host's kernel: a kernel bug is a way out",
        "/proc/meminfo, /proc/cpuinfo, /proc/loadavg and the kernel version show the host's",
        "each command has its own process tree: background processes end with the command that started them",
        "ptrace is refused, so debuggers do not work inside",
    ]
    if version < _FIXED_IN:
        notes.append(
            f"bubblewrap {'.'.join(map(str, version))} is older than 0.12.0, which is reported to fix the following of "
            "symbolic links when mount points are made (your distribution may have patched it); "
            "ours are never made where a guest writes"
        )
    if version < (0, 8, 0):
        notes.append(
            "bubblewrap older than 0.8.0 has no --disable-userns; the system-call filter refuses namespaces instead"
        )
    return notes


def userns_remedy() -> str | None:
    """The line that would allow user namespaces, when a switch forbids them."""
    for name, forbidding, remedy in (
        ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ):
        path = Path("/proc/sys") / name
        if path.exists() and path.read_text().strip() == forbidding:
            return remedy
    return None


async def check(backend: Backend, python: Python | None) -> Facts:
    """Run the real recipe, with `python` inside, and look.

    Raises:
        IsolationUnavailable: with everything that does not hold.
    """
    sandbox = await backend.create("probe", Limits(memory_mb=256, pids=32, disk_mb=16), {})
    try:
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        outcome = await sandbox.run(_spec(["/bin/sh", "-c", _LOOK], b"go\n"), never)
        if outcome.status != "ok":
            said = outcome.stderr.text().text.strip()
            raise IsolationUnavailable(
                f"bubblewrap does not work here: {outcome.reason or outcome.status}" + (f": {said}" if said else ""),
                userns_remedy(),
            )
        seen = dict(line.split("=" if "=" in line else ":", 1) for line in outcome.stdout.text().text.splitlines())
        seen = {key: value.strip() for key, value in seen.items()}
        facts = Facts()
        facts.isolation = {
            "host_uid_is_not_root": await _host_uid_is_not_root(sandbox),
            "no_root_inside": seen.get("uid") not in ("0", None),
            "no_capabilities": all(int(seen.get(name, "1"), 16) == 0 for name in ("CapEff", "CapPrm", "CapBnd")),
            "no_new_privileges": seen.get("NoNewPrivs") == "1",
            "no_network": seen.get("interfaces") in ("lo", "") and seen.get("routes") == "0",
            "kernel_settings_read_only": seen.get("core_pattern") == "no" and seen.get("sysrq") == "no",
            "system_read_only": seen.get("usr") == "no" and seen.get("etc") == "no",
            "host_sockets_hidden": seen.get("docker_sock") == "no" and seen.get("run_docker_sock") == "no",
            "host_files_hidden": seen.get("shadow") == "no" and seen.get("sys") == "no",
            "workspace_writable": seen.get("workspace") == "yes" and seen.get("tmp") == "yes",
        }
        broken = [name for name, holds in facts.isolation.items() if not holds]
        if broken:
            raise IsolationUnavailable(f"bubblewrap runs, but isolation is not complete: {', '.join(broken)} ({seen})")
        facts.isolation["system_call_filter"] = seen.get("Seccomp") == "2"
        if python is not None:
            code = "import platform; print(platform.python_version())"
            version = await sandbox.run(_spec([python.executable, "-I", "-S", "-B", "-c", code], b""), never)
            if version.status == "ok":
                facts.python_version = version.stdout.text().text.strip()
            else:
                said = version.stderr.text().text.strip() or version.reason or version.status
                facts.notes.append(f"no python3 inside: {python.executable} does not run there: {said}")
        return facts
    finally:
        await sandbox.destroy()


def _spec(argv: list[str], stdin: bytes) -> ExecSpec:
    return ExecSpec(argv, stdin, {}, None, 20.0, 65536, 1 << 20)


async def _host_uid_is_not_root(sandbox: BackendSandbox) -> bool:
    """Look from outside at a command that waits: the kernel must know it under another uid than root's."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[str] = loop.create_future()
    sandbox.init_pid = None
    waiting = loop.create_task(sandbox.run(_spec(["/bin/sleep", "20"], b""), stop))
    try:
        for _ in range(2000):
            if sandbox.init_pid is not None or waiting.done():
                break
            await asyncio.sleep(0.002)
        if sandbox.init_pid is None:
            return False
        status = Path(f"/proc/{sandbox.init_pid}/status").read_text()  # noqa: ASYNC240  (procfs does not wait)
        line = next(line for line in status.splitlines() if line.startswith("Uid:"))
        return "0" not in line.split()[1:]
    except OSError:
        return False
    finally:
        stop.set_result("probe")
        await waiting
