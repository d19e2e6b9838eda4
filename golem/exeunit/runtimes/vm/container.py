"""What a container of the runtime `vm` is made of, in the Engine's own words, and what of a requestor's wishes is refused.

Whoever holds the image may be hostile: no capabilities beyond its own ids, no new privileges, no network, our own
system-call filter, and hard limits of memory, CPU and processes. The image's user, directory and environment stand; its
programs do not start by themselves, and its health check never does.
Neighbours: `golem.exeunit.runtimes.vm.runtime` and `self_test` make containers of this; `seccomp_profile`, `init_program`.
"""

from __future__ import annotations

import ipaddress
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from golem.exeunit.runtime import Limits, RuntimeFault
from golem.exeunit.runtimes.vm.admin import EngineFacts
from golem.exeunit.runtimes.vm.init_program import init_program, relay_program
from golem.exeunit.runtimes.vm.kernel_tables import has_inotify
from golem.exeunit.runtimes.vm.leftovers import SUPERVISOR_LABEL
from golem.exeunit.runtimes.vm.long_arguments import FILES_PATH, RELAY_PATH
from golem.exeunit.runtimes.vm.seccomp_profile import profile
from golem.exeunit.supervisor import own_mark

ACTIVITY_LABEL = "golem.activity"
INIT_PATH = "/.golem/init"
# What root has over the files and users of a container, where these are no other's on this machine (ids are remapped):
# for tar, chown, su, package managers and servers that change to a user of their own. Each with its number in Linux.
CAPABILITIES = {"CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "FSETID": 4, "SETGID": 6, "SETUID": 7}
PROCESSES = 512
OOM_SCORE = 500  # a machine that is short of memory takes guests first, not the node
MIN_MEM_BYTES = 6 << 20  # what the Engine asks for
OPEN_FILES = 16_384
PENDING_SIGNALS = 4096  # and timers; those of all guests are counted together with root's
QUEUE_BYTES = 96 << 10  # of POSIX message queues: one as large as they are by default
SHARED_MEMORY_BYTES = 64 << 20  # of /dev/shm, counted as the activity's memory
MAX_HOSTS = 256
NAME_FILES = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf")
_HOSTS = (
    "127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", "fe00::0\tip6-localnet",
    "ff00::0\tip6-mcastprefix", "ff02::1\tip6-allnodes", "ff02::2\tip6-allrouters",
)  # fmt: skip
_INIT_FILE, _RELAY_FILE, _PROFILE_FILE, ARGUMENTS = "init", "run", "seccomp.json", "arguments"
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*")


@dataclass(frozen=True)
class Plan:
    """A container to be. `folder`: as `lay_out` left it. `mounts`: name of the Engine's volume by path inside.

    `own_files`: files of ours that the guest may write, by path inside (`name_files`): instead of the Engine's own, which
    lie outside every limit.
    """

    image: str
    activity_id: str
    folder: Path
    limits: Limits
    env: Sequence[str] = ()
    hostname: str | None = None
    hosts: Mapping[str, str] = field(default_factory=dict)
    mounts: Mapping[str, str] = field(default_factory=dict)
    own_files: Mapping[str, Path] = field(default_factory=dict)


def host_name(wished: str | None, activity_id: str) -> str:
    """Return a container's host name. Errors: RuntimeFault for a wish that is none."""
    return _host_name(wished) if wished is not None else activity_id[:12] or "golem"


def name_files(name: str, hosts: Mapping[str, str]) -> dict[str, bytes]:
    """Return the files by which programs find names, by path inside. Errors: RuntimeFault, as `container_config`."""
    lines = [*_HOSTS, *(f"{address}\t{other}" for other, address in _host_entries(hosts)), f"127.0.1.1\t{name}"]
    contents = "".join(f"{line}\n" for line in lines), f"{name}\n", "# no network\n"
    return dict(zip(NAME_FILES, map(str.encode, contents), strict=True))


def lay_out(folder: Path, facts: EngineFacts) -> None:
    """Put the files that a container is started with into a folder, where they stay as long as it lives. Raises OSError."""
    for name, program in ((_INIT_FILE, init_program()), (_RELAY_FILE, relay_program())):
        (folder / name).write_bytes(program)
        (folder / name).chmod(0o755)
    (folder / ARGUMENTS).mkdir()
    (folder / ARGUMENTS).chmod(0o711)
    if facts.podman:
        (folder / _PROFILE_FILE).write_text(profile(has_inotify(facts.root_id)))


def clear_away(folder: Path) -> None:
    """Remove what `lay_out` made. Raises OSError."""
    for name in (_INIT_FILE, _RELAY_FILE, _PROFILE_FILE):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / ARGUMENTS, ignore_errors=True)


def capability_mask(root_id: int) -> int:
    """Return the capabilities of a container as /proc says them. `root_id`: of its root; 0 where ids are not remapped."""
    return sum(1 << number for number in CAPABILITIES.values()) if root_id else 0


def labels(activity_id: str) -> dict[str, str]:
    """Return what says whose a container or a volume is; `leftovers` removes those of the dead."""
    return {ACTIVITY_LABEL: activity_id, SUPERVISOR_LABEL: own_mark()}


def container_config(plan: Plan, facts: EngineFacts) -> dict[str, Any]:
    """Return the body of POST /containers/create. Errors: RuntimeFault for names and addresses that are none."""
    config: dict[str, Any] = {
        "Image": plan.image,
        "Entrypoint": [INIT_PATH],
        "Cmd": [],
        "Env": list(plan.env),
        "Labels": labels(plan.activity_id),
        "Healthcheck": {"Test": ["NONE"]},
        "StopSignal": "SIGTERM",
        "Hostname": host_name(plan.hostname, plan.activity_id),
        "HostConfig": _host_config(plan, facts),
    }
    return config


def _host_config(plan: Plan, facts: EngineFacts) -> dict[str, Any]:
    memory = max(MIN_MEM_BYTES, plan.limits.mem_bytes)
    ours = (_INIT_FILE, INIT_PATH), (_RELAY_FILE, RELAY_PATH), (ARGUMENTS, FILES_PATH)
    mounts: list[dict[str, Any]] = [
        {"Type": "bind", "Source": str(plan.folder / name), "Target": target, "ReadOnly": True} for name, target in ours
    ]
    mounts += [{"Type": "volume", "Source": name, "Target": path} for path, name in plan.mounts.items()]
    mounts += [{"Type": "bind", "Source": str(file), "Target": path} for path, file in plan.own_files.items()]
    host = {
        "NetworkMode": "none",
        "IpcMode": "private",
        "Memory": memory,
        "MemorySwap": memory,
        "NanoCpus": min(plan.limits.cpu_threads, facts.cpus) * 1_000_000_000,
        "PidsLimit": PROCESSES,
        "OomScoreAdj": OOM_SCORE,
        "CapDrop": ["ALL"],
        "CapAdd": [name for name in CAPABILITIES if facts.root_id],
        "Privileged": False,
        "SecurityOpt": ["no-new-privileges", f"seccomp={profile(has_inotify(facts.root_id))}"],
        "Ulimits": [
            {"Name": "core", "Soft": 0, "Hard": 0},
            {"Name": "nofile", "Soft": OPEN_FILES, "Hard": OPEN_FILES},
            {"Name": "sigpending", "Soft": PENDING_SIGNALS, "Hard": PENDING_SIGNALS},
            {"Name": "msgqueue", "Soft": QUEUE_BYTES, "Hard": QUEUE_BYTES},
        ],
        "ShmSize": min(SHARED_MEMORY_BYTES, memory),
        "ExtraHosts": [f"{name}:{address}" for name, address in _host_entries(plan.hosts)],
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {"Type": "none", "Config": {}},
        "Mounts": mounts,
    }
    if facts.podman:
        host["LogConfig"] = {}  # it has no driver called none
        host["SecurityOpt"] = ["no-new-privileges", f"seccomp={plan.folder / _PROFILE_FILE}"]  # it wants a file
    return host


def _host_name(name: str) -> str:
    if len(name) > 63 or _HOST_NAME.fullmatch(name) is None:
        raise RuntimeFault(f"not a host name: {name[:100]!r}")
    return name


def _host_entries(hosts: Mapping[str, str]) -> list[tuple[str, str]]:
    if len(hosts) > MAX_HOSTS:
        raise RuntimeFault(f"too many hosts: {len(hosts)}, at most {MAX_HOSTS}")
    found = []
    for name, address in hosts.items():
        if len(name) > 253 or _HOST_NAME.fullmatch(name) is None:
            raise RuntimeFault(f"not a host name: {name[:100]!r}")
        try:
            found.append((name, str(ipaddress.ip_address(address))))
        except ValueError:
            raise RuntimeFault(f"not an address: {address[:100]!r}") from None
    return found
