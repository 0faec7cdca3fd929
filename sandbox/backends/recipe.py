"""The bubblewrap command line: what a sandboxed command sees of the machine, and nothing else.

Only named parts of the host are bound, read-only; never ``/``, ``/run``, ``/var`` or a home directory, because a unix
socket ignores read-only mounts. Who runs bubblewrap, and under which limits, is for `bubblewrap` and the spawner.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

GUEST_UID = 1000
HOME = "/workspace"
BASE_PATH = "/usr/local/bin:/usr/bin:/bin"
_ETC = (
    "alternatives", "ca-certificates", "fonts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "magic",
    "mime.types", "os-release", "protocols", "services", "ssl/certs", "ssl/openssl.cnf",
)  # fmt: skip
_LARGEST_COPY = 4 << 20
_STUBS = {
    "passwd": f"root:x:0:0:root:/root:/usr/sbin/nologin\nagent:x:{GUEST_UID}:{GUEST_UID}:agent:{HOME}:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": f"root:x:0:\nagent:x:{GUEST_UID}:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\n",
}


@dataclass(frozen=True)
class Python:
    """The interpreter inside. `source` is what is bound at `prefix` (None: /usr has it already)."""

    executable: str
    prefix: str | None = None
    source: str | None = None

    @property
    def path(self) -> str:
        return BASE_PATH if self.prefix is None else f"{self.prefix}/bin:{BASE_PATH}"


def system_python() -> Python | None:
    """The python3 that binding /usr brings along."""
    for directory in BASE_PATH.split(":"):
        candidate = Path(directory) / "python3"
        if os.access(candidate, os.X_OK) and str(candidate.resolve()).startswith("/usr/"):
            return Python(str(candidate))
    return None


def prefix_python() -> Python | None:
    """The installation of the interpreter that runs this service (not its virtual environment)."""
    prefix = os.path.realpath(sys.base_prefix)
    if prefix in ("/", "/usr") or not os.access(f"{prefix}/bin/python3", os.X_OK):
        return None
    return Python(f"{prefix}/bin/python3", prefix, prefix)


def write_etc(directory: Path) -> None:
    """Make the sandboxes' /etc: the few files of the host's that programs need, copied, and our own accounts and names.

    One directory bound once is quicker than twenty binds, and what is not copied cannot be seen. Only what everybody
    may read is copied; symbolic links stay links.
    """
    directory.mkdir(mode=0o755)
    for name in (*_ETC, *sorted(path.name for path in Path("/etc").glob("java-*"))):
        _copy_public(Path("/etc") / name, directory / name)
    for name, text in _STUBS.items():
        (directory / name).write_text(text)
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)


def _copy_public(source: Path, target: Path) -> None:
    try:
        mode = source.lstat().st_mode
    except OSError:
        return
    if stat.S_ISLNK(mode):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.readlink(source))
    elif stat.S_ISDIR(mode) and mode & 0o005 == 0o005:
        target.mkdir(parents=True, exist_ok=True)
        for entry in source.iterdir():
            _copy_public(entry, target / entry.name)
    elif stat.S_ISREG(mode) and mode & 0o004 and source.stat().st_size <= _LARGEST_COPY:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def base_env(python: Python | None) -> dict[str, str]:
    """The fixed environment: nothing of the service's own, and the same on every machine."""
    return {
        "PATH": python.path if python else BASE_PATH,
        "HOME": HOME,
        "USER": "agent",
        "LOGNAME": "agent",
        "SHELL": "/bin/sh",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "TERM": "dumb",
        "TMPDIR": "/tmp",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",  # or a killed program's partial output would be lost in its buffer
    }


def static_options(version: tuple[int, ...], etc: Path, python: Python | None, shm_bytes: int) -> list[str]:
    """Everything that does not depend on the sandbox. The order is the order in which bubblewrap acts."""
    options = [
        "--unshare-all", "--unshare-user", "--uid", str(GUEST_UID), "--gid", str(GUEST_UID), "--hostname", "sandbox",
        "--new-session", "--die-with-parent", "--cap-drop", "ALL", "--clearenv",
    ]  # fmt: skip
    if version >= (0, 8):
        options.append("--disable-userns")
    options += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/") / name
        if path.is_symlink():
            options += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            options += ["--ro-bind", str(path), str(path)]
    options += ["--ro-bind", str(etc), "/etc"]
    if python is not None and python.prefix is not None:
        for parent in reversed(Path(python.prefix).parents):
            if str(parent) != "/" and not parent.is_relative_to("/usr"):
                options += ["--perms", "0111", "--dir", str(parent)]
        options += ["--ro-bind", python.source or python.prefix, python.prefix]
    options += [
        "--proc", "/proc", "--dev", "/dev",
        "--perms", "1777", "--size", str(shm_bytes), "--tmpfs", "/dev/shm", "--remount-ro", "/dev",
        "--dir", "/run", "--dir", "/var", "--symlink", "../run", "/var/run", "--symlink", "../tmp", "/var/tmp",
    ]  # fmt: skip
    return options


def options(static: list[str], root: Path, env: dict[str, str]) -> bytes:
    """The whole option list for one command, NUL separated, for ``bwrap --args``."""
    rest = ["--bind", f"{root}/tmp", "/tmp", "--bind", f"{root}/workspace", HOME, "--remount-ro", "/", "--chdir", HOME]
    for name, value in env.items():
        rest += ["--setenv", name, value]
    return b"".join(part.encode("utf-8", "surrogateescape") + b"\0" for part in (*static, *rest))


def command(argv: list[str], cwd: str | None) -> bytes:
    """The argument vector, NUL separated. It goes through the shell's exec, so that a command that does not exist ends
    with 127 as everywhere, and is not taken for a failure of the sandbox."""
    if cwd is not None:
        full = ["/bin/sh", "-c", 'cd -- "$1" || exit 126; shift; exec "$@"', "sh", cwd, *argv]
    elif argv[0] == "/bin/sh":
        full = argv
    else:
        full = ["/bin/sh", "-c", 'exec "$@"', "sh", *argv]
    return b"".join(part.encode("utf-8", "surrogateescape") + b"\0" for part in full)
