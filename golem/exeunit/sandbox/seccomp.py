"""A system-call allow-list for children that run foreign code.

`install` puts a BPF filter on every thread of the calling process. What is not on the list answers ENOSYS, which
C libraries and the Rust standard library take as "this kernel is too old for that" and fall back from; no call here can
open a socket, start a process, signal or trace another, mount, or talk to io_uring. `forbid_new_code` adds a second,
narrower filter once machine code is loaded: no executable mappings and no further filters from then on.

Written for x86-64; `supported` tells whether this machine is one. Neighbours: `lockdown`, which calls it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

_NR_SECCOMP = 317
_SET_MODE_FILTER = 1
_FLAG_TSYNC = 1
_PR_SET_NO_NEW_PRIVS = 38

_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000

_RET_KILL_PROCESS = 0x80000000
_RET_ERRNO = 0x00050000
_RET_ALLOW = 0x7FFF0000

# Numbers of the x86-64 table. Memory, files below what Landlock allows, time, threads of this process, polling.
_ALLOWED: dict[str, int] = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "sched_yield": 24, "mremap": 25,
    "madvise": 28, "dup": 32, "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "fcntl": 72, "fsync": 74,
    "fdatasync": 75, "truncate": 76, "ftruncate": 77, "getcwd": 79, "rename": 82, "mkdir": 83, "rmdir": 84,
    "link": 86, "unlink": 87, "symlink": 88, "readlink": 89, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98,
    "sysinfo": 99, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "sigaltstack": 131, "fstatfs": 138,
    "gettid": 186, "time": 201, "futex": 202, "sched_setaffinity": 203, "sched_getaffinity": 204, "getdents64": 217,
    "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "openat": 257, "mkdirat": 258, "newfstatat": 262,
    "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266, "readlinkat": 267, "faccessat": 269,
    "set_robust_list": 273, "utimensat": 280, "epoll_pwait": 281, "fallocate": 285, "eventfd2": 290,
    "epoll_create1": 291, "dup3": 292, "pipe2": 293, "preadv": 295, "pwritev": 296, "prlimit64": 302, "getcpu": 309,
    "renameat2": 316, "getrandom": 318, "copy_file_range": 326, "preadv2": 327, "pwritev2": 328, "statx": 332,
    "rseq": 334, "close_range": 436, "openat2": 437, "faccessat2": 439,
}  # fmt: skip

_CLONE, _IOCTL, _PRCTL, _TGKILL, _MMAP, _MPROTECT = 56, 16, 157, 234, 9, 10
_CLONE_THREAD = 0x00010000
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX
_PRCTLS = (15, 16, _PR_SET_NO_NEW_PRIVS, 0x53564D41)  # SET_NAME, GET_NAME, NO_NEW_PRIVS, SET_VMA (names only)
_PROT_EXEC = 4

_libc = ctypes.CDLL(None, use_errno=True)
_Instruction = tuple[int, int, int, int]


def supported() -> bool:
    """Whether the filter knows this machine's system-call numbers."""
    return platform.machine() == "x86_64" and os.uname().sysname == "Linux"


def _load(offset: int) -> _Instruction:
    return (0x20, 0, 0, offset)


def _equal(value: int, if_so: int, if_not: int) -> _Instruction:
    return (0x15, if_so, if_not, value)


def _any_bit(mask: int, if_so: int, if_not: int) -> _Instruction:
    return (0x45, if_so, if_not, mask)


def _answer(action: int) -> _Instruction:
    return (0x06, 0, 0, action)


def _argument(index: int) -> int:
    """Offset of the low half of an argument in `struct seccomp_data`."""
    return 16 + 8 * index


def _prologue() -> list[_Instruction]:
    """Kill foreign ABIs (32-bit and x32 calls have other numbers), then load the call's number."""
    return [
        _load(4), _equal(_ARCH_X86_64, 1, 0), _answer(_RET_KILL_PROCESS),
        _load(0), (0x35, 0, 1, _X32_BIT), _answer(_RET_KILL_PROCESS),
    ]  # fmt: skip


def _only_with(number: int, index: int, values: tuple[int, ...]) -> list[_Instruction]:
    """Allow call `number` when its argument `index` is one of `values`; otherwise ENOSYS."""
    tests = [_equal(value, len(values) - position, 0) for position, value in enumerate(values)]
    body = [_load(_argument(index)), *tests, _answer(_RET_ERRNO | errno.ENOSYS), _answer(_RET_ALLOW)]
    return [_equal(number, 0, len(body)), *body]


def _install(program: list[_Instruction]) -> None:
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    # With TSYNC a positive result is the id of a thread that could not be synchronised.
    result = _libc.syscall(_NR_SECCOMP, _SET_MODE_FILTER, _FLAG_TSYNC, header)
    if result != 0:
        raise OSError(ctypes.get_errno() if result < 0 else errno.EBUSY, "seccomp(SET_MODE_FILTER)")


def install() -> None:
    """Allow-list for all threads of this process.

    Errors: OSError when the kernel refuses the filter or the machine is not x86-64.
    """
    if not supported():
        raise OSError(errno.ENOTSUP, f"no seccomp filter for {platform.machine()}")
    program = _prologue()
    clone = [_load(_argument(0)), _any_bit(_CLONE_THREAD, 0, 1), _answer(_RET_ALLOW),
             _answer(_RET_ERRNO | errno.EPERM)]  # fmt: skip
    program += [_equal(_CLONE, 0, len(clone)), *clone]
    program += _only_with(_IOCTL, 1, _IOCTLS)
    program += _only_with(_PRCTL, 0, _PRCTLS)
    program += _only_with(_TGKILL, 0, (os.getpid(),))  # abort() signals its own thread
    for number in (*_ALLOWED.values(), _NR_SECCOMP):
        program += [_equal(number, 0, 1), _answer(_RET_ALLOW)]
    _install([*program, _answer(_RET_ERRNO | errno.ENOSYS)])


def forbid_new_code() -> None:
    """From here on no memory of this process can become executable and no filter can be added.

    Errors: OSError when the kernel refuses the filter.
    """
    protection = [_load(_argument(2)), _any_bit(_PROT_EXEC, 0, 1), _answer(_RET_ERRNO | errno.EPERM),
                  _answer(_RET_ALLOW)]  # fmt: skip
    program = _prologue()
    program += [_equal(_MMAP, 1, 0), _equal(_MPROTECT, 0, len(protection)), *protection]
    program += [_equal(_NR_SECCOMP, 0, 1), _answer(_RET_ERRNO | errno.EPERM)]
    _install([*program, _answer(_RET_ALLOW)])


def open_socket() -> int:
    """A plain socket(AF_UNIX, SOCK_STREAM, 0), for a self-test that wants it refused with OSError."""
    descriptor = int(_libc.socket(1, 1, 0))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "socket")
    return descriptor
