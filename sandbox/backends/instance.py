"""One running service's place on disk: its directory, its lock, its block of user ids; and the removal of what dead
earlier instances left. The lock is the truth: a directory whose lock can be taken belongs to nobody alive.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sandbox.backends import cgroup

MAX_INSTANCES = 64
UIDS_PER_INSTANCE = 2048
_FIRST_UID = 0x3A000000  # far above people, system accounts and the ranges that newuidmap hands out
_UID_REGIONS = 4096
_FIRST_UID_IN_CONTAINER = 32768  # where a user namespace maps only the first 65536 ids


@dataclass
class Instance:
    """`index` chooses the uid block; `lock_fd` holds the lock for as long as any process has it open."""

    root: Path
    index: int
    lock_fd: int

    @property
    def workspaces(self) -> Path:
        return self.root / "workspaces"

    @property
    def _place(self) -> str:
        """A short name for the state directory, the same at every start."""
        return hashlib.sha256(os.fsencode(self.root.parent.resolve())).hexdigest()[:12]

    @property
    def first_uid(self) -> int:
        """Raises OSError when this user namespace has no ids to give."""
        # Services with different state directories do not know of each other; keep their blocks apart.
        spread = int(self._place, 16) % _UID_REGIONS * MAX_INSTANCES * UIDS_PER_INSTANCE
        for base in (_FIRST_UID + spread, _FIRST_UID_IN_CONTAINER):
            first = base + self.index * UIDS_PER_INSTANCE
            for line in Path("/proc/self/uid_map").read_text().splitlines():
                inside, _, count = map(int, line.split())
                if inside <= first and first + UIDS_PER_INSTANCE <= inside + count:
                    return first
        raise OSError("no block of 2048 user ids is mapped here; run the service as an ordinary user")

    @property
    def group_name(self) -> str:
        return f"agentserve-sandbox-{self._place}-{self.index}"

    def remember_cgroups(self, tree: cgroup.Tree) -> None:
        """Write down where our control groups are, for whoever cleans up after us."""
        (self.root / "cgroups.json").write_text(json.dumps([str(path) for path in tree.bases.values()]))

    def remove(self) -> None:
        """Remove our directory and give the lock up."""
        _clean(self.root, keep_lock=False)
        os.close(self.lock_fd)


def default_state_dir() -> Path:
    if os.geteuid() == 0 and os.access("/var/lib", os.W_OK):
        return Path("/var/lib/agentserve-sandbox")
    return Path(tempfile.gettempdir()) / f"agentserve-sandbox-{os.geteuid()}"


def claim(state_dir: Path | None) -> Instance:
    """Clean up after dead instances and take the first free place.

    Raises OSError when the state directory cannot be used or belongs to somebody else.
    """
    state = state_dir or default_state_dir()
    state.mkdir(mode=0o711, parents=True, exist_ok=True)
    status = state.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{state} must be a directory that only uid {os.geteuid()} may write")
    if os.geteuid() == 0:
        for parent in state.absolute().parents:
            if not parent.stat().st_mode & 0o001:
                raise PermissionError(f"{parent} cannot be passed by the sandboxes' own uids; choose another place")
    state.chmod(0o711)  # sandboxes' uids must be able to pass, not to list
    mine: Instance | None = None
    for index in range(MAX_INSTANCES):
        root = state / f"instance-{index}"
        if not root.exists() and mine is not None:
            continue
        root.mkdir(mode=0o711, exist_ok=True)
        lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        if not (root / "lock").exists():  # its owner removed it between our open and our lock
            os.close(lock)
            continue
        _clean(root, keep_lock=mine is None)
        if mine is None:
            mine = Instance(root, index, lock)
        else:
            os.close(lock)
    if mine is None:
        raise OSError(f"all {MAX_INSTANCES} places in {state} are in use by running services")
    mine.root.chmod(0o711)
    mine.workspaces.mkdir(mode=0o711)
    mine.workspaces.chmod(0o711)
    return mine


def _clean(root: Path, keep_lock: bool) -> None:
    with suppress(FileNotFoundError, ValueError):
        for path in json.loads((root / "cgroups.json").read_text()):
            cgroup.remove_tree(Path(path))
    for entry in root.iterdir():
        if entry.name != "lock":
            remove_directory(entry)
    if not keep_lock:
        with suppress(FileNotFoundError):
            (root / "lock").unlink()
        with suppress(OSError):
            root.rmdir()


def remove_directory(path: Path) -> None:
    """Remove a file or a tree that a hostile program filled: any depth, any names, no links followed. Blocks."""
    remove = ["/bin/rm", "-rf", "--one-file-system", "--", str(path)]
    subprocess.run(remove, check=False, stderr=subprocess.DEVNULL)
    if path.exists():  # an ordinary user cannot enter what the guest locked, but may unlock it
        subprocess.run(["/bin/chmod", "-R", "u+rwx", "--", str(path)], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(remove, check=False, stderr=subprocess.DEVNULL)
