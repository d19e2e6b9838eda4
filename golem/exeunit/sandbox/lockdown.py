"""What a child does to itself before it touches foreign code.

Order matters and is that of the functions here: resource limits, own namespaces and an unprivileged user (both root
only), no capabilities, die with the parent, Landlock, and seccomp last. Every step is irrevocable.
Neighbours: `seccomp`; `runtimes.wasm_child`, which calls these; `process`, which starts and ends such children.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import stat
import struct
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
# net, ipc, uts. None of mounts: it would hold on to the storage of every other activity, also after that was unmounted.
_NAMESPACES = 0x40000000 | 0x08000000 | 0x04000000

_CAPABILITY_VERSION_3 = 0x20080522

# Landlock has the same call numbers on every architecture.
_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT = 444, 445, 446
_RULE_PATH_BENEATH = 1
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SYM = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
READ_ONLY = _READ_FILE | _READ_DIR
# No EXECUTE, and no making of devices, sockets or FIFOs: a later open() by the supervisor could hang on those.
READ_WRITE = (READ_ONLY | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER
              | _TRUNCATE)  # fmt: skip
_FILE_ACCESS = _WRITE_FILE | _READ_FILE | _TRUNCATE


def limit_memory(data_bytes: int) -> None:
    """Bound the data of this process: whatever strangers make it hold ends it, and not the machine. Children inherit it:
    those of the sandbox set a bound of their own, and `unlimit_memory` is for the others.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = data_bytes if hard == resource.RLIM_INFINITY else min(data_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def unlimit_memory(pid: int) -> None:
    """Take the bound of `limit_memory` from a child that is metered from outside."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
        resource.prlimit(pid, resource.RLIMIT_DATA, (hard, hard))


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def limit_resources(*, cpu_s: int | None, data_bytes: int | None, file_bytes: int | None, open_files: int) -> None:
    """Hard limits: CPU seconds (SIGXCPU, one second later SIGKILL), private memory, size of one file, descriptors."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    if cpu_s is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    if data_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))


def use_cpus(count: int) -> None:
    """Run on at most `count` CPUs, chosen by process id so that activities spread over the machine."""
    cpus = sorted(os.sched_getaffinity(0))
    first = os.getpid() % len(cpus)
    os.sched_setaffinity(0, {cpus[(first + offset) % len(cpus)] for offset in range(max(1, count))})


def enter_namespaces() -> bool:
    """Own, empty network and own IPC and host name; False where even root may not (in most containers).

    They are a second wall: sockets and IPC are already out of reach by seccomp, files by Landlock.
    """
    return bool(_libc.unshare(_NAMESPACES) == 0)


def become(uid: int) -> None:
    """Drop root for an unprivileged user and group of the same number."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def drop_capabilities() -> None:
    """Give up every capability, also those that a plain user was started with."""
    header, nothing = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
    _check(_libc.capset(header, nothing), "capset")


def die_with_parent(parent_pid: int) -> None:
    """Be killed when the parent's starting thread ends; raises ProcessLookupError if it already has.

    The kernel forgets this wish at a change of user, so it comes after `become`.
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        raise ProcessLookupError("the supervisor is gone")


def landlock_abi() -> int:
    """Version of Landlock in this kernel, 0 when it is absent or switched off."""
    return max(0, int(_libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)))


def restrict_files(rules: Iterable[tuple[int, int]]) -> int:
    """Deny the whole file system (and TCP, signals out, abstract sockets) but for what `rules` allow.

    `rules`: (descriptor of a file or directory, access bits). Returns the Landlock version in force.
    Must run while the process has one thread: Landlock binds the calling thread and its descendants only.
    Errors: OSError when Landlock is absent; RuntimeError when there are other threads.
    """
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("Landlock must be set before there are threads")
    abi = _check(_libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1), "Landlock")
    handled = (1 << 13) - 1
    for since, bit in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        handled |= bit if abi >= since else 0
    network = 3 if abi >= 4 else 0  # bind and connect of TCP
    scopes = 3 if abi >= 6 else 0  # abstract Unix sockets, signals
    attributes = struct.pack("<QQQ", handled, network, scopes)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = _check(_libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0), "landlock_create_ruleset")
    for descriptor, wanted in rules:
        access = wanted & handled
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            access &= _FILE_ACCESS
        rule = struct.pack("<Qi", access, descriptor)
        _check(_libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0), "landlock_add_rule")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
    return abi
