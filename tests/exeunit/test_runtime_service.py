"""A runtime that is a service: its messages against Google's own codec, and services that keep to the protocol or do not."""

from __future__ import annotations

import os
import random
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import trio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from worlds.patience import within
from worlds.support import trio_test

from golem.exeunit.runtime import Deployment, DeployOptions, Limits, RuntimeFault
from golem.exeunit.runtimes.plugin import api
from golem.exeunit.runtimes.plugin.descriptors import Descriptor
from golem.exeunit.runtimes.plugin.runtime import ExternalRuntime, ExternalSettings

U64, I32, DOUBLE, BOOL, TEXT, BYTES, MESSAGE = 4, 5, 1, 8, 9, 12, 11


def google() -> dict[str, Any]:
    """The protocol as Google's library has it."""
    file = descriptor_pb2.FileDescriptorProto(name="runtime.proto", package="t", syntax="proto3")

    def message(title: str, /, **fields: tuple[int, Any]) -> None:
        made = file.message_type.add(name=title)
        for field, (tag, kind) in fields.items():
            kind, label = (kind[0], 3) if isinstance(kind, list) else (kind, 1)
            one = made.field.add(name=field, number=tag, label=label, type=MESSAGE if isinstance(kind, str) else kind)
            if isinstance(kind, str):
                one.type_name = f".t.{kind}"

    message("Hello", version=(1, TEXT))
    message("Run", bin=(1, TEXT), args=(2, [TEXT]), work_dir=(3, TEXT))
    message("Kill", pid=(1, U64), signal=(2, I32))
    message("Nothing")
    message("Request", id=(1, U64), hello=(2, "Hello"), run=(10, "Run"), kill=(11, "Kill"), shutdown=(12, "Nothing"))
    message("Error", code=(1, I32), message=(2, TEXT))
    message("Pid", pid=(1, U64))
    message("Status", pid=(1, U64), running=(2, BOOL), return_code=(3, I32), stdout=(4, BYTES), stderr=(5, BYTES))
    message("State", name=(1, TEXT), value=(2, BYTES))
    message("Counter", name=(1, TEXT), value=(2, DOUBLE))
    message("Claim", state=(1, "State"), counter=(2, "Counter"))
    message("Response", event=(1, BOOL), id=(2, U64), error=(3, "Error"), hello=(4, "Hello"), run=(10, "Pid"),
            kill=(11, "Nothing"), shutdown=(12, "Nothing"), status=(20, "Status"),
            rt_status=(21, "Claim"), later=(99, TEXT))  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = ("Request", "Response")
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{name}")) for name in names}


PB = google()


def one_frame(data: bytes) -> bytes:
    (frame,) = api.Frames().feed(data)
    return frame


def test_requests_are_what_google_reads() -> None:
    found = PB["Request"].FromString(one_frame(api.hello(1, "0.1.0")))
    assert (found.id, found.hello.version) == (1, "0.1.0")
    found = PB["Request"].FromString(one_frame(api.run(2**40, "bin/ä", ["ä", "", "-x" * 5000])))
    assert (found.id, found.run.bin, list(found.run.args)) == (2**40, "bin/ä", ["ä", "", "-x" * 5000])
    found = PB["Request"].FromString(one_frame(api.kill(3, 2**63, 9)))
    assert (found.kill.pid, found.kill.signal) == (2**63, 9)
    found = PB["Request"].FromString(one_frame(api.shutdown(4)))
    assert found.HasField("shutdown")


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        ({"error": {"code": 1, "message": "no"}}, api.ServiceFailed(1, "no")),
        ({"hello": {"version": "0.1.0"}}, api.Hello("0.1.0")),
        ({"run": {"pid": 2**64 - 1}}, api.Started(2**64 - 1)),
        ({"run": {}}, api.Started(0)),
        ({"kill": {}}, api.ServiceDone()),
        ({"shutdown": {}}, api.ServiceDone()),
        ({"status": {"pid": 7, "running": True, "stdout": b"\0\xff"}}, api.Status(7, True, 0, b"\0\xff", b"")),
        ({"status": {"pid": 7, "return_code": -9, "stderr": b"e"}}, api.Status(7, False, -9, b"", b"e")),
        ({"rt_status": {"counter": {"name": "c", "value": 1.5}}}, api.ServiceClaim("c", 1.5)),
        ({"rt_status": {"state": {"name": "s", "value": b"v"}}}, api.ServiceClaim("s", b"v")),
        ({"later": "of a newer version"}, None),
        ({}, None),
    ],
)
def test_responses_are_read_as_google_wrote_them(fields: dict[str, Any], body: Any) -> None:
    written = PB["Response"](event=True, id=300, **fields).SerializeToString()
    assert api.read_response(written) == api.Response(True, 300, body)
    data = api.varint(len(written)) + written
    frames = api.Frames()
    found = [frame for n in range(len(data)) for frame in frames.feed(data[n : n + 1])]
    assert found == [written], "byte by byte as well"
    assert list(api.Frames().feed(data * 3)) == [written] * 3


def test_nonsense_is_refused_and_never_anything_worse() -> None:
    with pytest.raises(api.ProtocolFault, match="at most"):
        list(api.Frames().feed(api.varint(api.MAX_FRAME_BYTES + 1)))
    with pytest.raises(api.ProtocolFault, match="64 bits"):
        list(api.Frames().feed(b"\xff" * 10 + b"\1"))
    rng = random.Random(5)
    seeds = [
        PB["Response"](id=1, **fields).SerializeToString()
        for fields in ({"status": {"pid": 1, "stdout": b"x" * 40}}, {"error": {"code": 1, "message": "no"}})
    ]
    refused = 0
    for _ in range(20000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            api.read_response(bytes(data))
        except api.ProtocolFault:
            refused += 1
    assert refused > 1000


# -- services
_PRELUDE = """
    import json, os, signal, subprocess, sys, threading, time
    sys.path[:0] = {paths!r}
    from test_runtime_service import PB, api
    args = sys.argv[1:]
    words = args[:args.index("--")]
    if "deploy" in words:
        print(json.dumps({{"valid": {{"Ok": ""}}, "startMode": "blocking"}}))
        sys.exit()
    out, frames, asked = sys.stdout.buffer, api.Frames(), []
    def ask():
        while not asked:
            data = os.read(0, 65536)
            if not data:
                sys.exit(0)
            asked.extend(PB["Request"].FromString(one) for one in frames.feed(data))
        return asked.pop(0)
    lock = threading.Lock()
    def say(**fields):
        data = PB["Response"](**fields).SerializeToString()
        with lock:
            os.write(1, api.varint(len(data)) + data)
    def greet():
        request = ask()
        assert request.hello.version == "0.1.0", request
        say(id=request.id, hello={{"version": "0.1.0"}})
"""
GOOD = """
    greet()
    serial = 0
    running = {}
    def follow(pid, process):
        while data := process.stdout.read1(65536):
            say(event=True, status={"pid": pid, "running": True, "stdout": data})
        say(event=True, status={"pid": pid, "return_code": process.wait()})
    while True:
        request = ask()
        if request.HasField("run"):
            serial += 1
            try:
                argv = [request.run.bin, *request.run.args[1:]]
                process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            except OSError as error:
                say(id=request.id, error={"code": 1, "message": str(error)})
                continue
            running[serial] = process
            say(event=True, rt_status={"counter": {"name": "golem.usage.cpu_sec", "value": 0.0}})
            say(id=request.id, run={"pid": serial})
            threading.Thread(target=follow, args=(serial, process), daemon=True).start()
        elif request.HasField("kill"):
            running[request.kill.pid].send_signal(request.kill.signal)
            say(id=request.id, kill={})
        elif request.HasField("shutdown"):
            say(id=request.id, shutdown={})
            sys.exit(0)
"""


async def deployed(tmp_path: Path, body: str, **limits: Any) -> tuple[ExternalRuntime, Deployment]:
    tests = Path(__file__).resolve().parent
    paths = [str(tests), str(tests.parent), str(tests.parents[1])]
    path = tmp_path / "service"
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(_PRELUDE.format(paths=paths)) + textwrap.dedent(body))
    path.chmod(0o755)
    one = Descriptor(tmp_path / "ya-s.json", "service", "1.0", "exe-unit", path)
    runtime = ExternalRuntime(one, ExternalSettings(start_s=10.0))
    (tmp_path / "work").mkdir()
    options = DeployOptions(tmp_path / "work", Limits(storage_gib=0.1, **limits))
    return runtime, await runtime.deploy(Path(os.devnull), options)


class Said:
    def __init__(self) -> None:
        self.text = {"stdout": b"", "stderr": b""}

    async def __call__(self, side: str, chunk: bytes) -> None:
        self.text[side] += chunk


@trio_test
async def test_commands_of_a_service(tmp_path: Path) -> None:
    runtime, deployment = await deployed(tmp_path, GOOD, run_time_s=3.0, output_bytes=2_000_000)
    assert deployment.start_mode == "blocking"
    with pytest.raises(RuntimeFault, match="not started"):
        await runtime.run("/bin/true", [], Said())
    await runtime.start([])
    said = Said()
    assert (await runtime.run("/bin/sh", ["-c", "echo $0 $1; exit 7", "a", "b"], said)).code == 7
    assert said.text["stdout"] == b"a b\n"
    assert (await runtime.run("/bin/sh", ["-c", "kill -9 $$"], Said())).code == 255
    with pytest.raises(RuntimeFault, match=r"refused: .*No such file"):
        await runtime.run("/bin/no-such-thing", [], Said())
    said = Said()
    assert (await runtime.run("/bin/sh", ["-c", "yes | head -c 1000000"], said)).ok
    assert len(said.text["stdout"]) == 1_000_000
    status = await runtime.run("/bin/sh", ["-c", "exec yes"], Said())
    assert (status.code, status.reason) == (137, "output limit of 2000000 bytes reached")
    status = await runtime.run("/bin/sleep", ["60"], Said())
    assert (status.code, status.reason) == (137, "time limit of 3 s reached")
    with trio.move_on_after(0.3) as scope:
        await runtime.run("/bin/sleep", ["60"], Said())
    assert scope.cancelled_caught
    assert (await runtime.run("/bin/true", [], Said())).ok, "the service lives on"
    used = runtime.usage()
    assert used.cpu_sec > 0.05
    assert used.gib > 0.001
    with within(5):
        await runtime.stop()
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit(3)", "has ended"),
        ("time.sleep(60)", "did not answer"),
        ("os.write(1, b'Hello, I am a service\\n' * 1000); time.sleep(60)", "does not keep to the protocol"),
        ("say(id=ask().id, error={'code': 2, 'message': 'not today'}); time.sleep(60)", "refused: not today"),
        ("say(id=ask().id, run={'pid': 1}); time.sleep(60)", "answered hello with Started"),
        ("say(id=99, hello={'version': '1'}); time.sleep(60)", "did not answer"),
    ],
)
@trio_test
async def test_services_that_do_not_start(tmp_path: Path, body: str, reason: str) -> None:
    runtime, _ = await deployed(tmp_path, body)
    runtime._settings = ExternalSettings(start_s=1.5 if reason == "did not answer" else 15.0)
    with pytest.raises(RuntimeFault, match=reason):
        await runtime.start([])
    await runtime.stop()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("greet(); ask(); sys.exit(3)", "has ended"),
        ("greet(); say(id=ask().id, run={'pid': 1}); time.sleep(0.2); os.kill(os.getpid(), 9)", "has ended"),
        ("greet(); say(id=ask().id, run={'pid': 1}); os.write(1, b'\\xff' * 20); time.sleep(60)", "not keep to the protocol"),
        ("greet(); request = ask()\nwhile True: say(event=True, status={'pid': 5})", "does not keep to the protocol"),
    ],
)
@trio_test
async def test_a_service_that_is_lost_fails_the_command_and_the_activity(tmp_path: Path, body: str, reason: str) -> None:
    runtime, _ = await deployed(tmp_path, body)
    await runtime.start([])
    with within(5):
        with pytest.raises(RuntimeFault, match=reason):
            await runtime.run("x", [], Said())
        assert reason in await runtime.failure()
    await runtime.stop()


@trio_test
async def test_a_service_that_does_not_end_a_command_is_ended_itself(tmp_path: Path) -> None:
    runtime, _ = await deployed(tmp_path, "greet(); say(id=ask().id, run={'pid': 1}); time.sleep(60)", run_time_s=0.3)
    await runtime.start([])
    with within(4):
        assert (await runtime.run("x", [], Said())).reason == "time limit of 0.3 s reached"
        assert "did not end a command" in await runtime.failure()
    await runtime.stop()
