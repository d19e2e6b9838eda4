"""What a hostile guest tries, as a program for the guest's own Python: `python3 -c <this text> NAME ARGUMENTS`.

`ATTACKS` must all be refused; each says "done" if it got through, else the error it met. The other functions use up what
there is, or plant things. Runs inside containers; of this file's own world only `test_hostile_guests` imports it, for
the names.
"""

import contextlib
import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import sys
import time

# x86-64 numbers; aarch64 and all later calls share the generic ones
X86 = os.uname().machine == "x86_64"
NR = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "io_setup": (206, 0), "setns": (308, 268), "sethostname": (170, 161), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "reboot": (169, 142), "swapon": (167, 224), "init_module": (175, 105), "finit_module": (313, 273),
    "kexec_load": (246, 104), "ptrace": (101, 117), "process_vm_readv": (310, 270), "kcmp": (312, 272), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "fanotify_init": (300, 262), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "pidfd_getfd": (438, 438), "mount_setattr": (442, 442), "vmsplice": (278, 75),
    "process_madvise": (440, 440), "clone": (56, 220), "clone3": (435, 435), "socket": (41, 198), "mknodat": (259, 33),
    "personality": (135, 92), "capset": (126, 91), "statmount": (457, 457), "lsm_get_self_attr": (459, 459),
}  # fmt: skip
X86_ONLY = {"iopl": 172, "ioperm": 173, "modify_ldt": 154, "uselib": 134, "ustat": 136, "sysfs": 139}
libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """Make a system call; "done", or the name of the error."""
    number = X86_ONLY[name] if name in X86_ONLY else NR[name][0 if X86 else 1]
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result = libc.syscall(ctypes.c_long(number), *words)
    return "done" if result != -1 else errno.errorcode[ctypes.get_errno()]


def attempt(action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    except ValueError:  # what Python makes of an EPERM of setrlimit
        return "EPERM"
    return "done"


def write(path, text="1"):
    def action():
        with open(path, "w") as file:
            file.write(text)

    return lambda: attempt(action)


def read(path):
    def action():
        with open(path, "rb") as file:
            if not file.read(1):
                raise OSError(errno.ENODATA, "empty")

    return lambda: attempt(action)


def in_child(action):
    """Do it in a process of its own; the signal that ended it, if one did."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(writer, action().encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 100).decode()
    os.close(reader)
    status = os.waitpid(pid, 0)[1]
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else said


def machine_code(code):
    """Run bytes of x86-64 code."""
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    return "done"


def x32_call():
    return "done" if libc.syscall(ctypes.c_long(0x40000000 + 39)) != -1 else "refused"


def connect(family, address, kind=socket.SOCK_STREAM):
    def action():
        with socket.socket(family, kind) as one:
            one.settimeout(3)
            one.connect(address)

    return lambda: attempt(action)


def give_capabilities():
    with open("/root/program", "wb") as file:
        os.setxattr(file.fileno(), "security.capability", bytes.fromhex("0100000200002000000000000000000000000000"))


def kill_init():
    os.kill(1, signal.SIGKILL)
    os.kill(1, signal.SIGSTOP)
    time.sleep(0.05)
    return "alive" if os.path.exists("/proc/1/status") else "done"


def new_process(flags):
    """Raw clone into a namespace; the child, if there is one, ends at once."""
    result = libc.syscall(ctypes.c_long(NR["clone"][0 if X86 else 1]), *map(ctypes.c_long, (flags | 17, 0, 0, 0, 0)))
    if result == 0:
        os._exit(0)
    return "done" if result != -1 else errno.errorcode[ctypes.get_errno()]


def visible_processes():
    """More of them than a container of ours has are those of the machine."""
    return "done" if len([name for name in os.listdir("/proc") if name.isdigit()]) > 20 else "few"


def interfaces():
    return "done" if {name for _, name in socket.if_nameindex()} != {"lo"} else "lo"


def other_sockets():
    families = [family for family in range(64) if family not in (1, 2, 10, 16)]
    through = [family for family in families for high in (0, 1 << 32) if call("socket", family + high, 2, 0) == "done"]
    return "done" if through else "EPERM"


NAMESPACES = {
    "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x08000000, "uts": 0x04000000,
    "cgroup": 0x02000000, "mount": 0x00020000,
}  # fmt: skip
CALLS = {
    "mount": (b"none\0", b"/tmp\0", b"tmpfs\0", 0, 0), "umount2": (b"/proc\0", 2), "pivot_root": (b"/tmp\0", b"/tmp\0"),
    "chroot": (b"/tmp\0",), "sethostname": (b"other\0", 5), "settimeofday": (bytes(16), 0), "clock_settime": (0, bytes(16)),
    "reboot": (0xFEE1DEAD - (1 << 32), 672274793, 0, 0), "swapon": (b"/tmp\0", 0), "init_module": (b"\0", 0, b"\0"),
    "finit_module": (0, b"\0", 0), "kexec_load": (0, 0, 0, 0), "ptrace": (0, 0, 0, 0),
    "process_vm_readv": (1, 0, 0, 0, 0, 0), "kcmp": (1, 1, 0, 0, 0), "bpf": (0, bytes(64), 64),
    "perf_event_open": (bytes(128), 0, -1, -1, 0), "userfaultfd": (0,), "keyctl": (0, -3, 1),
    "add_key": (b"user\0", b"a\0", b"b\0", 1, -3), "request_key": (b"user\0", b"a\0", 0, -3),
    "io_uring_setup": (1, bytes(128)), "io_uring_enter": (0, 0, 0, 0, 0), "io_uring_register": (0, 0, 0, 0),
    "acct": (b"/tmp/a\0",), "quotactl": (0, 0, 0, 0), "syslog": (3, bytes(100), 100), "open_by_handle_at": (-100, bytes(64), 0),
    "name_to_handle_at": (-100, b"/\0", bytes(256), bytes(8), 0), "fanotify_init": (0, 0), "open_tree": (-100, b"/\0", 1),
    "move_mount": (-100, b"/tmp\0", -100, b"/mnt\0", 0), "fsopen": (b"tmpfs\0", 0), "pidfd_getfd": (0, 0, 0),
    "mount_setattr": (-100, b"/\0", 0, bytes(32), 32), "vmsplice": (0, 0, 0, 0), "process_madvise": (0, 0, 0, 0, 0),
    "io_setup": (1, bytes(8)), "clone3": (bytes(88), 88), "statmount": (bytes(32), bytes(512), 512, 0),
}  # fmt: skip
X86_CALLS = {"iopl": (3,), "ioperm": (0, 1, 1), "modify_ldt": (0, bytes(64), 64), "uselib": (b"/tmp\0",)}

OWN = {  # what root may do to its own files and users, where they are no other's
    "chown away": lambda: attempt(os.chown, "/etc/passwd", 1, 1),
    "become another user": lambda: in_child(lambda: attempt(os.setuid, 1000)),
}
ATTACKS = {
    **{f"call {name}": (lambda name=name, words=words: call(name, *words)) for name, words in CALLS.items()},
    **{f"unshare {name}": (lambda flag=flag: call("unshare", flag)) for name, flag in NAMESPACES.items()},
    **{f"clone {name}": (lambda flag=flag: new_process(flag)) for name, flag in NAMESPACES.items()},
    "setns": lambda: attempt(lambda: call_or_raise("setns", os.open("/proc/1/ns/net", os.O_RDONLY), 0)),
    "personality": lambda: call("personality", 0x0400000),
    "write /proc/sys/kernel/panic": write("/proc/sys/kernel/panic"),
    "write /proc/sys/kernel/core_pattern": write("/proc/sys/kernel/core_pattern", "|/bin/sh"),
    "write /proc/sys/net/ipv4/ip_forward": write("/proc/sys/net/ipv4/ip_forward"),
    "write /proc/sysrq-trigger": write("/proc/sysrq-trigger", "h"),
    "write /proc/irq": write("/proc/irq/default_smp_affinity"),
    "write /sys/kernel/uevent_helper": write("/sys/kernel/uevent_helper", "/bin/sh"),
    "write /sys/kernel/mm": write("/sys/kernel/mm/transparent_hugepage/enabled", "never"),
    "write /sys/fs/cgroup": lambda: attempt(os.mkdir, "/sys/fs/cgroup/memory/mine"),
    "raise the memory limit": write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "-1"),
    "raise the process limit": write("/sys/fs/cgroup/pids/pids.max", "max"),
    "raise the process limit, v2": lambda: attempt(lambda: os.write(os.open("/sys/fs/cgroup/pids.max", os.O_WRONLY), b"max")),
    "allow all devices": write("/sys/fs/cgroup/devices/devices.allow", "a"),
    "raise oom protection": write("/proc/self/oom_score_adj", "-1000"),
    "raise priority": lambda: attempt(os.setpriority, os.PRIO_PROCESS, 0, -10),
    "raise limits": lambda: attempt(resource.setrlimit, resource.RLIMIT_NOFILE, (1 << 20, 1 << 20)),
    "real-time scheduling": lambda: attempt(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1)),
    "read /proc/kcore": read("/proc/kcore"),
    "read /proc/keys": read("/proc/keys"),
    "read /proc/timer_list": read("/proc/timer_list"),
    "read /dev/kmsg": read("/dev/kmsg"),
    "open /dev/mem": read("/dev/mem"),
    "open /dev/kvm": read("/dev/kvm"),
    "open /dev/fuse": read("/dev/fuse"),
    "open /dev/net/tun": read("/dev/net/tun"),
    "open /dev/loop-control": read("/dev/loop-control"),
    "open /dev/loop0": read("/dev/loop0"),
    "mknod character device": lambda: attempt(os.mknod, "/tmp/null", 0o020666, os.makedev(1, 3)),
    "mknod block device": lambda: attempt(os.mknod, "/tmp/disk", 0o060666, os.makedev(254, 0)),
    "mknod whiteout": lambda: attempt(os.mknod, "/tmp/whiteout", 0o020666, 0),
    "chown our program": lambda: attempt(os.chown, "/.golem/init", 1, 1),
    "chmod our program": lambda: attempt(os.chmod, "/.golem/init", 0o4777),
    "write our program": write("/.golem/init"),
    "give a file capabilities": lambda: attempt(give_capabilities),
    "more capabilities": lambda: attempt(lambda: call_or_raise("capset", b"\x22\x05\x08\x20" + bytes(4), b"\xff" * 24)),
    "the Engine's socket": connect(socket.AF_UNIX, "/var/run/docker.sock"),
    "processes of the machine": visible_processes,
    "kill init": kill_init,
    "interfaces": interfaces,
    "connect out": connect(socket.AF_INET, ("192.0.2.1", 80)),
    "connect out IPv6": connect(socket.AF_INET6, ("2001:db8::1", 80)),
    "send out": connect(socket.AF_INET, ("192.0.2.1", 53), socket.SOCK_DGRAM),
    "connect to the machine": lambda: connect(socket.AF_INET, ("127.0.0.1", int(sys.argv[2])))(),
    "abstract socket of the machine": lambda: connect(socket.AF_UNIX, "\0" + sys.argv[3])(),
    "socket vsock": lambda: call("socket", 40, 1, 0),
    "socket vsock, high bits": lambda: call("socket", 40 | 1 << 32, 1, 0),
    "socket packet": lambda: call("socket", 17, 3, 768),
    "socket raw": lambda: call("socket", 2, 3, 1),
    "socket alg": lambda: call("socket", 38, 5, 0),
    "socket xdp": lambda: call("socket", 44, 3, 0),
    "socket sctp": lambda: call("socket", 2, 1, 132),
    "socket audit": lambda: attempt(socket.socket, 16, socket.SOCK_RAW, 9),
    "socket audit, high bits": lambda: call("socket", 16 + (1 << 32), socket.SOCK_RAW, 9),
    "socket netfilter": lambda: call("socket", 16, 3, 12),
    "socket of any other family": other_sockets,
}
if X86:
    ATTACKS |= {
        **{f"call {name}": (lambda name=name, words=words: call(name, *words)) for name, words in X86_CALLS.items()},
        # mov eax, 20 (getpid of i386); int 0x80; ret
        "i386 call": lambda: in_child(lambda: machine_code(b"\xb8\x14\0\0\0\xcd\x80\xc3")),
        "i386 socket": lambda: in_child(lambda: machine_code(b"\xb8\x67\x01\0\0\xbb\x28\0\0\0\xb9\x01\0\0\0\xcd\x80\xc3")),
        "x32 call": lambda: in_child(x32_call),
    }


def call_or_raise(name, *arguments):
    said = call(name, *arguments)
    if said != "done":
        raise OSError(getattr(errno, said), said)


def attacks():
    """Try everything; what came of it by name, and what the process says of itself."""
    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    with open("/proc/self/uid_map") as file:
        users = file.read().split()
    outcome = {name: attack() for name, attack in ATTACKS.items()}
    own = {name: action() for name, action in OWN.items()}
    print(json.dumps({"status": status, "uid_map": users, "attacks": outcome, "own": own}))


def fork_bomb():
    """Fork until nothing more comes, and leave them all behind."""
    count = 0
    try:
        while count < 20_000:
            if os.fork() == 0:
                time.sleep(1000)
                os._exit(0)
            count += 1
    except OSError as error:
        print(count, errno.errorcode[error.errno], flush=True)


def memory_bomb():
    kept = []
    while True:
        kept.append(bytearray(b"x") * (8 << 20))


def fill(*folders):
    """Write until each is full; its name, MiB that went in, and the error."""
    for folder in folders:
        written = 0
        try:
            with open(folder + "/fill", "wb", buffering=0) as file:
                while written < 4096:
                    written += file.write(bytes(1 << 20)) / (1 << 20)
        except OSError as error:
            print(folder, int(written), errno.errorcode[error.errno], flush=True)


def writable_mounts():
    """Fill every mount that takes bytes, whatever it is; where each lies, what went in and how it ended."""
    found = []
    with open("/proc/self/mountinfo") as file:
        for line in file:
            head, _, tail = line.partition(" - ")
            fields, kind = head.split(), tail.split()[0]
            if "ro" not in fields[5].split(",") and "ro" not in tail.split()[2].split(","):
                found.append((fields[4], kind, fields[2]))
    said = []
    for point, kind, device in found:
        regular = os.path.isfile(point)
        place = point if regular else point.rstrip("/") + "/fill"
        written, error = 0, None
        try:
            with open(place, "ab" if regular else "wb", buffering=0) as file:
                while written < 512 << 20:
                    written += file.write(bytes(1 << 20))
        except OSError as problem:
            error = errno.errorcode[problem.errno]
        try:
            os.truncate(point, 0) if regular else os.unlink(place)
        except OSError:
            pass
        said.append((point, kind, device, written, error))
    print(json.dumps(said))


def queue(name):
    """Make a message queue that lives as long as this process."""
    found = libc.mq_open(name, os.O_CREAT | os.O_RDWR, 0o600, None)
    code = ctypes.get_errno()
    libc.mq_unlink(name)
    ctypes.set_errno(code)
    return found


TABLES = {  # ways to take one more of what the whole machine shares
    "inotify": lambda: libc.inotify_init1(0),
    "ptys": lambda: os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY),
    "aio": lambda: libc.syscall(206 if X86 else 0, 64, ctypes.byref(ctypes.c_ulong(0))),
    "timers": lambda: libc.syscall(222 if X86 else 107, 1, None, ctypes.byref(ctypes.c_int(0))),
    "queues": lambda: queue(f"/golem-{os.getpid()}-{time.monotonic_ns()}".encode()),
}


def take(name, most):
    """Take from a table until it gives no more; how many there were, and how it ended."""
    for count in range(most):
        try:
            if TABLES[name]() < 0:
                return [count, errno.errorcode[ctypes.get_errno()]]
        except OSError as error:
            return [count, errno.errorcode[error.errno]]
    return [most, None]


def greedy():
    """Take all there is of every table, say how much that was, and keep it."""
    found = {name: take(name, 150_000) for name in TABLES}
    print(json.dumps(found), flush=True)
    time.sleep(1000)


def greedy_by_users():
    """Take inotify instances under one user after another; how many there were, of how many users."""
    found, users = 0, 0
    for uid in range(1, 65):
        try:
            os.seteuid(uid)
        except OSError:
            break
        found, users = found + take("inotify", 1000)[0], users + 1
        os.seteuid(0)
    print(json.dumps([found, users]), flush=True)
    time.sleep(1000)


def modest():
    """Take a few of each, as many a program does; how many there were."""
    print(json.dumps({name: take(name, 1 if name == "queues" else 4) for name in TABLES}))


def threads():
    """Make threads until nothing more comes; how many there were."""
    import threading

    threading.stack_size(32 << 10)
    count, over = 0, threading.Event()
    try:
        while count < 100_000:
            threading.Thread(target=over.wait, daemon=True).start()
            count += 1
    except (RuntimeError, MemoryError):
        print(count, flush=True)
    os._exit(0)


def descriptors():
    """Open files in many processes, as many as there may be; how many there were."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    pids, readers = [], []
    for _ in range(12):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            count = 0
            try:
                while count <= most:
                    os.open("/dev/null", os.O_RDONLY)
                    count += 1
            except OSError:
                pass
            os.write(writer, str(count).encode())
            time.sleep(1000)
        os.close(writer)
        pids.append(pid)
        readers.append(reader)
    counts = [int(os.read(reader, 100) or 0) for reader in readers]  # none of who was killed for want of memory
    print(json.dumps([most, *counts]), flush=True)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _fill_pipes():
    while True:
        writer = os.pipe()[1]
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                yield os.write(writer, bytes(4096))


def _fill_streams():
    server = socket.create_server(("127.0.0.1", 0), backlog=1024)
    kept = []
    while True:
        one = socket.create_connection(server.getsockname(), timeout=1)
        kept += [one, server.accept()[0]]
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                yield one.send(bytes(65536))


def _fill_datagrams(family=socket.AF_INET, address=("127.0.0.1", 0)):
    kept = []
    while True:
        receiver, sender = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
        receiver.bind(address)
        kept.append(receiver)
        sender.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                yield sender.sendto(bytes(4096), receiver.getsockname())


def _fill_local():
    return _fill_datagrams(socket.AF_UNIX, "")


BUFFERS = {"pipes": _fill_pipes, "streams": _fill_streams, "datagrams": _fill_datagrams, "local": _fill_local}


def buffers(seconds):
    """Put all that the kernel takes into each kind of buffer, and keep it; MiB by kind, also of who was killed for that."""
    readers, until = {}, time.monotonic() + float(seconds)
    for name, fill_one in BUFFERS.items():
        readers[name], writer = os.pipe()
        os.set_blocking(readers[name], False)
        if os.fork() == 0:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")  # these go first, not who tells of them
            total = 0
            with contextlib.suppress(OSError):
                for size in fill_one():
                    if (total + size) >> 20 > total >> 20:
                        os.write(writer, b".")
                    total += size
                    if time.monotonic() > until:
                        break
            time.sleep(1000)
        os.close(writer)
    time.sleep(max(0, until + 1 - time.monotonic()))
    found = {}
    for name, reader in readers.items():
        try:
            found[name] = len(os.read(reader, 65536))
        except BlockingIOError:
            found[name] = 0
    print(json.dumps(found), flush=True)
    time.sleep(1000)


def spew(mib):
    """Write so much to both sides."""
    for _ in range(int(mib)):
        os.write(1, bytes(1 << 20))
        os.write(2, bytes(1 << 20))


def fill_hidden(folder):
    """Fill with a file that has no name any more."""
    with open(folder + "/hidden", "wb", buffering=0) as file:
        os.unlink(folder + "/hidden")
        written = 0
        try:
            while written < 4096:
                written += file.write(bytes(1 << 20)) / (1 << 20)
        except OSError as error:
            print(int(written), errno.errorcode[error.errno], flush=True)


def many_files(folder):
    count = 0
    try:
        while count < 10_000_000:
            os.close(os.open(f"{folder}/{count}", os.O_CREAT | os.O_WRONLY))
            count += 1
    except OSError as error:
        print(count, errno.errorcode[error.errno], flush=True)


def spin(processes, seconds):
    """Burn CPU in several processes for some seconds of the clock."""
    until = time.monotonic() + float(seconds)
    pids = []
    for _ in range(int(processes)):
        pid = os.fork()
        if pid == 0:
            while time.monotonic() < until:
                pass
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)


def survivor(path, seconds="1000"):
    """Leave a process in a session of its own that writes to a file for ever, ignores what can be ignored, and wait."""
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        for number in range(3):
            os.close(number)
        while True:
            with open(path, "w") as file:
                file.write(str(time.monotonic_ns()))
            time.sleep(0.02)
    print("planted", flush=True)
    time.sleep(float(seconds))


def plant(folder):
    """Put into a volume what may lead a transfer astray."""
    os.symlink("/etc/passwd", folder + "/link")
    os.symlink("/", folder + "/slash")
    os.symlink("..", folder + "/up")
    os.symlink("/proc/self/root/etc/passwd", folder + "/magic")
    os.mkfifo(folder + "/fifo")
    os.mkdir(folder + "/folder")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(folder + "/socket")
    with open(folder + "/plain", "w") as file:
        file.write("plain")
    os.mkdir(folder + "/inner")
    os.symlink("/tmp", folder + "/inner/out")
    with open(folder + "/sparse", "wb") as file:
        file.truncate(1 << 40)


def ordinary():
    """No attack at all: what harmless programs do all the time."""
    import asyncio
    import multiprocessing
    import subprocess
    import tempfile
    import threading

    async def exchange():
        async def serve(reader, writer):
            writer.write(await reader.readline())
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"over TCP\n")
        return (await reader.readline()).decode().strip()

    said = []
    threads = [threading.Thread(target=said.append, args=("thread",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said.append(subprocess.run(["/bin/echo", "subprocess"], capture_output=True, text=True).stdout.strip())
    with multiprocessing.Pool(2) as pool:
        said.append(str(sum(pool.map(abs, range(-10, 0)))))
    said.append(asyncio.run(exchange()))
    signal.signal(signal.SIGALRM, lambda number, frame: said.append("alarm"))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(0.05)
    with tempfile.TemporaryDirectory() as folder:
        os.mkfifo(folder + "/fifo")
        os.symlink("fifo", folder + "/link")
        os.chmod(folder, 0o700)
        os.rename(folder + "/link", folder + "/other")
    os.close(os.memfd_create("x"))
    os.getrandom(8)
    os.sched_getaffinity(0)
    os.nice(1)
    said.append("".join(name for _, name in socket.if_nameindex()))
    print(" ".join(said))


if __name__ == "__main__":
    globals()[sys.argv[1]](*([] if sys.argv[1] == "attacks" else sys.argv[2:]))
