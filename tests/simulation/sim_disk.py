"""The simulated machines' disks, and the journal on them: slow, full, broken, and written in a thread of its own.

A thread is played by its interleavings: on a world's threaded disks (files, with one connection that writes and one
that reads, as on a real node) a transaction may land between any two reads of whoever is at work, and its writer hears
of it later. So a run depends on its seed alone, and has the schedules that a thread may have.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from typing import TYPE_CHECKING, Any

from actors.kernel.journal import Journal
from actors.kernel.lineage import start_number
from actors.kernel.machine import JournalWaits
from actors.kernel.records import Commit, JournalError
from actors.kernel.tables import Acks

if TYPE_CHECKING:
    from sim_world import Host

MEMORY = "/dev/shm"  # where a file costs no disk; else the folder for temporary files
LANDS = 0.3  # how often a transaction under way lands before a read


class Disks:
    """All disks of a world: databases in memory, or files where journals are threaded."""

    def __init__(self, threaded: bool) -> None:
        self._folder = _folder() if threaded else None
        self._files: dict[sqlite3.Connection, str] = {}
        self._open: list[sqlite3.Connection] = []

    def new(self) -> sqlite3.Connection:
        """Return an empty disk."""
        path = ":memory:"
        if self._folder:
            path = f"{self._folder.name}/{len(self._files)}.db"
        disk = self._connect(path)
        self._files[disk] = path
        return disk

    def reader(self, disk: sqlite3.Connection) -> sqlite3.Connection:
        """Return a connection that reads a disk beside the one that writes it."""
        return self._connect(self._files[disk])

    def _connect(self, path: str) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None)
        self._open.append(db)
        if self._folder:
            for pragma in ("auto_vacuum=incremental", "journal_mode=wal", "synchronous=off"):
                db.execute(f"pragma {pragma}")
        return db

    def close(self) -> None:
        """Throw all disks away."""
        for db in self._open:
            db.close()
        if self._folder:
            self._folder.cleanup()


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sim-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None)


class DiskFails(JournalError):
    """The disk is full, or cannot be read, because the world wants it so."""


class SimJournal(Journal):
    """A journal whose disk takes its time, and whose process may die before, while and after it writes."""

    host: Host
    _under_way: tuple[list[Commit], Acks] | None = None
    _failed: JournalError | None = None

    async def commit(self, commit: Commit, *, patient: bool = False) -> None:
        from sim_world import Broken

        host = self.host
        for recipient, seq in commit.expired:
            if host.acked.get((commit.actor, recipient), 0) >= seq:
                raise Broken(f"{host.name}/{commit.actor} gave up {recipient}#{seq}, which was acknowledged")
        for mend in commit.relinked:
            host.acked.pop((commit.actor, mend.recipient), None)
            host.world.reached[type(mend).__name__] += 1
        await super().commit(commit, patient=patient)

    async def _store(self, commits: list[Commit], acks: Acks) -> None:
        world = self.host.world
        await world.pause(world.faults.disk_s)
        world.may_crash()
        if world.chance(world.faults.disk_errors):
            world.reached["disk full"] += 1
            if start_number(self.boot) % 2:  # every other start outlasts it; the others end, and start again
                world.reached["disk outlasted"] += 1
                raise JournalWaits("cannot write the journal: database or disk is full")
            raise DiskFails("cannot write the journal: database or disk is full")
        self._under_way, self._failed = (commits, acks), None
        try:
            if world.faults.threaded:
                await world.pause(world.faults.disk_s)
            self._land()
        finally:
            self._under_way = None  # who dies takes the thread along
        if self._failed is not None:
            raise self._failed
        world.note("disk", self.host.name, len(commits), len(acks))
        world.may_crash()
        await world.pause(world.faults.disk_s)

    def _land(self) -> None:
        """The thread's transaction is on disk; whoever waits for it does not know that yet."""
        if self._under_way is None:
            return
        under_way, self._under_way = self._under_way, None
        try:
            self._write(*under_way)
        except JournalError as error:
            self._failed = error

    def _all(self, query: str, values: tuple[Any, ...] = ()) -> list[Any]:
        world = self.host.world
        if self.host.system is not None and world.chance(world.faults.disk_errors / 50):
            world.reached["read error"] += 1
            raise DiskFails("cannot read the journal: disk I/O error")
        if self._under_way is not None and world.faults.threaded and world.rng.random() < LANDS:
            world.reached["landed in a step"] += 1
            self._land()
        return super()._all(query, values)
