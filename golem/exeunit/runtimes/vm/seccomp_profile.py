"""The system calls that a container of the runtime `vm` may make: an allow-list in the form of Docker's `seccomp=` option.

Engines bring a profile of their own, but the one of Docker 20.10 lets a container without a network create AF_VSOCK
sockets (which no network namespace cuts off), io_uring rings, and calls of the i386 table, past every rule. This list
holds what ordinary programs, language runtimes and databases need and nothing that asks for a capability (but those over
a container's own files and users), makes a namespace, looks into other processes or loads a kernel module on demand.
Calls through another architecture's table kill the thread, because the profile names the native one alone.

Arguments are compared in 64 bits while the kernel reads an `int` as 32: so every condition here is one that allows.
(A rule that refuses "family 40" lets 2**32 + 40 pass.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product
from typing import Any

_FILES = """
    access faccessat faccessat2 open openat openat2 creat close close_range read write readv writev pread64 pwrite64
    preadv pwritev preadv2 pwritev2 lseek stat fstat lstat newfstatat statx statfs fstatfs getdents getdents64 getcwd
    chdir fchdir rename renameat renameat2 mkdir mkdirat rmdir link linkat symlink symlinkat unlink unlinkat readlink
    readlinkat chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat umask utime utimes utimensat futimesat
    truncate ftruncate fallocate fsync fdatasync sync syncfs sync_file_range fadvise64 readahead flock fcntl dup dup2
    dup3 pipe pipe2 ioctl sendfile copy_file_range splice tee cachestat
    getxattr lgetxattr fgetxattr getxattrat setxattr lsetxattr fsetxattr setxattrat listxattr llistxattr flistxattr
    listxattrat removexattr lremovexattr fremovexattr removexattrat
    inotify_add_watch inotify_rm_watch
"""
_MEMORY = """
    brk mmap munmap mremap mprotect madvise mincore msync mlock mlock2 munlock mlockall munlockall memfd_create
    memfd_secret remap_file_pages pkey_alloc pkey_free pkey_mprotect mseal map_shadow_stack
    shmget shmat shmdt shmctl semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
"""
_PROCESSES = """
    fork vfork execve execveat exit exit_group wait4 waitid kill tkill tgkill
    pidfd_open pidfd_send_signal getpid getppid gettid getpgid getpgrp setpgid getsid setsid
    getuid geteuid getgid getegid getresuid getresgid getgroups setuid setgid setreuid setregid setresuid setresgid
    setgroups setfsuid setfsgid capget capset prctl arch_prctl seccomp
    landlock_create_ruleset landlock_add_rule landlock_restrict_self
    getrlimit setrlimit prlimit64 getrusage getpriority setpriority ioprio_get ioprio_set
    sched_yield sched_getaffinity sched_setaffinity sched_getparam sched_setparam sched_getscheduler
    sched_setscheduler sched_getattr sched_setattr sched_get_priority_max sched_get_priority_min sched_rr_get_interval
    set_tid_address set_robust_list get_robust_list set_thread_area get_thread_area futex futex_waitv futex_wake
    futex_wait futex_requeue rseq membarrier getcpu restart_syscall uname sysinfo getrandom
"""
_SIGNALS_AND_TIME = """
    rt_sigaction rt_sigprocmask rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_tgsigqueueinfo rt_sigsuspend
    rt_sigreturn sigaltstack signalfd signalfd4 pause alarm getitimer setitimer nanosleep clock_nanosleep clock_gettime
    clock_getres gettimeofday time times timer_create timer_settime timer_gettime timer_getoverrun timer_delete
    timerfd_create timerfd_settime timerfd_gettime eventfd eventfd2 select pselect6 poll ppoll
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_wait epoll_wait_old epoll_pwait epoll_pwait2
"""
_SOCKETS = """
    bind listen accept accept4 connect shutdown getsockname getpeername getsockopt setsockopt
    sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg
"""

_INOTIFY = ["inotify_init", "inotify_init1"]
_NO_AIO = ["io_setup", "io_submit", "io_getevents", "io_pgetevents", "io_cancel", "io_destroy"]  # one table for the machine

_EPERM, _EMFILE, _ENOSYS, _EPROTONOSUPPORT = 1, 24, 38, 93
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_SOCK_TYPES = 1, 2, 3  # stream, datagram, raw (which asks for a capability; ping with NET_RAW)
_SOCK_TYPE_MASK = 0xF  # the rest of the argument are flags
_IP_PROTOCOLS = 0, 1, 6, 17, 58, 255  # default, ICMP, TCP, UDP, ICMPv6, raw: all others are modules loaded on demand
_NETLINK_ROUTE, _NETLINK_AUDIT = 0, 9  # the first is what getifaddrs() asks
_NEW_NAMESPACES = 0x7E020000  # the CLONE_NEW* flags of clone(2)
_S_IFMT = 0xF000
_NO_DEVICES = 0, 0x1000, 0x8000, 0xC000  # regular file (two ways), FIFO, socket
_PERSONALITIES = 0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF  # Linux, uname 2.6, 32-bit uname, no randomising, query


@cache
def profile(inotify: bool = True) -> str:
    """Return the profile as JSON, for the container option `seccomp=<this>`.

    Without `inotify` there are, as programs are told, no more instances of it.
    """
    names = " ".join((_FILES, _MEMORY, _PROCESSES, _SIGNALS_AND_TIME, _SOCKETS)).split()
    document = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _EPERM,
        "archMap": [
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": []},
            {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": []},
        ],
        "syscalls": [
            _allow(names),
            *_conditions(),
            _allow(_INOTIFY) if inotify else {"names": _INOTIFY, "action": "SCMP_ACT_ERRNO", "errnoRet": _EMFILE},
            {"names": _NO_AIO, "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS},
            # useradd and groupadd give up where audit is forbidden to them, and go on where the kernel has none.
            {
                "names": ["socket"],
                "action": "SCMP_ACT_ERRNO",
                "errnoRet": _EPROTONOSUPPORT,
                "args": [_equal(0, _AF_NETLINK), _equal(2, _NETLINK_AUDIT)],
            },
            # C libraries turn to clone(2), whose flags can be seen here, when they are told that there is no clone3.
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS},
        ],
    }
    return json.dumps(document, separators=(",", ":"))


def _conditions() -> Iterator[dict[str, Any]]:
    """Yield the rules for calls that are allowed with some arguments only."""
    yield _allow(["clone"], _masked(0, _NEW_NAMESPACES, 0))
    yield _allow(["socket"], _equal(0, _AF_UNIX))
    yield _allow(["socketpair"], _equal(0, _AF_UNIX))
    yield _allow(["socket"], _equal(0, _AF_NETLINK), _equal(2, _NETLINK_ROUTE))
    for family, kind, protocol in product((_AF_INET, _AF_INET6), _SOCK_TYPES, _IP_PROTOCOLS):
        yield _allow(["socket"], _equal(0, family), _masked(1, _SOCK_TYPE_MASK, kind), _equal(2, protocol))
    for kind in _NO_DEVICES:
        yield _allow(["mknod"], _masked(1, _S_IFMT, kind))
        yield _allow(["mknodat"], _masked(2, _S_IFMT, kind))
    for persona in _PERSONALITIES:
        yield _allow(["personality"], _equal(0, persona))


def _allow(names: Iterable[str], *arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a rule that allows calls if all of `arguments` hold."""
    return {"names": list(names), "action": "SCMP_ACT_ALLOW", "args": list(arguments)}


def _equal(index: int, value: int) -> dict[str, Any]:
    return {"index": index, "value": value, "valueTwo": 0, "op": "SCMP_CMP_EQ"}


def _masked(index: int, mask: int, value: int) -> dict[str, Any]:
    return {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}
