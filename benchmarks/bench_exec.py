"""What a command costs in each runtime, and what the runtime `vm` adds to the Docker Engine below it.

For `vm` and `wasmtime`, through the real Runtime objects: deploy of a package that is in the cache, start, the round trip
of a command (`true`, or a module that returns at once), and stop. Beside `vm`, by turns in the same run, the bare Engine
with a container of the same settings: create, start, exec (create, attach, read to the end, inspect), remove, each over
the Docker SDK; and `docker exec` where that program is. Aims: an exec at most 25 ms and a start at most 150 ms over the
Engine's own. Last, the same commands as a requestor meets them: from its REST API through two nodes to the exe-unit and
back, on a market of real processes.

    python benchmarks/bench_exec.py [--runs 40] [--json FILE]      DOCKER_HOST says which Engine; else one is started
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import docker
import trio
import wasmtime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "rest"))

from requestor import Requestor, published

from golem.exeunit.runtime import DeployOptions, Limits, Runtime, Side, VolumeRequest
from golem.exeunit.runtimes import make_runtime
from golem.exeunit.runtimes.vm.seccomp_profile import profile
from golem.lab.engine import missing, open_engine
from golem.lab.localnet import LocalNet, LocalNode, open_localnet

EXEC_AIM_MS, START_AIM_MS = 25.0, 150.0
BUSYBOX = Path("/bin/busybox")
MODULE = '(module (memory (export "memory") 1) (func (export "_start")))'
LIMITS = Limits(cpu_threads=2, mem_gib=0.25, storage_gib=0.25)
Times = dict[str, list[float]]


def package() -> bytes:
    """Return a root file system with busybox alone."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        file = tarfile.TarInfo("bin/busybox")
        file.size, file.mode = BUSYBOX.stat().st_size, 0o755
        archive.addfile(file, io.BytesIO(BUSYBOX.read_bytes()))
        for name in ("true", "sleep", "sh"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
    return out.getvalue()


@contextmanager
def timed(times: Times, what: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    times.setdefault(what, []).append((time.perf_counter() - begin) * 1000)


async def _ignore(side: Side, chunk: bytes) -> None:
    """Output is not what is measured here."""


class Ours:
    """A runtime with a package, and how long each step took."""

    def __init__(self, name: str, image: Path, folder: Path, entry_point: str) -> None:
        self.runtime: Runtime = make_runtime(name, folder / f"{name}-cache")
        self.times: Times = {}
        self._image, self._folder, self._entry_point = image, folder, entry_point

    async def up(self) -> None:
        work = self._folder / uuid.uuid4().hex
        work.mkdir(mode=0o711)
        options = DeployOptions(work, LIMITS, volumes=(VolumeRequest("/data"),), activity_id=uuid.uuid4().hex)
        with timed(self.times, "deploy"):
            await self.runtime.deploy(self._image, options)
        with timed(self.times, "start"):
            await self.runtime.start([])

    async def exec(self) -> None:
        with timed(self.times, "exec"):
            status = await self.runtime.run(self._entry_point, [], _ignore)
        assert status.ok, status

    async def down(self) -> None:
        with timed(self.times, "stop"):
            await self.runtime.stop()


class Bare:
    """The Engine itself, over the Docker SDK, which blocks: nothing else runs meanwhile."""

    def __init__(self, host: str, image: str, folder: Path) -> None:
        self.client = docker.APIClient(base_url=host, version="auto", timeout=60)
        self.times: Times = {}
        self._host, self._image, self._folder, self._id = host, image, folder, ""

    async def up(self) -> None:
        settings = self.client.create_host_config(
            network_mode="none", mem_limit=LIMITS.mem_bytes, memswap_limit=LIMITS.mem_bytes, nano_cpus=2_000_000_000,
            pids_limit=512, cap_drop=["ALL"], security_opt=["no-new-privileges", f"seccomp={profile()}"],
            binds=[f"{self._folder}:/data"], init=True,
        )  # fmt: skip
        with timed(self.times, "deploy"):
            made = self.client.create_container(self._image, ["/bin/sleep", "100000"], host_config=settings)
        self._id = made["Id"]
        with timed(self.times, "start"):
            self.client.start(self._id)

    async def exec(self) -> None:
        with timed(self.times, "exec"):
            exec_id = self.client.exec_create(self._id, ["/bin/true"])["Id"]
            self.client.exec_start(exec_id, demux=True)
            assert self.client.exec_inspect(exec_id)["ExitCode"] == 0
        if shutil.which("docker"):
            with timed(self.times, "docker exec"):
                await trio.run_process(["docker", "-H", self._host, "exec", self._id, "/bin/true"])

    async def down(self) -> None:
        with timed(self.times, "stop"):
            self.client.remove_container(self._id, force=True, v=True)


async def by_turns(sides: list[Ours | Bare], rounds: int, execs: int) -> None:
    """Take every side through its steps, one after the other, so that all meet the same machine."""
    for number in range(rounds + 1):
        for side in sides:
            await side.up()
        for _ in range(execs):
            for side in sides:
                await side.exec()
        for side in sides:
            await side.down()
            if number == 0:  # the first time is for caches
                side.times.clear()


def figures(times: Times) -> dict[str, float]:
    """Medians in milliseconds, and the worst exec."""
    return {**{what: statistics.median(found) for what, found in times.items()}, "exec_worst": max(times["exec"])}


async def bench_vm(host: str, folder: Path, rounds: int, execs: int) -> dict[str, dict[str, float]]:
    image = folder / "package.tar"
    image.write_bytes(package())
    bind = folder / "bare"
    bind.mkdir()
    bare = Bare(host, "bench-exec:latest", bind)
    bare.client.import_image_from_data(image.read_bytes(), repository="bench-exec")
    ours = Ours("vm", image, folder, "/bin/true")
    if problem := await ours.runtime.self_test():
        raise SystemExit(f"vm: {problem}")
    try:
        await by_turns([ours, bare], rounds, execs)
    finally:
        bare.client.remove_image("bench-exec:latest", force=True)
        bare.client.close()
    return {"vm": figures(ours.times), "engine": figures(bare.times)}


async def bench_wasm(folder: Path, rounds: int, execs: int) -> dict[str, float]:
    image = folder / "module.wasm"
    image.write_bytes(bytes(wasmtime.wat2wasm(MODULE)))
    ours = Ours("wasmtime", image, folder, "main")
    if problem := await ours.runtime.self_test():
        raise SystemExit(f"wasmtime: {problem}")
    await by_turns([ours], rounds, execs)
    return figures(ours.times)


async def market_exec(net: LocalNet, node: LocalNode, runtime: str, image: Path, entry_point: str, execs: int) -> list[float]:
    """Times of commands in one activity, from a requestor's REST API and back."""
    times: Times = {}
    async with node.client() as client, published(image, node.environment) as package:
        requestor = Requestor(client, net.name)
        demand, body = await requestor.demand(await requestor.allocate(), package, runtime=runtime)
        draft = await requestor.negotiate(demand, body, await requestor.proposal(demand, "Initial"))
        agreement = await requestor.agree(draft)
        activity = await requestor.create_activity(agreement)
        await requestor.run(activity, {"deploy": {}}, {"start": {}})
        for _ in range(execs):
            with timed(times, "exec"):
                (result,) = await requestor.run(activity, {"run": {"entry_point": entry_point, "args": []}})
            assert result["result"] == "Ok", result
        await requestor.destroy_activity(activity)
        await requestor.terminate(agreement)
    return times["exec"]


async def bench_market(folder: Path, runtimes: dict[str, tuple[Path, str]], execs: int) -> dict[str, list[float]]:
    async with open_localnet(folder / "market") as net:
        requestor, provider = await net.start_node("requestor"), await net.start_node("provider")
        await requestor.command("payment", "fund")
        net.start_agent(provider, subnet=net.name)
        return {
            runtime: await market_exec(net, requestor, runtime, image, entry_point, execs)
            for runtime, (image, entry_point) in runtimes.items()
        }


def show(found: dict[str, dict[str, float]]) -> None:
    """Print a table: steps down, sides across, and what `vm` adds."""
    sides = list(found)
    print(f"{'ms, medians':14}" + "".join(f"{side:>10}" for side in sides) + f"{'vm adds':>10}")
    for step in ("deploy", "start", "exec", "exec_worst", "stop", "docker exec", "exec by REST"):
        line = f"{step:14}" + "".join(f"{found[side][step]:10.1f}" if step in found[side] else f"{'':10}" for side in sides)
        if step in found.get("vm", {}) and step in found["engine"]:
            line += f"{found['vm'][step] - found['engine'][step]:+10.1f}"
        print(line)
    if "vm" in found:
        adds_exec, adds_up = (
            sum(found["vm"][step] - found["engine"][step] for step in steps) for steps in (("exec",), ("deploy", "start"))
        )
        print(f"over the bare Engine: exec {adds_exec:+.1f} ms (aim {EXEC_AIM_MS:g}), ", end="")
        print(f"deploy and start {adds_up:+.1f} ms (aim for start {START_AIM_MS:g})")


@contextmanager
def engine_host(folder: Path) -> Iterator[str | None]:
    """Give the Engine to use, None (and say why) where there is none."""
    if os.environ.get("DOCKER_HOST"):
        yield os.environ["DOCKER_HOST"]
    elif problem := missing() or (None if BUSYBOX.exists() else "no /bin/busybox (Debian: busybox-static)"):
        print(f"vm: skipped, {problem}")
        yield None
    else:
        with open_engine(folder) as engine:
            os.environ["DOCKER_HOST"] = engine.host
            yield engine.host


async def measure(rounds: int, execs: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o711)
        runtimes = {"wasmtime": (folder / "module.wasm", "main")}
        with engine_host(folder / "e") as host:
            if host is not None:
                found |= await bench_vm(host, folder, rounds, execs)
                runtimes["vm"] = (folder / "package.tar", "/bin/true")
            found["wasmtime"] = await bench_wasm(folder, rounds, execs)
            for runtime, times in (await bench_market(folder, runtimes, rounds * execs)).items():
                found[runtime]["exec by REST"] = statistics.median(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=40, help="commands in all (default: 40)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    execs = 8
    found = trio.run(measure, max(1, options.runs // execs), execs)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
