"""The system-call filter that every sandboxed command runs under, assembled as classic BPF for the kernel.

A block list of what tools do not need and namespaces do not contain: new namespaces and mounts, kernel keyrings, bpf,
perf, io_uring (which would bypass this filter), ptrace, and sockets other than UNIX, IPv4, IPv6 and netlink (AF_VSOCK
is not confined by a network namespace and reaches a hypervisor). Nothing else lives here; bubblewrap loads it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

# linux/audit.h: what seccomp_data.arch holds, and the numbers of asm/unistd.h that differ between the two.
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COMMON = {
    # asm-generic numbers that every architecture shares
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
}  # fmt: skip
_NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {
        "ptrace": 101, "syslog": 103, "pivot_root": 155, "adjtimex": 159, "chroot": 161, "acct": 163,
        "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169,
        "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176,
        "quotactl": 179, "lookup_dcookie": 212, "clock_settime": 227, "kexec_load": 246, "add_key": 248,
        "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "open_by_handle_at": 304,
        "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
        "finit_module": 313, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323,
    },
    "aarch64": {
        "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "quotactl": 60, "acct": 89, "unshare": 97,
        "kexec_load": 104, "init_module": 105, "delete_module": 106, "clock_settime": 112, "syslog": 116, "ptrace": 117,
        "reboot": 142, "sethostname": 161, "setdomainname": 162, "settimeofday": 170, "adjtimex": 171, "add_key": 217,
        "request_key": 218, "keyctl": 219, "swapon": 224, "swapoff": 225, "perf_event_open": 241,
        "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271,
        "kcmp": 272, "finit_module": 273, "bpf": 280, "userfaultfd": 282, "kexec_file_load": 294,
    },
}  # fmt: skip
_CLONE = {"x86_64": 56, "aarch64": 220}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_CLONE3 = 435
_X32_BIT = 0x40000000
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)

_ALLOW = 0x7FFF0000
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH_OFFSET, _ARG0 = 0, 4, 16  # offsets in struct seccomp_data; the low half of an argument on little-endian


def supported() -> bool:
    """True where the filter's numbers are known (x86_64 and aarch64, little-endian)."""
    return os.uname().machine in _ARCH


def program() -> bytes:
    """The filter for this machine as an array of ``struct sock_filter``, for ``bwrap --seccomp``.

    Raises ValueError on an architecture whose system-call numbers are not in the table.
    """
    machine = os.uname().machine
    if machine not in _ARCH:
        raise ValueError(f"no system-call filter for {machine}; known: {', '.join(sorted(_ARCH))}")

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, value)

    def deny(code: int) -> bytes:
        return instruction(_RETURN, 0x00050000 | code)

    out = [
        instruction(_LOAD, _ARCH_OFFSET),
        instruction(_JUMP_EQUAL, _ARCH[machine], 1, 0),
        deny(errno.ENOSYS),  # another ABI (32-bit calls) would reach the same kernel under other numbers
        instruction(_LOAD, _NR),
    ]
    if machine == "x86_64":
        out += [instruction(_JUMP_GREATER_EQUAL, _X32_BIT, 0, 1), deny(errno.ENOSYS)]
    for number in sorted((*_NUMBERS[machine].values(), *_COMMON.values())):
        out += [instruction(_JUMP_EQUAL, number, 0, 1), deny(errno.EPERM)]
    # clone3 hides its flags behind a pointer; without it libraries fall back to clone, whose flags can be read.
    out += [instruction(_JUMP_EQUAL, _CLONE3, 0, 1), deny(errno.ENOSYS)]
    out += [
        instruction(_JUMP_EQUAL, _CLONE[machine], 0, 4),
        instruction(_LOAD, _ARG0),
        instruction(_JUMP_SET, _NEW_NAMESPACES, 0, 1),
        deny(errno.EPERM),
        instruction(_RETURN, _ALLOW),
    ]
    families = len(_FAMILIES)
    out += [instruction(_JUMP_EQUAL, _SOCKET[machine], 0, families + 2), instruction(_LOAD, _ARG0)]
    for index, family in enumerate(_FAMILIES):
        out.append(instruction(_JUMP_EQUAL, family, families - index, 0))
    out += [deny(errno.EAFNOSUPPORT), instruction(_RETURN, _ALLOW)]
    return b"".join(out)
