"""A guest made by a seed takes all it can of everything, in any order: the machine's own use differs by what was sold."""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from hostile_guest import BUFFERS
from test_hostile_guests import LIMITS, MIB, PROGRAM, PYTHON, Guest, open_guest, package
from worlds.patience import patience, within

from golem.exeunit.runtime import GIB, ExitStatus, RuntimeFault, Side
from golem.exeunit.runtimes.vm.container import PROCESSES
from golem.exeunit.usage import measure_tree, process_peak_bytes
from golem.lab.engine import LocalEngine

pytestmark = [pytest.mark.root, pytest.mark.integration]
__all__ = ["package"]  # a fixture

BRIEF = replace(LIMITS, run_time_s=60)
SEEDS = [seed.strip() for seed in os.environ.get("BUDGET_SEEDS", "1").split(",")]
ATTACKS = (
    ("writable_mounts",), ("many_files", "/vol"), ("many_files", "/opt"), ("fill_hidden", "/opt"), ("fill", "/dev/shm", "/tmp"),
    ("memory_bomb",), ("modest",), ("fill", "/vol"), ("threads",), ("descriptors",), ("spew", "24"), ("attacks", "9", "none"),
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


async def carry_out(guest: Guest, *arguments: str) -> bytes:
    """Run an attack as an exe-unit does, which keeps the beginning of the output."""
    kept = bytearray()

    async def keep(side: Side, chunk: bytes) -> None:
        kept.extend(chunk[: max(0, MIB - len(kept))])

    await guest.runtime.run(PYTHON, ["-I", "-S", "-c", PROGRAM, *arguments], keep)
    return bytes(kept)


def works_here() -> None:
    """Check that this machine has what ordinary programs take."""
    done = subprocess.run([sys.executable, "-I", "-c", PROGRAM, "modest"], capture_output=True, timeout=patience(30))
    assert done.returncode == 0, done.stderr
    assert {tuple(found) for found in json.loads(done.stdout).values()} == {(4, None), (1, None)}
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=10) as one:
        with server.accept()[0] as other:
            one.sendall(b"x" * 1000)
            assert len(other.recv(1000, socket.MSG_WAITALL)) == 1000


async def attack(guest: Guest, neighbour: Guest, dice: random.Random) -> None:
    """Try some of it in any order, and in the end to be everywhere. A neighbour and this machine work meanwhile."""
    attacks = [*dice.sample(ATTACKS, k=dice.randrange(6, len(ATTACKS))), ("fork_bomb",)]
    for name, *arguments in attacks:
        output = await carry_out(guest, name, *arguments)
        used = guest.runtime.usage()
        assert used.storage_gib <= LIMITS.storage_gib, (attacks, name)
        assert used.gib <= LIMITS.mem_gib * 1.02, (attacks, name)
        if name in ("threads", "fork_bomb") and output:
            assert 0 < int(output.split()[0]) <= PROCESSES, (attacks, name)
        await neighbour.works()
        works_here()


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_guest_takes_is_what_was_sold(engine: LocalEngine, package: Path, seed: str) -> None:
    dice = random.Random(f"budget {seed}")

    async def body() -> None:
        for _ in range(2):  # the image is there from now on, and all that is made once
            async with open_guest(engine, package) as first, open_guest(engine, package) as other:
                await first.works()
                await other.works()
        own_bytes = resident_bytes(os.getpid())
        before, files = open_files(), disk_of(engine)
        peak = process_peak_bytes(engine_pid(engine))
        async with open_guest(engine, package) as neighbour, open_guest(engine, package) as guest:
            await attack(guest, neighbour, dice)
            bytes_now, files_now = disk_of(engine)
            assert bytes_now - files[0] < 4 * MIB, "the Engine's disk"
            assert files_now - files[1] < 1000, "the Engine's inodes"
        bytes_after, files_after = disk_of(engine)
        assert bytes_after - files[0] < MIB
        assert files_after - files[1] < 100
        assert process_peak_bytes(engine_pid(engine)) - peak < 128 * MIB, "the Engine's memory"
        assert open_files() <= before + 2, "connections to the Engine are a pool, which is as it was"
        assert resident_bytes(os.getpid()) - own_bytes < 64 * MIB, "memory of the exe-unit"

    print(f"BUDGET_SEEDS={seed}")
    trio.run(body)


def socket_bytes() -> int:
    """Return what all sockets of this machine have in the kernel's buffers, those of containers as well."""
    words = " ".join(Path("/proc/net/sockstat").read_text().splitlines()).split()
    return sum(int(words[at + 1]) for at, word in enumerate(words) if word == "mem") * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("kind", ["remapped", "plain"])
def test_buffers_of_the_kernel_are_memory_that_was_sold(request: pytest.FixtureRequest, package: Path, kind: str) -> None:
    """A guest fills pipes and sockets of every kind and keeps them; another one and this machine go on with theirs."""
    engine = request.getfixturevalue("engine" if kind == "remapped" else "plain_engine")
    said: dict[str, int] = {}

    async def hold(guest: Guest, task_status: trio.TaskStatus[None]) -> None:
        async def keep(side: Side, chunk: bytes) -> None:
            if not said:
                said.update(json.loads(chunk))
                task_status.started()

        await guest.runtime.run(PYTHON, ["-I", "-S", "-c", PROGRAM, "buffers", "3"], keep)

    async def body() -> None:
        async with open_guest(engine, package, BRIEF) as greedy, open_guest(engine, package) as other:
            before, most = socket_bytes(), [0]

            async def sample() -> None:
                while True:
                    most[0] = max(most[0], socket_bytes() - before)
                    await trio.sleep(0.01)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(sample)
                with within(30):
                    await nursery.start(hold, greedy)
                # What the kernel gives beyond the limit (with control groups of version 1) counts: the exe-unit ends it for that.
                assert greedy.runtime.usage().gib * GIB >= most[0] * 0.9, (said, most[0] >> 20)
                works_here()
                with within(30):
                    status, output = await other.attack("ordinary")
                    assert status.ok, output
                nursery.cancel_scope.cancel()

    trio.run(body)
    assert said.keys() == BUFFERS.keys()
    assert min(said.values()) > 0, f"MiB of each: {said}"
    print(f"MiB of each: {said}")


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
            for name, code in (("none-such", 127), ("/none/such", 127), ("/etc/passwd", 126), ("/etc", 126)):
                for words in ([word] * 3, []):  # by file, and by the Engine
                    status, _ = await guest.run(name, *words)
                    assert status.code == code, (name, status)
            said = await guest.run("/bin/sh", "-c", "echo 'exec x: exec format error'; exit 1")
            assert said == (ExitStatus(126, "exec format error"), "exec x: exec format error\n"), "of who says so himself"
            with pytest.raises(RuntimeFault, match="the name of the program is too long"):
                await guest.run("x" * 66_000)
            (folder,) = guest.deployment.volumes[0].host_dir.parents[2].glob("arguments")
            assert not list(folder.iterdir()), "what was read is gone"
            assert not (await guest.run("/bin/sh", "-c", "echo > /.golem/arguments/x"))[0].ok
            await guest.works()

    trio.run(body)
