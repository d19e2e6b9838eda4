"""What of this machine is for sale: `hardware.json`, `{"active":"default","profiles":{"default":{"cpu_threads":7,
"mem_gib":11.2,"storage_gib":80.0}}}`. The default leaves a thread, 30 % of the memory and 20 % of the free disk alone.
Of the storage no more is offered than the disk can give at the time (`storage`); the file is the upper bound.
"""

from __future__ import annotations

import logging
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from golem.provider.settings import SettingsError, check_keys, read_json, threads, write_json
from protocol.property_names import CPU_ARCHITECTURE, CPU_BRAND, CPU_CAPABILITIES, CPU_CORES, CPU_MODEL, CPU_VENDOR

log = logging.getLogger("golem.provider")

HARDWARE = "hardware.json"
GIB = float(1 << 30)
MEMORY_SHARE, DISK_SHARE = 0.7, 0.8
MIN_MEMORY_GIB, MIN_STORAGE_GIB = 0.0625, 0.0625
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class Profile:
    """Threads, memory and storage."""

    cpu_threads: int
    mem_gib: float
    storage_gib: float

    def at_most(self, cpu_threads: float, mem_gib: float, storage_gib: float) -> Profile:
        """Return the part of this profile that stays below these."""
        threads_left = int(min(self.cpu_threads, cpu_threads))
        return Profile(threads_left, min(self.mem_gib, mem_gib), min(self.storage_gib, storage_gib))

    def share(self, agreements: int) -> Profile:
        """Return what each of so many agreements may use, so that together they never pass the profile.

        Memory and storage are divided. Threads are too, down to one: from there on agreements share their time.
        """
        n = max(1, agreements)
        return Profile(max(1, self.cpu_threads // n), _floor(self.mem_gib / n), _floor(self.storage_gib / n))


def machine_profile(data_dir: Path) -> Profile:
    """Return what this process could use of the machine at most."""
    memory = psutil.virtual_memory().total
    try:
        memory = min(memory, int(_CGROUP_MEMORY.read_text()))  # "max" where there is no limit
    except (OSError, ValueError):
        pass
    folder = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    return Profile(threads(), _floor(memory / GIB), _floor(shutil.disk_usage(folder).free / GIB))


def default_profile(machine: Profile) -> Profile:
    return Profile(
        max(1, machine.cpu_threads - 1), _floor(machine.mem_gib * MEMORY_SHARE), _floor(machine.storage_gib * DISK_SHARE)
    )


def load_profile(data_dir: Path) -> Profile:
    """Return the active profile, writing the default one at the first time. Raises `SettingsError`."""
    path = data_dir / HARDWARE
    raw = read_json(path, "hardware file")
    machine = machine_profile(data_dir)
    if raw is None:
        found = default_profile(machine)
        if found.storage_gib < MIN_STORAGE_GIB:  # a profile of next to nothing would stay when there is room again
            text = f"{machine.storage_gib:g} GiB of disk are free, too little to sell: make room, or write {path} yourself"
            raise SettingsError(text)
        one = {"cpu_threads": found.cpu_threads, "mem_gib": found.mem_gib, "storage_gib": found.storage_gib}
        write_json(path, {"active": "default", "profiles": {"default": one}})
        return found
    check_keys(raw, ("active", "profiles"), f"hardware file {path}")
    try:
        one = raw["profiles"][raw["active"]]
        check_keys(one, ("cpu_threads", "mem_gib", "storage_gib"), f"hardware file {path}, profile {raw['active']}")
        numbers = [one[name] for name in ("cpu_threads", "mem_gib", "storage_gib")]
        if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers) or numbers[0] % 1:
            raise TypeError("threads are a whole number, memory and storage numbers")
        wanted = Profile(int(numbers[0]), float(numbers[1]), float(numbers[2]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SettingsError(f"the hardware file {path} is not in order: {error!r}") from None
    if wanted.cpu_threads < 1 or not wanted.mem_gib >= MIN_MEMORY_GIB or not wanted.storage_gib >= MIN_STORAGE_GIB:
        raise SettingsError(f"the hardware file {path}: at least 1 thread, {MIN_MEMORY_GIB} GiB memory and storage")
    if wanted.cpu_threads > machine.cpu_threads or wanted.mem_gib > machine.mem_gib:
        most = f"{machine.cpu_threads} threads, {machine.mem_gib:g} GiB"
        log.warning("%s promises more than this machine has (%s); it is cut", path, most)
    return Profile(min(wanted.cpu_threads, machine.cpu_threads), min(wanted.mem_gib, machine.mem_gib), wanted.storage_gib)


def cpu_properties() -> dict[str, Any]:
    """Return what an offer says of the processor."""
    found: dict[str, Any] = {
        CPU_ARCHITECTURE: platform.machine() or "unknown",
        CPU_CORES: psutil.cpu_count(logical=False) or threads(),
    }
    info = _cpu_info()
    if "vendor_id" in info:
        found[CPU_VENDOR] = info["vendor_id"]
    if "model name" in info:
        found[CPU_BRAND] = info["model name"]
    if {"stepping", "cpu family", "model"} <= info.keys():
        found[CPU_MODEL] = f"Stepping {info['stepping']} Family {info['cpu family']} Model {info['model']}"
    if flags := info.get("flags") or info.get("Features"):
        found[CPU_CAPABILITIES] = sorted(flags.lower().split())
    return found


def _cpu_info() -> dict[str, str]:
    """Return the first processor's block of /proc/cpuinfo; empty where there is none."""
    try:
        block = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _floor(value: float) -> float:
    """Round down to thousandths, so that sums stay below the whole; always a float."""
    return int(value * 1000) / 1000.0
