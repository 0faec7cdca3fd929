"""The other ways the service can run: as an ordinary user, without control groups, on plain directories, with the
interpreter of the service bound in. Isolation is the same in all; the limits hold in other ways, and it says so.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import SandboxClient, SandboxError

from .conftest import Service, missing, processes_with, running

pytestmark = pytest.mark.usefixtures("bubblewrap")
USER = 65500


@pytest.fixture(scope="module")
def ordinary() -> Iterator[Service]:
    """A service that is not root. The capability only lets it read the interpreter below root's home; it is dropped
    before bubblewrap starts."""
    if os.geteuid() != 0:
        with running() as service:
            yield service
        return
    if shutil.which("setpriv") is None:
        missing("setpriv (util-linux) is not installed, so no ordinary user can be played")
    capability = "+dac_read_search"
    prefix = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
    with running(prefix=(*prefix, f"--inh-caps={capability}", f"--ambient-caps={capability}"), owner=USER) as service:
        yield service


@pytest.fixture(scope="module")
def ungrouped() -> Iterator[Service]:
    """The same user as the tests, without control groups and without mounts of its own."""
    with running("--workspace", "directory", "--cgroups", "off") as service:
        yield service


def test_an_ordinary_user_isolates_as_well(ordinary: Service) -> None:
    client = ordinary.client()
    found = client.capabilities()
    assert all(found.isolation.values())
    assert found.limits["disk_mb"].how == "polling"
    box = client.create(limits={"memory_mb": 256, "pids": 24, "disk_mb": 8}).id
    assert client.exec(box, "id -u; python3 -c 'print(6*7)'").stdout == "1000\n42\n"
    client.write_file(box, "d/f", b"x")
    assert client.exec(box, "cat d/f; echo y > d/g; rm d/f").stdout == "x"
    assert client.read_file(box, "d/g") == b"y\n"
    assert client.exec(box, ": > /proc/sys/kernel/core_pattern").status == "tool_error"
    marker = f"1{uuid.uuid4().int % 10**9}"
    result = client.exec(box, f"echo begun; setsid sleep {marker} & trap '' TERM; sleep {marker}", timeout_s=1)
    assert (result.status, result.stdout) == ("timeout", "begun\n")
    assert processes_with(marker) == []
    client.exec(box, "mkdir -p a/b/c && touch a/b/c/f && chmod 000 a/b/c a/b a")
    client.delete(box)
    assert list((ordinary.state / "instance-0" / "workspaces").iterdir()) == []


FORKS = """
import os, time
made = 0
try:
    while made < 500:
        if os.fork() == 0:
            time.sleep(100)
            os._exit(0)
        made += 1
except BlockingIOError:
    print(made)
"""


@pytest.mark.parametrize("who", ["ordinary", "ungrouped"])
def test_without_control_groups_rlimits_hold(who: str, request: pytest.FixtureRequest) -> None:
    client = request.getfixturevalue(who).client()
    if client.capabilities().limits["pids"].how != "rlimit":
        pytest.skip("this user may make control groups")
    box = client.create(limits={"memory_mb": 128, "pids": 24}).id
    result = client.exec(box, ["python3", "-c", FORKS])
    assert result.status == "ok"
    assert 1 <= int(result.stdout) <= 24
    result = client.exec(box, ["python3", "-c", "a = bytearray(1 << 30)"])
    assert result.status == "tool_error"
    assert "MemoryError" in result.stderr
    with pytest.raises(SandboxError) as caught:
        client.create(limits={"cpus": 0.5})
    assert (caught.value.status, caught.value.type, caught.value.field) == (400, "unenforceable_limit", "limits.cpus")
    client.delete(box)


def fills(client: SandboxClient, script: str) -> None:
    box = client.create(limits={"disk_mb": 4}).id
    try:
        result = client.exec(box, ["python3", "-c", script], timeout_s=60)
        assert (result.status, result.reason) == ("policy_denied", "disk_mb")
        with pytest.raises(SandboxError) as caught:
            client.write_file(box, "more", b"x" * (1 << 20))
        assert (caught.value.status, caught.value.type) == (413, "disk_full")
    finally:
        client.delete(box)


def test_plain_directories_are_watched(ungrouped: Service) -> None:
    client = ungrouped.client()
    assert client.capabilities().limits["disk_mb"].how == "polling"
    fills(client, "import time\nfor n in range(8): open(f'f{n}', 'wb').write(b'x' * (1 << 20))\ntime.sleep(100)")
    deep = "import os, time\nfor n in range(600): os.mkdir('d'); os.chdir('d')\ntime.sleep(100)"
    box = client.create(limits={"disk_mb": 4}).id
    assert client.exec(box, ["python3", "-c", deep], timeout_s=60).reason == "disk_mb"
    client.delete(box)
    box = client.create(limits={"disk_mb": 4}).id
    little = "import time\nfor n in range(5): open(f'f{n}', 'wb').write(b'x' * (1 << 20))\ntime.sleep(100)"
    assert client.exec(box, ["python3", "-c", little], timeout_s=60).reason == "disk_mb"
    assert client.exec(box, "rm f*").status == "ok"  # a short command may still tidy up
    assert client.exec(box, ["python3", "-c", "open('one', 'wb').write(b'x' * (5 << 20))"]).status == "tool_error"
    client.delete(box)
    assert list((ungrouped.state / "instance-0" / "workspaces").iterdir()) == []


def test_the_services_own_python_can_be_bound_in() -> None:
    prefix = Path(os.path.realpath(sys.base_prefix))
    if str(prefix) in ("/usr", "/"):
        pytest.skip("this interpreter is the system's")
    if os.geteuid() != 0 and not all(parent.stat().st_mode & 0o001 for parent in prefix.parents):
        pytest.skip(f"{prefix} is not everybody's to read")
    with running("--python", "prefix") as service:
        client = service.client()
        python = client.capabilities().python
        assert python is not None
        assert python["executable"] == f"{prefix}/bin/python3"
        assert python["version"] == ".".join(map(str, sys.version_info[:3]))
        box = client.create().id
        result = client.exec(box, ["python3", "-c", "import sys, json, ssl; print(sys.prefix)"])
        assert result.stdout == f"{prefix}\n"
        parents = [str(p) for p in prefix.parents if str(p) not in ("/", "/usr", "/usr/local")]
        if parents:
            listing = client.exec(box, ["ls", "-A", parents[-1]])
            assert set(listing.stdout.split()) <= {prefix.parts[2]}
        assert client.exec(box, f"touch {prefix}/x").status == "tool_error"
        client.delete(box)


def test_cpus_is_a_quota() -> None:
    with running() as service:
        client = service.client()
        if client.capabilities().limits["cpus"].how != "cgroup":
            pytest.skip("no cpu control group here")
        box = client.create(limits={"cpus": 0.1}).id
        script = (
            "import time; end = time.monotonic() + 2\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
        )
        assert float(client.exec(box, ["python3", "-c", script]).stdout) < 1.0
        client.delete(box)
