"""The Trio client of an Engine against servers that misbehave, programs for containers, and the SDK's faults in our words."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from worlds.engine import admin as sdk
from worlds.engine import busybox_tar, import_image
from worlds.patience import patience, within
from worlds.support import trio_test

from golem.exeunit.runtime import Limits, RuntimeFault
from golem.exeunit.runtimes.vm import left_pipes
from golem.exeunit.runtimes.vm.admin import Admin, EngineFacts, EngineGone, InUse, NoSuch, spoken_api
from golem.exeunit.runtimes.vm.client import MAX_BODY_BYTES, EngineClient
from golem.exeunit.runtimes.vm.container import Plan, container_config
from golem.exeunit.runtimes.vm.init_program import PROBE_TEXT, init_program, probe_program, relay_program, supported
from golem.exeunit.runtimes.vm.left_pipes import LeftPipes
from golem.exeunit.runtimes.vm.long_arguments import FILES_PATH, RELAY_PATH, check_command, write_arguments
from golem.exeunit.runtimes.vm.self_test import _unfit
from golem.lab.engine import LocalEngine

FACTS = EngineFacts("20.10.24", "1.41", False, False, True, 100000, 2, "1", True)


@asynccontextmanager
async def server(path: Path, answers: Sequence[bytes]) -> AsyncIterator[list[bytes]]:
    """Serve a socket: each connection is told the next answer and closed; the list gets what was asked."""
    asked: list[bytes] = []
    left = list(answers)
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen()

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            asked.append(await stream.receive_some())
            with suppress(trio.BrokenResourceError):  # it has heard enough
                await stream.send_all(left.pop(0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handle, [trio.SocketListener(sock)])
        yield asked
        nursery.cancel_scope.cancel()


def answer(status: str, body: object = None, raw: bytes | None = None) -> bytes:
    data = raw if raw is not None else json.dumps(body).encode()
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(data), data)


def frame(side: int, data: bytes) -> bytes:
    return struct.pack(">BxxxI", side, len(data)) + data


@trio_test
async def test_faults_of_an_engine_have_names(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    client = EngineClient(path)
    with pytest.raises(EngineGone, match="No such file"):
        await client.ping()
    cases: list[tuple[bytes, type[RuntimeFault], str]] = [
        (answer("404 Not Found", {"message": "No such container: x"}), NoSuch, "No such container"),
        (answer("409 Conflict", {"message": "is not running"}), InUse, "not running"),
        (answer("500 Oops", raw=b"<html>"), RuntimeFault, "status 500"),
        (b"", EngineGone, "closed|broke"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}", EngineGone, "broke"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", EngineGone, "broke"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000, EngineGone, "broke"),
        (answer("200 OK", raw=b"x" * (MAX_BODY_BYTES + 1)), RuntimeFault, "too long"),
    ]
    async with server(path, [case[0] for case in cases]) as asked:
        for _, kind, text in cases:
            with pytest.raises(kind, match=text), within(10):
                await client.inspect("a/../b")
    assert asked[0].startswith(b"GET /v1.41/containers/a/../b/json HTTP/1.1\r\n") or b"a%2F..%2Fb" in asked[0]


@trio_test
async def test_a_wait_that_is_broken_off_is_no_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with server(path, [head, head + b"0\r\n\r\n", head + b'10\r\n{"StatusCode": 3}\r\n0\r\n\r\n']):
        for _ in range(2):
            with pytest.raises(EngineGone):
                await EngineClient(path).wait_exit("c")
        with pytest.raises(EngineGone):  # 0x10 is one byte short of that text
            await EngineClient(path).wait_exit("c")


@trio_test
async def test_streams_are_cut_anywhere_and_put_together(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    switch = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
    body = frame(1, b"one") + frame(2, b"") + frame(2, b"two") + frame(1, b"x" * 100_000)
    async with server(path, [switch + body, switch + frame(7, b"?"), switch + body, answer("404 No", {"message": "gone"})]):
        client = EngineClient(path)
        async with await client.start_exec("e") as stream:
            parts = []
            while (part := await stream.receive()) is not None:
                parts.append(part)
        assert parts[:2] == [("stdout", b"one"), ("stderr", b"two")]
        assert b"".join(data for _, data in parts[2:]) == b"x" * 100_000
        async with await client.start_exec("e") as stream:
            with pytest.raises(EngineGone, match="no stream"):
                await stream.receive()
        async with await client.start_exec("e", tty=True) as stream:  # as it comes
            found = b""
            while (part := await stream.receive()) is not None:
                assert part[0] == "stdout"
                found += part[1]
            assert found == body
            await stream.send(b"to nobody")
            await stream.end_input()
        with pytest.raises(NoSuch, match="gone"):
            await client.start_exec("e")


@pytest.mark.skipif(not supported(), reason="no programs for this machine")
def test_the_programs_run_here(tmp_path: Path) -> None:
    for name, content in (("init", init_program()), ("probe", probe_program())):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o755)
        assert len(content) < 512
    done = subprocess.run([tmp_path / "probe"], capture_output=True, timeout=patience(10))
    assert done.stdout == PROBE_TEXT
    assert done.returncode in (0, 1, 2, 4)
    with subprocess.Popen([tmp_path / "init"]) as process:  # in our own namespace: nobody is outside of it
        deadline = time.monotonic() + patience(10)
        while not _waits(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.kill()


@pytest.mark.skipif(not supported(), reason="no programs for this machine")
def test_arguments_by_file(tmp_path: Path) -> None:
    """The relay becomes the program that the file names, as it would have been started at once."""
    program, places = tmp_path / "run", tmp_path / "places"
    program.write_bytes(relay_program())
    program.chmod(0o755)
    assert len(relay_program()) < 512
    places.mkdir()
    (places / "plain").write_text("no program")
    (places / "folder").mkdir()
    words = ["", "é" * 30_000, "x" * 131_000, *(str(number) for number in range(4000)), "a\nb"]
    code = "import os, sys; sys.stdout.buffer.write('\\0'.join([*sys.argv[1:], os.environ['KEPT'], os.getcwd()]).encode())"
    search = f"/nowhere:{program}:{places}:{Path(sys.executable).parent}"

    def run(*argv: str, search: str = search) -> subprocess.CompletedProcess[bytes]:
        check_command(argv, {})
        file, line = write_arguments(tmp_path, argv, search)
        assert line == [RELAY_PATH, f"{FILES_PATH}/{file.name}"]
        return subprocess.run([program, file], capture_output=True, env={"KEPT": "yes"}, cwd="/usr", timeout=patience(20))

    for name in (Path(sys.executable).name, sys.executable):
        done = run(name, "-I", "-c", code, *words)
        assert done.stdout.decode().split("\0") == [*words, "yes", "/usr"], done.stderr
    assert run("sh", "-c", "exit 7", search="/usr/bin:/bin").returncode == 7
    assert [run(name, "x").returncode for name in ("none", "plain", "folder", "./none", str(places / "plain"))] == [
        127, 126, 126, 127, 126,
    ]  # fmt: skip
    assert run("true", search="/x:" * 500).returncode == 127
    assert subprocess.run([program, tmp_path / "no-file"], timeout=patience(20)).returncode == 125
    fits = ["x", *["y" * 131_071] * 7, *["z" * 20] * 5000][:4096]
    assert not run("true", *fits[1:], search="/usr/bin:/bin").returncode


@pytest.mark.parametrize(("argv", "env", "text"), [
    (["x" * 4096], {}, "the name of the program is too long: 4096 bytes, at most 4095"),
    (["é" * 2048], {}, "the name of the program is too long"),
    (["x", "y" * 131_072], {}, "an argument or variable is too long: 131072 bytes, at most 131071"),
    (["x"], {"A": "y" * 131_070}, "an argument or variable is too long"),
    (["x"], {"A": "y" * 70_000, "B": "y" * 70_000}, "the environment is too long"),
    (["x", *["y" * 100_000] * 11], {}, "arguments are too long"), (["x\0"], {}, "NUL"), (["\ud800"], {}, "Unicode"),
])  # fmt: skip
def test_what_the_kernel_takes_for_no_command(argv: list[str], env: dict[str, str], text: str) -> None:
    with pytest.raises(RuntimeFault, match=text):
        check_command(argv, env)


def _waits(pid: int) -> bool:
    """Whether process 1 is through with its preparations: it ignores SIGCHLD and sleeps."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return bool(int(fields["SigIgn"], 16) & 1 << (signal.SIGCHLD - 1)) and fields["State"].strip().startswith("S")


def test_programs_for_both_machines_are_elf_files_that_begin_behind_their_header() -> None:
    for machine, number in (("x86_64", 62), ("aarch64", 183)):
        for content in (init_program(machine), probe_program(machine), relay_program(machine)):
            assert content[:7] == b"\x7fELF\2\1\1"
            kind, found, _, entry = struct.unpack_from("<HHIQ", content, 16)
            assert (kind, found, entry) == (2, number, 0x400000 + 120)
            assert struct.unpack_from("<II", content, 64) == (1, 5)
            assert struct.unpack_from("<QQ", content, 96) == (len(content), len(content))
    assert not supported("pdp11")
    with pytest.raises(KeyError):
        init_program("pdp11")


def test_engines_that_will_not_do() -> None:
    from dataclasses import replace

    assert _unfit(FACTS) is None
    assert "too old" in str(_unfit(replace(FACTS, api="1.40")))
    assert _unfit(replace(FACTS, api="1.100")) is None
    assert "seccomp" in str(_unfit(replace(FACTS, seccomp=False)))
    assert "processes" in str(_unfit(replace(FACTS, pids_limit=False)))
    assert "podman" in replace(FACTS, podman=True).text


def test_the_oldest_api_that_both_speak() -> None:
    assert spoken_api({"ApiVersion": "1.41", "MinAPIVersion": "1.12"}) == "1.41"
    assert spoken_api({"ApiVersion": "1.52", "MinAPIVersion": "1.44"}) == "1.44"
    assert spoken_api({}) == "1.41"


def test_a_container_is_locked_down_whatever_is_asked_for() -> None:
    plan = Plan("image", "a" * 32, Path("/folder"), Limits(cpu_threads=64, mem_gib=0.001), mounts={"/data": "volume"})
    config = container_config(plan, FACTS)
    host = config["HostConfig"]
    assert (host["NetworkMode"], host["CapDrop"], host["Privileged"]) == ("none", ["ALL"], False)
    assert sorted(host["CapAdd"]) == ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "SETGID", "SETUID"]
    plain = container_config(plan, replace(FACTS, root_id=0))["HostConfig"]
    assert (plain["CapDrop"], plain["CapAdd"]) == (["ALL"], []), "there its users are those of this machine"
    assert host["SecurityOpt"][0] == "no-new-privileges"
    assert json.loads(host["SecurityOpt"][1].removeprefix("seccomp="))["defaultAction"] == "SCMP_ACT_ERRNO"
    assert host["Memory"] == host["MemorySwap"] == 6 << 20
    assert host["NanoCpus"] == 2_000_000_000
    assert config["Healthcheck"] == {"Test": ["NONE"]}
    assert {mount["Type"] for mount in host["Mounts"]} == {"bind", "volume"}


@pytest.mark.root
@pytest.mark.integration
def test_admin_on_an_engine(engine: LocalEngine, tmp_path: Path) -> None:
    async def body() -> None:
        admin = Admin(engine.socket)
        facts = await admin.facts()
        assert (facts.root_id > 0, facts.podman, facts.seccomp) == (True, False, True)
        tag = "golem-test/admin:latest"
        image_id = await admin.import_image(io.BytesIO(busybox_tar()), tag, ["USER 7", "CMD true"])
        found = await admin.inspect_image(tag)
        assert found is not None
        assert (found["Id"], found["Config"]["User"]) == (image_id, "7")
        assert await admin.inspect_image("golem-test/none") is None
        with pytest.raises(RuntimeFault, match="Docker Engine"):
            await admin.import_image(io.BytesIO(b"no tar at all" * 100), "golem-test/bad:latest")
        with pytest.raises(NoSuch):
            await admin.create_container("golem-test-x", {"Image": "golem-test/none"})
        container = await admin.create_container("golem-test-x", {"Image": tag, "Labels": {"golem-test": "1"}})
        try:
            with pytest.raises(InUse):
                await admin.create_container("golem-test-x", {"Image": tag})
            assert image_id in await admin.image_ids_in_use()
            assert [entry["Id"] for entry in await admin.containers("golem-test")] == [container]
            assert not await admin.remove_image(image_id)
        finally:
            await admin.remove_container("golem-test-x")
        await admin.remove_container("golem-test-x")
        assert await admin.inspect_container("golem-test-x") is None
        assert await admin.remove_image(tag)
        assert not await admin.remove_image(tag)

    trio.run(body)


@pytest.mark.root
@pytest.mark.integration
def test_pipes_of_who_was_left_are_held_and_no_others(engine: LocalEngine) -> None:
    image = import_image(engine, busybox_tar(), "golem-test/pipes:latest")
    client = sdk(engine)
    made = client.create_container(image, ["sleep", "1000"], host_config=client.create_host_config(network_mode="none"))
    client.start(made["Id"])
    try:
        first = int(client.inspect_container(made["Id"])["State"]["Pid"])
        pipes = LeftPipes(first)
        program = client.exec_create(made["Id"], ["sh", "-c", "sleep 1000 | cat & sleep 1001; true"], tty=False)["Id"]
        stream = client.exec_start(program, stream=True)
        del stream  # nobody reads, and the program runs on
        pids: list[int] = []
        for _ in range(500):
            top = client.top(made["Id"], "-o pid,args")["Processes"] or []
            pids = [int(row[0]) for row in top if int(row[0]) != first]
            if len(pids) == 4:
                break
        assert len(pids) == 4
        main = next(int(row[0]) for row in top if row[1].startswith("sh "))
        assert pipes.adopt(pids, [main]) == 0  # somebody listens to that program
        assert pipes.adopt(pids, []) == 2  # its two sides; not the pipe between two of them
        assert pipes.adopt(pids, []) == 0
        assert pipes.adopt([os.getpid()], []) == 0
        pipes.release()
        pipes.drain()
        assert len(pipes._held) == 2
        client.kill(made["Id"])
        client.wait(made["Id"])
        pipes.drain()
        assert pipes._held == {}
        pipes.close()
        assert left_pipes.MAX_PIPES > 0
    finally:
        client.remove_container(made["Id"], force=True)
        client.close()
