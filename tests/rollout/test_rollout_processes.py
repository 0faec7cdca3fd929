import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollout.processes import Service, ServiceFailed

READY = "print('it is listening on http://127.0.0.1:1234', flush=True); "


def alive(pid: int) -> bool:
    """Whether the process runs (one that has ended but was not reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_service_tells_where_it_listens_and_is_gone_afterwards():
    with Service("thing", ["-c", READY + "import time; time.sleep(60)"]) as service:
        assert service.url == "http://127.0.0.1:1234"
        assert alive(service.pid)
    assert not alive(service.pid)
    service.stop()


def test_a_service_that_fails_says_why():
    with pytest.raises(ServiceFailed, match=r"(?s)the thing ended instead of listening.*no such luck"):
        Service("thing", ["-c", "raise SystemExit('no such luck')"])
    code = "import sys, time; print('still waiting', file=sys.stderr, flush=True); time.sleep(60)"
    with pytest.raises(ServiceFailed, match=r"(?s)did not listen within 1 s.*still waiting"):
        Service("thing", ["-c", code], timeout_s=1)


def test_what_a_service_leaves_running_ends_with_it(tmp_path: Path):
    """It ignores the polite signal, and so does its child: both are gone when `stop` returns."""
    note = tmp_path / "pid"
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pid = os.fork()\nif pid: open({str(note)!r}, 'w').write(str(pid)); {READY}\ntime.sleep(60)"
    )
    service = Service("thing", ["-c", code])
    child = int(note.read_text())
    assert alive(child)
    service.stop(grace_s=0.3)
    assert not alive(service.pid)
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.02)
    assert not alive(child)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(number: signal.Signals, tmp_path: Path):
    """Even while its services are still starting."""
    code = (
        "import sys; import rollout.demo as demo, rollout.processes as processes\n"
        f"real = demo.Service\n"
        "def service(name, arguments, **options):\n"
        f"    made = real(name, ['-c', {READY + 'import time; time.sleep(60)'!r}])\n"
        f"    open({str(tmp_path)!r} + '/' + name, 'w').write(str(made.pid))\n"
        "    return made\n"
        "demo.Service = service\n"
        "import time\n"
        "def wait(*args): print('waiting', flush=True); time.sleep(60)\n"
        "demo.show_tasks = wait\n"
        f"sys.argv = ['demo', '--out', {str(tmp_path / 'out')!r}]\n"
        "sys.exit(demo.main())"
    )
    demo = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert demo.stdout is not None
    for line in demo.stdout:
        if "waiting" in line:
            break
    pids = [int((tmp_path / name).read_text()) for name in ("server", "sandbox")]
    assert all(alive(pid) for pid in pids)
    os.kill(demo.pid, number)
    assert demo.wait(timeout=30) == 130
    assert "services are down" in demo.stdout.read()
    assert not any(alive(pid) for pid in pids)
    assert not (tmp_path / "out").exists()
