"""Tables of the kernel that all guests and this machine share, and how much of them one guest gets.

Control groups do not count these. What a container can be told at its start is told there (`container`: pending signals,
message queues; no asynchronous I/O contexts by `seccomp_profile`); the rest is set from outside, once it is up: buffers of
sockets, its pseudo-terminals at the mount of its /dev/pts, and inotify in its user namespace. What is limited for each user
is so for each of the 65,536 that a guest's root may become (`docs/security.md` says what that leaves open). Where an Engine
does not remap ids a guest's inotify would be that of this machine's own root, so there it has none.
Takes root's rights and Linux 5.2. Neighbour: `golem.exeunit.runtimes.vm.runtime`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import trio

from golem.exeunit.runtimes.vm.meter import group_file
from golem.exeunit.transfer.beneath import open_in_root

log = logging.getLogger("golem.exeunit")

CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
MACHINE = Path("/proc/sys/fs/inotify")
USERS = 1 << 16  # ids that are remapped for a container, as a rule
PTYS = 64
TMPFS = "size=64k", "nr_inodes=1k"
INOTIFY = {"max_inotify_instances": 32, "max_inotify_watches": 8192}
SOCKETS_SHARE = 4  # of the memory, for buffers of sockets
TOOL_TIMEOUT_S = 10.0
_FSCONFIG, _FSPICK = 431, 433  # on every architecture
_PICK_EMPTY_PATH, _PICK_CLOEXEC = 8, 1
_SET_STRING, _RECONFIGURE = 1, 7
_libc = ctypes.CDLL(None, use_errno=True)


def has_inotify(root_id: int) -> bool:
    """Whether guests may have inotify: where it can be bounded. `root_id`: of root in a container, 0 without remapped ids.

    A guest's root has as much of it for each of its users, and all of that counts as what this machine's root has. So this
    machine's limit is raised beyond what all of them together can take; the kernel counts the memory of it as the guest's.
    """
    return root_id != 0 and os.geteuid() == 0 and all(_raised(name, most) for name, most in INOTIFY.items())


def _raised(name: str, most: int) -> bool:
    path, enough = MACHINE / name.replace("max_inotify", "max_user"), 2 * most * USERS
    try:
        if int(path.read_text()) < enough:
            path.write_text(str(enough))
            log.info("%s is %d now: each user of a guest counts as this machine's root", path, enough)
        return True
    except (OSError, ValueError) as error:
        log.warning("guests have no inotify, since %s cannot be raised to %d: %s", path, enough, error)
        return False


async def bound(init_pid: int, root_id: int, mem_bytes: int) -> None:
    """Bound what a container that has just started may take; `mem_bytes` is its memory. Raises OSError, MeterError."""
    if os.geteuid() != 0:
        return
    # Control groups of version 1 count buffers of sockets from then on that there is a limit, which Engines no longer set.
    # Each socket gets a little beyond it, so it is no wall: `meter` adds what they take to the memory.
    sockets = group_file(init_pid, "memory", ("memory.kmem.tcp.limit_in_bytes",), ())
    if sockets is not None:
        sockets.write_text(str(mem_bytes // SOCKETS_SHARE))
    await trio.to_thread.run_sync(_bound_ptys, init_pid)
    await trio.to_thread.run_sync(_bound_tmpfs, init_pid)
    if has_inotify(root_id):
        await _bound_inotify(init_pid)


def _bound_ptys(init_pid: int) -> None:
    options = _options(init_pid)
    root = os.open(f"/proc/{init_pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        place = open_in_root(root, "/dev/pts", os.O_PATH | os.O_DIRECTORY)
    finally:
        os.close(root)
    try:
        if options is None or f"{os.major(dev := os.fstat(place).st_dev)}:{os.minor(dev)}" != options[0]:
            raise OSError("the container's /dev/pts is none of its own")
        kept = [option for option in options[1].split(",") if option.partition("=")[0] in ("gid", "mode", "ptmxmode")]
        _reconfigure(place, (*kept, f"max={PTYS}"))
    finally:
        os.close(place)


def _bound_tmpfs(init_pid: int) -> None:
    """Give an end to places in memory that an Engine mounts without one (those of control groups)."""
    for line in Path(f"/proc/{init_pid}/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        words = tail.split()
        options = words[2].split(",")
        if words[0] != "tmpfs" or "rw" not in options or any(option.startswith("size=") for option in options):
            continue
        root = os.open(f"/proc/{init_pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            place = open_in_root(root, head.split()[4], os.O_PATH | os.O_DIRECTORY)
        finally:
            os.close(root)
        try:
            if f"{os.major(dev := os.fstat(place).st_dev)}:{os.minor(dev)}" == head.split()[2]:
                _reconfigure(place, TMPFS)
        finally:
            os.close(place)


def _reconfigure(place: int, options: Sequence[str]) -> None:
    """Set options of the file system that is mounted at an open folder. Raises OSError."""
    context = _call(_FSPICK, place, b"", _PICK_EMPTY_PATH | _PICK_CLOEXEC)
    try:
        for option in options:
            key, _, value = option.partition("=")
            _call(_FSCONFIG, context, _SET_STRING, key.encode(), value.encode(), 0)
        _call(_FSCONFIG, context, _RECONFIGURE, None, None, 0)
    finally:
        os.close(context)


def _options(init_pid: int) -> tuple[str, str] | None:
    """Return device and options of a container's /dev/pts; None where it has none, or that of this machine."""
    shared = os.stat("/dev/pts").st_dev if os.path.isdir("/dev/pts") else -1
    for line in Path(f"/proc/{init_pid}/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        fields, words = head.split(), tail.split()
        if words[0] == "devpts" and fields[2] != f"{os.major(shared)}:{os.minor(shared)}":
            return fields[2], words[2]
    return None


def _call(number: int, *arguments: int | bytes | None) -> int:
    words = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"a mount of the container cannot be bounded: {os.strerror(ctypes.get_errno())}")
    return result


async def _bound_inotify(init_pid: int) -> None:
    """Write the limits of the container's user namespace; only a process of one thread can enter that."""
    if os.stat(f"/proc/{init_pid}/ns/user").st_ino == os.stat("/proc/self/ns/user").st_ino:
        raise OSError("the container has no user namespace of its own")
    script = " && ".join(f"echo {most} > /proc/sys/user/{name}" for name, most in INOTIFY.items())
    command = ["nsenter", f"--user=/proc/{init_pid}/ns/user", "--", "/bin/sh", "-c", script]
    try:
        with trio.fail_after(TOOL_TIMEOUT_S):
            done = await trio.run_process(command, check=False, stdin=subprocess.DEVNULL, capture_stderr=True, cwd="/")
    except trio.TooSlowError:
        raise OSError("nsenter took too long") from None
    if done.returncode != 0:
        raise OSError(f"inotify cannot be bounded: {done.stderr.decode(errors='replace').strip()[:300]}")


def piped_cores() -> str | None:
    """Return the program that this machine starts for each process that crashes, also in containers; None if it is none."""
    try:
        pattern = CORE_PATTERN.read_text().strip()
    except OSError:
        return None
    return pattern[1:].split(" ")[0] if pattern.startswith("|") else None
