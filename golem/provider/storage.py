"""How much storage is for sale now: what the disk can really give, at most what the hardware profile promises.

A disk fills up, by another agent's activities or by anything else, and what an offer promises is set aside in full at
deploy: so an offer of more than there is would be hired, fail, and be hired again. The agent looks at the disk at its
start, every few seconds, and soon after an exe-unit ended badly. What its own live activities take up counts as there:
the agreements they belong to are counted against the whole (`Capacity`).
Neighbours: `offering` (which makes offers of it), `hardware` (the profile), `golem.exeunit.storage` (deploys).
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from golem.exeunit.storage import SPARE_BYTES
from golem.exeunit.transfer.cached import MIN_FREE_BYTES, evictable_bytes
from golem.exeunit.usage import measure_tree
from golem.provider.hardware import GIB, MIN_STORAGE_GIB
from golem.provider.units import find_unit

log = logging.getLogger("golem.provider")

MARGIN_BYTES = SPARE_BYTES + MIN_FREE_BYTES  # what a deploy and the cache of images leave free
HEADROOM = 0.9  # of the room, where that is less than the profile: so the next few files do not change the offers again
GROWTH = 1.1  # offers grow by this factor at least, unless they grow to the whole profile
LOOK_DISK_S = 10.0
MOST_WORK = 0.05  # of the time, for looking
CLEANED_S = 30.0  # how long a dead activity's storage counts: it is being removed
MAX_ENTRIES = 50_000  # of working directories, for one look


def storage_for_sale(profile_gib: float, room_gib: float, offered_gib: float | None = None) -> float:
    """Return how much to offer (GiB), 0 for nothing, where the disk has room for `room_gib`. `offered_gib`: so far.

    It shrinks as soon as there is less room than offered, to somewhat below the room; it grows when that is worth it.
    """
    best = profile_gib if room_gib * HEADROOM >= profile_gib else max(0.0, int(room_gib * HEADROOM * 1000) / 1000)
    best = best if best >= MIN_STORAGE_GIB else 0.0
    if offered_gib is None:
        return profile_gib if room_gib >= profile_gib >= MIN_STORAGE_GIB else best
    if room_gib < offered_gib:
        return best
    worth_it = best == profile_gib or best >= max(offered_gib, MIN_STORAGE_GIB) * GROWTH
    return best if best > offered_gib and worth_it else offered_gib


class Disk:
    """The disk below the working directories of activities (`<data_dir>/exe-unit/work/<agreement>/<activity>`)."""

    def __init__(
        self,
        data_dir: Path,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
        is_live: Callable[[str], bool] = lambda activity_id: find_unit(activity_id) != 0,
    ) -> None:
        self._work, self._cache = data_dir / "exe-unit" / "work", data_dir / "exe-unit" / "cache" / "images"
        self._free_bytes, self._is_live = free_bytes, is_live
        self._dead_since: dict[Path, float] = {}

    async def room_gib(self) -> float:
        """Return what activities of this agent could take up in all, with what they do take up. Raises OSError.

        Images that nobody uses are room: they are removed for whoever needs it.
        """
        place = next(path for path in (self._work, *self._work.parents) if path.exists())
        folders, now = [path for path in self._work.glob("*/*") if path.is_dir() and not path.is_symlink()], trio.current_time()
        self._dead_since = {folder: at for folder, at in self._dead_since.items() if folder in folders}
        taken = 0
        if folders:
            live = await trio.to_thread.run_sync(self._live, folders)
            for folder in folders:
                if folder in live:
                    self._dead_since.pop(folder, None)
                else:
                    self._dead_since.setdefault(folder, now)
            ours = [one for one in folders if now - self._dead_since.get(one, now) < CLEANED_S]
            taken = await trio.to_thread.run_sync(taken_bytes, ours)
        cached = await trio.to_thread.run_sync(evictable_bytes, self._cache) if _same_disk(place, self._cache) else 0
        return (self._free_bytes(place) + taken + cached - MARGIN_BYTES) / GIB

    def _live(self, folders: Sequence[Path]) -> set[Path]:
        return {folder for folder in folders if self._is_live(folder.name)}


def _same_disk(place: Path, other: Path) -> bool:
    return other.exists() and place.stat().st_dev == other.stat().st_dev


def taken_bytes(folders: Sequence[Path]) -> int:
    """Return the disk space below directories: files set aside with all their blocks, what is mounted there not at all.

    After MAX_ENTRIES nothing more is counted, which makes the room look smaller than it is.
    """
    total, left = 0, MAX_ENTRIES
    for folder in folders:
        found = measure_tree(folder, left, one_device=True)
        total, left = total + found.size_bytes, max(0, left - found.entries)
    return total


class StorageForSale:
    """What is for sale of one disk; `look` keeps it fresh."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.gib = math.inf  # before the first look: whatever the profile says
        self.reason = ""  # why nothing is for sale
        self._profile_gib: float | None = None
        self._due_at, self._unsure = -math.inf, False

    def doubt(self) -> None:
        """Look at the next occasion: an exe-unit has ended badly."""
        self._due_at = -math.inf

    async def look(self, profile_gib: float | None = None) -> bool:
        """Look at the disk if it is time to, or the profile is another one; return whether other storage is for sale now.

        Where it was looked at before, a change must be seen twice: room that is missing may be just changing hands.
        """
        if profile_gib is None:
            profile_gib = self._profile_gib
        fresh = profile_gib != self._profile_gib
        began = trio.current_time()
        if profile_gib is None or (not fresh and began < self._due_at):
            return False
        try:
            room_gib = await self._disk.room_gib()
        except OSError as error:
            log.debug("looking at the disk: %s (storage for sale stays as it is)", error)
            self._due_at, self._profile_gib = began + LOOK_DISK_S, profile_gib
            return False
        now = trio.current_time()
        self._due_at = now + max(LOOK_DISK_S, (now - began) / MOST_WORK)
        found = storage_for_sale(profile_gib, room_gib, None if fresh else self.gib)
        if not fresh and found != self.gib and not self._unsure:
            self._unsure, self._due_at = True, -math.inf
            return False
        self._unsure, self._profile_gib = False, profile_gib
        if found == self.gib:
            return False
        self._change(found, profile_gib, room_gib)
        return True

    def _change(self, gib: float, profile_gib: float, room_gib: float) -> None:
        self.gib = gib
        room = f"the disk has room for {max(0.0, room_gib):.3g} GiB of storage"
        self.reason = f"{room}, at least {MIN_STORAGE_GIB:g} GiB are needed" if gib == 0.0 else ""
        if gib < profile_gib:
            log.warning("%s: %s of %.3g GiB are for sale until there is more", room, f"{gib:.3g}" if gib else "none", profile_gib)
        else:
            log.info("all %.3g GiB of storage are for sale", profile_gib)
