"""Every child process is started from a folder full of traps: modules, programs and a `.env` that somebody else put there.

A trap that springs writes its name down. None may.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.support import trio_test

from actors.kernel.machine import Meta
from golem.base import dotenv_file
from golem.base.children import child_environment, python_line
from golem.base.dotenv_file import dot_env, load_environment
from golem.chain.devchain import INFO_NAME, ensure_devchain, stop_devchain
from golem.exeunit.runtimes.plugin.descriptors import find_descriptors
from golem.exeunit.runtimes.plugin.runtime import ExternalRuntime
from golem.provider.leftovers import Leftovers
from golem.provider.processes import Processes
from golem.provider.runtimes import ExeUnits, ask_runtime, search_places
from protocol.provider import StartUnit, UnitRunning

GOLEM = str(Path(sys.executable).parent / "golem")
MODULES = (
    "msgspec", "trio", "golem", "actors", "protocol", "json", "logging", "argparse", "httpx", "docker", "wasmtime", "h11", "eth",
    "sitecustomize", "usercustomize", "sqlite3", "socket", "signal", "tempfile", "dotenv",
)  # fmt: skip
PROGRAMS = ("mkfs.ext4", "mount", "setpriv", "docker", "python3", "sh", "env", "e2fsck")
FORBIDDEN = {
    "PYTHONPATH": "{here}", "PATH": "{here}", "DOCKER_HOST": "unix://{here}/docker.sock", "HOME": "{here}", "PYTHONHOME": "/x",
    "PYTHONSTARTUP": "{here}/json.py", "LD_PRELOAD": "{here}/x.so", "LD_LIBRARY_PATH": "{here}", "TMPDIR": "{here}",
    "HTTP_PROXY": "http://127.0.0.1:9", "SSL_CERT_FILE": "{here}/ca", "EXE_UNIT_PATH": "{here}", "GOLEM_TRANSFER_POLICY": "local",
    "XDG_DATA_HOME": "{here}", "PYTHONUSERBASE": "{here}", "NOTIFY_SOCKET": "{here}/notify", "GOLEM_LOG": "nonsense",
    "PYTHONINSPECT": "1",
}  # fmt: skip


class Traps:
    """The folder, and what sprang in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._sprung = folder / "traps", folder / "sprung"
        self._sprung.mkdir()
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for place in (self.folder, *(self.folder / lib / version / "site-packages" for lib in (".local/lib", "lib"))):
            place.mkdir(parents=True)
            for name in MODULES:
                (place / f"{name}.py").write_text(f"open({str(self._sprung / name)!r}, 'w').close()\nraise SystemExit(99)\n")
            for name in PROGRAMS:
                (place / name).write_text(f"#!/bin/sh\n: > {self._sprung / name}\n")
                (place / name).chmod(0o755)
        self.write_env({name: value.format(here=self.folder) for name, value in FORBIDDEN.items()})

    def write_env(self, values: Mapping[str, str]) -> None:
        (self.folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))

    def sprung(self) -> list[str]:
        return sorted(os.listdir(self._sprung))


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Traps]:
    made = Traps(tmp_path)
    monkeypatch.chdir(made.folder)
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}.{os.pathsep}traps")  # empty and relative: the working directory
    monkeypatch.setattr(dotenv_file, "_set", {})
    before = dict(os.environ)
    yield made
    os.environ.clear()
    os.environ.update(before)


def words_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def environment_of(pid: int) -> dict[str, str]:
    return dict(one.split("=", 1) for one in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in one)


def is_clear_of(traps: Traps, pid: int) -> None:
    """Check what a child of ours was given."""
    assert {"-P", "-s", "-m"} <= set(words_of(pid))
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    env = environment_of(pid)
    assert str(traps.folder) not in json.dumps(env)
    assert all(os.path.isabs(place) for place in env["PYTHONPATH"].split(os.pathsep))


@pytest.mark.parametrize("module", ["golem.exeunit", "golem.chain.devchain"])
def test_our_modules_start_where_modules_of_others_lie(traps: Traps, module: str) -> None:
    """Even with the traps as working directory and as home."""
    line = python_line(module, "--help")
    done = subprocess.run(line, env=child_environment() | {"HOME": str(traps.folder)}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, traps.sprung()) == (0, []), done.stderr
    without = [word for word in line if word not in ("-P", "-s")]
    subprocess.run(without, env=os.environ, capture_output=True, timeout=60)
    assert traps.sprung(), "the traps are sharp"


def test_the_dev_chain(traps: Traps, tmp_path: Path) -> None:
    load_environment()
    chain = tmp_path / "chain"
    try:
        trio.run(ensure_devchain, chain)
        is_clear_of(traps, json.loads((chain / INFO_NAME).read_text())["pid"])
    finally:
        trio.run(stop_devchain, chain)
    assert traps.sprung() == []


@pytest.mark.parametrize("runtime", ["wasmtime", "vm"])
def test_self_tests_of_runtimes(traps: Traps, runtime: str) -> None:
    load_environment()
    answer = trio.run(ask_runtime, runtime)
    assert runtime == "vm" or not isinstance(answer, str), answer
    assert str(traps.folder) not in repr(answer), "the Engine of the file is not asked"
    assert traps.sprung() == []


@trio_test
async def test_an_exe_unit(traps: Traps, tmp_path: Path) -> None:
    load_environment()
    agreement = {"agreementId": "a" * 32, "demand": {"requestorId": "0x" + "b" * 40, "properties": {}},
                 "offer": {"providerId": "0x" + "a" * 40, "properties": {
                     "golem.inf.mem.gib": 0.5, "golem.inf.storage.gib": 0.1, "golem.inf.cpu.threads": 1,
                     "golem.com.usage.vector": ["golem.usage.cpu_sec"]}}}  # fmt: skip
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "bus.sock"))
    listener.listen()

    class Outbox:
        async def post(self, sender: str, sends: Any, trace: str | None = None) -> None: ...

    left = Leftovers(tmp_path, ExeUnits, lambda: ())
    port = Processes(Outbox(), tmp_path / "agent", lambda: tmp_path / "bus.sock", ExeUnits, left)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run)
        message = StartUnit("d" * 32, "a" * 32, "wasmtime", json.dumps(agreement))
        (sent,) = await port.handle(message, Meta("agent/provider", 0.0, "trace"))
        assert isinstance(sent.message, UnitRunning)
        pid = sent.message.pid
        try:
            with trio.fail_after(60):
                await trio.to_thread.run_sync(listener.accept, abandon_on_cancel=True)  # it runs: it has come to the bus
            is_clear_of(traps, pid)
        finally:
            os.killpg(pid, signal.SIGKILL)
        nursery.cancel_scope.cancel()
    listener.close()
    assert traps.sprung() == []


def test_the_programs_of_plug_ins_have_a_home_of_their_own(traps: Traps, tmp_path: Path) -> None:
    load_environment()
    program = tmp_path / "plugin"
    said = tmp_path / "said"
    program.write_text(
        f"#!{sys.executable}\nimport json, os\n"
        f"one = {{name: os.environ[name] for name in ('HOME', 'TMPDIR')}} | {{'mode': os.stat(os.environ['HOME']).st_mode}}\n"
        f"one |= {{'cwd': os.getcwd(), 'owner': os.stat(os.environ['HOME']).st_uid}}\n"
        f"open({str(said)!r}, 'a').write(json.dumps(one) + '\\n')\nprint('{{\"properties\": {{}}}}')\n"
    )
    program.chmod(0o755)
    one = {"name": "mine", "version": "1", "supervisor-path": "exe-unit", "runtime-path": str(program)}
    (tmp_path / "ya-mine.json").write_text(json.dumps([one]))
    runtime = ExternalRuntime(find_descriptors(str(tmp_path)).runtimes["mine"])
    assert trio.run(runtime.self_test) is None
    homes = [json.loads(line) for line in said.read_text().splitlines()]
    assert len(homes) == 2
    for home in homes:
        assert home["HOME"] == home["TMPDIR"]
        assert stat.S_IMODE(home["mode"]) == 0o700
        assert (home["owner"], home["cwd"]) == (os.geteuid(), "/")
        assert home["HOME"] not in ("/tmp", str(traps.folder))
        assert not os.path.exists(home["HOME"]), "and nothing of it stays"
    assert traps.sprung() == []


def test_places_of_descriptors_are_those_that_were_meant(traps: Traps) -> None:
    found = search_places(f"plugins{os.pathsep}/usr/x", Path("/nowhere"))
    assert found == f"{traps.folder}/plugins{os.pathsep}/usr/x", "as seen from where the agent was started"


# -- .env
def test_the_file_sets_documented_names_alone(traps: Traps) -> None:
    before = dict(os.environ)
    here = {name: value.format(here=traps.folder) for name, value in FORBIDDEN.items()}
    mine = {"NODE_NAME": "mine", "HOLESKY_GETH_ADDR": "http://127.0.0.1:1", "YAGNA_APPKEY": "x${PATH}"}
    traps.write_env({**here, **mine, "SUBNET": "a"})
    os.environ["SUBNET"] = "b"
    found = load_environment()
    new = {name: value for name, value in found.items() if before.get(name) != value and name != "SUBNET"}
    assert new == mine
    assert found["SUBNET"] == "b", "the environment has the say"
    note = dot_env().note()
    assert str(traps.folder / ".env") in note
    assert all(name in note for name in FORBIDDEN)
    assert "mine" not in note, "names alone"
    assert load_environment() == found, "once more is the same"
    assert "NODE_NAME" in dot_env().given


def test_the_file_sets_what_the_documents_list(traps: Traps) -> None:
    page = (Path(__file__).parents[2] / "docs/operate.md").read_text()
    listed = page.partition("and these variables (also in")[2].partition("Others are ignored")[0]
    names = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+|SUBNET)`", listed))
    assert len(names) > 25, names
    traps.write_env(dict.fromkeys(names, "1"))
    load_environment()
    assert dot_env().ignored == ()


def test_a_file_of_others_is_not_read(traps: Traps) -> None:
    env = traps.folder / ".env"
    env.write_text("NODE_NAME=theirs\n")
    env.chmod(0o666)
    assert "NODE_NAME" not in load_environment()
    assert "not read" in dot_env().note()
    env.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(env, 54321, 54321)
        assert "NODE_NAME" not in load_environment()
        assert "not read" in dot_env().note()
        env.unlink()
        (traps.folder.parent / "ours").write_text("NODE_NAME=ours\n")  # of another project: his link brings it here
        env.symlink_to("../ours")
        assert load_environment()["NODE_NAME"] == "ours", "a link of our own is as good as a file"
        os.lchown(env, 54321, 54321)
        os.environ.pop("NODE_NAME")
        assert "NODE_NAME" not in load_environment()
        assert "not read" in dot_env().note()
    env.unlink()
    os.mkfifo(env)
    assert "NODE_NAME" not in load_environment(), "and nobody waits for its end"
    env.unlink()
    env.write_bytes(b"NODE_NAME=a\xff\0b\n" + b"#" * (1 << 20))
    assert "NODE_NAME" not in load_environment()
    env.unlink()
    assert load_environment() is not None
    assert dot_env().note() == ""


def kept() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("GOLEM_", "YAGNA_", "PYTHONPATH"))}


def run_golem(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**kept(), **more}
    return subprocess.run([GOLEM, *arguments], env=env, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL)


def test_no_key_goes_to_a_node_that_the_file_names(traps: Traps, tmp_path: Path) -> None:
    asked: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                client.settimeout(5)
                asked.append(client.recv(65536))

    threading.Thread(target=listen, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    data = ("--data-dir", str(tmp_path / "node"))
    traps.write_env({"YAGNA_API_URL": url})
    done = run_golem(*data, "provider", "run", YAGNA_APPKEY="0123456789abcdef")
    assert done.returncode == 1
    assert str(traps.folder / ".env") in done.stderr
    assert asked == []
    traps.write_env({"YAGNA_API_URL": url, "YAGNA_APPKEY": "of-the-file"})
    process = subprocess.Popen([GOLEM, *data, "provider", "run"], env=kept(), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        trio.run(partial(until, lambda: asked))
    finally:
        process.kill()
        process.wait()
        listener.close()
    assert b"Bearer of-the-file" in asked[0], "both stand there: so it is meant"


async def until(condition: Any) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.05)


def test_the_command_line_itself(traps: Traps, tmp_path: Path) -> None:
    listed = run_golem("--json", "--data-dir", str(tmp_path / "node"), "provider", "exe-unit", "list")
    assert listed.returncode == 0, listed.stderr
    assert "wasmtime" in {one["name"] for one in json.loads(listed.stdout)["runtimes"]}
    assert traps.sprung() == []
