"""A guest made by a seed takes all it can of everything, in any order: the machine's own use differs by what was sold."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import pytest
import trio
from test_hostile_guests import LIMITS, MIB, Guest, open_guest, package

from golem.exeunit.runtime import RuntimeFault
from golem.exeunit.usage import measure_tree, process_peak_bytes
from golem.lab.engine import LocalEngine

pytestmark = [pytest.mark.root, pytest.mark.integration]
__all__ = ["package"]  # a fixture

SEEDS = [seed.strip() for seed in os.environ.get("BUDGET_SEEDS", "1").split(",")]
ATTACKS = (
    ("writable_mounts",), ("many_files", "/vol"), ("many_files", "/opt"), ("fill_hidden", "/opt"), ("fill", "/dev/shm", "/tmp"),
    ("memory_bomb",), ("modest",), ("fill", "/vol"),
)  # fmt: skip


def engine_pid(engine: LocalEngine) -> int:
    return int((engine.folder / "docker.pid").read_text())


def disk_of(engine: LocalEngine) -> tuple[int, int]:
    """Return bytes and files of the Engine's own folder; what is mounted there lies elsewhere."""
    found = measure_tree(engine.folder / "data", one_device=True)
    return found.size_bytes, found.entries


def open_files() -> int:
    """Return how many files this process, which is the exe-unit, has open; those of what is garbage go first."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


async def attack(guest: Guest, dice: random.Random) -> None:
    attacks = dice.sample(ATTACKS, k=dice.randrange(4, len(ATTACKS)))
    for name, *arguments in attacks:
        await guest.attack(name, *arguments)
        used = guest.runtime.usage()
        assert used.storage_gib <= LIMITS.storage_gib, (attacks, name)
        assert used.gib <= LIMITS.mem_gib * 1.02, (attacks, name)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_guest_takes_is_what_was_sold(engine: LocalEngine, package: Path, seed: str) -> None:
    dice = random.Random(f"budget {seed}")

    async def body() -> None:
        async with open_guest(engine, package) as first:  # the image is there from now on, and all that is made once
            await first.works()
        before, files = open_files(), disk_of(engine)
        peak = process_peak_bytes(engine_pid(engine))
        async with open_guest(engine, package) as guest:
            await attack(guest, dice)
            bytes_now, files_now = disk_of(engine)
            assert bytes_now - files[0] < 4 * MIB, "the Engine's disk"
            assert files_now - files[1] < 1000, "the Engine's inodes"
        bytes_after, files_after = disk_of(engine)
        assert bytes_after - files[0] < MIB
        assert files_after - files[1] < 100
        assert process_peak_bytes(engine_pid(engine)) - peak < 128 * MIB, "the Engine's memory"
        assert open_files() - before < 16, "descriptors of the exe-unit, connections to its Engine among them"

    print(f"BUDGET_SEEDS={seed}")
    trio.run(body)


def resident_bytes(pid: int) -> int:
    words = Path(f"/proc/{pid}/statm").read_text().split()
    return int(words[1]) * os.sysconf("SC_PAGESIZE")


def test_arguments_of_commands_that_are_over(engine: LocalEngine, package: Path) -> None:
    """An Engine keeps what it was told of them for minutes, several times over; and none of them is another one for that."""
    word = "0123456789abcdef" * 4096
    length = str(11 * len(word) + 20_000)

    async def body() -> None:
        async with open_guest(engine, package) as guest:
            await guest.works()
            before = resident_bytes(engine_pid(engine))
            script = 'for one in "$@"; do n=$((n + ${#one})); done; echo $n; exit 3'
            for _ in range(60):
                status, output = await guest.run("sh", "-c", script, "sh", *[word] * 11, "x" * 20_000)
                assert (status.code, output) == (3, length + "\n")
            assert resident_bytes(engine_pid(engine)) - before < 48 * MIB
            for name, code in (("none-such", 127), ("/etc/passwd", 126)):
                assert (await guest.run(name, *[word] * 3))[0].code == code
            with pytest.raises(RuntimeFault, match="the name of the program is too long"):
                await guest.run("x" * 66_000)
            (folder,) = guest.deployment.volumes[0].host_dir.parents[2].glob("arguments")
            assert not list(folder.iterdir()), "what was read is gone"
            assert not (await guest.run("/bin/sh", "-c", "echo > /.golem/arguments/x"))[0].ok
            await guest.works()

    trio.run(body)
