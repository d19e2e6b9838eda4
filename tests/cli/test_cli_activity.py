"""`golem activity` against two real nodes and an activity whose guest is this machine; shells under real pseudo-terminals."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from msgspec.structs import replace
from rich.console import Console
from worlds.hand_world import HandWorld, hand_world
from worlds.patience import within
from worlds.support import trio_test

from actors.activity.rows import ActivityRow
from actors.negotiation.rows import AgreementRow
from golem.cli.output import fail, printable, table, value
from golem.cli.terminal import Escapes, ProgramLost, _Program
from golem.cli.watch import Watcher, describe
from golem.control.activity import _form
from golem.node.node import Node

GOLEM = [sys.executable, "-m", "golem.cli"]


def command(node: Node, *words: str) -> list[str]:
    return [*GOLEM, "--data-dir", str(node.config.data_dir), "activity", *words]


async def golem(node: Node, *words: str, stdin: bytes | None = b"", as_json: bool = False) -> Any:
    """Run a command to its end; returns its process with output, JSON where it was asked for."""
    line = command(node, *words)
    if as_json:
        line.insert(3, "--json")
    with within(30):
        ended = await trio.run_process(line, stdin=stdin, capture_stdout=True, capture_stderr=True, check=False)
    if as_json:
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)
    return ended


def test_escapes() -> None:
    escapes = Escapes()
    assert escapes.feed(b"ls ~.\r") == (b"ls ~.\r", False)
    assert escapes.feed(b"~") == (b"", False)
    assert escapes.feed(b"~x\n~y") == (b"~x\n~y", False)
    assert escapes.feed(b"\r~.rest") == (b"\r", True)
    assert Escapes().feed(b"~.") == (b"", True)


def test_what_strangers_say_is_not_for_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07b\r\n\tc\x9b") == "a\ufffd]0;title\ufffdb\ufffd\n\tc\ufffd"
    assert describe({"run": {"entry_point": "/bin/sh", "args": ["-c", "a\nb"]}}) == "run /bin/sh -c a b"
    assert describe({"transfer": {"from": "x", "to": "y"}}) == "transfer x -> y"
    assert describe({"deploy": {}}) == "deploy"


def test_messages_of_strangers_are_not_for_the_terminal_either(capsys: pytest.CaptureFixture[str]) -> None:
    bad = "[/b]\x1b]0;title\x07[red]\x9b"
    console = Console(file=io.StringIO(), force_terminal=True, highlight=False, color_system=None)
    watcher = Watcher(console, plain=True)
    watcher.state("Ready", bad, bad, bad)
    watcher.tell({"batch": "1", "index": 0, "kind": {"progress": {"progress": [1, 2], "message": bad}}})
    watcher.tell({"batch": "1", "index": 0, "kind": {"finished": {"return_code": 1, "message": bad}}})
    table(["name"], [[bad]], note=bad)
    value({"reason": bad, "all": [bad]})
    value(bad)
    said = console.file.getvalue() + capsys.readouterr().out + fail(bad).message  # type: ignore[attr-defined]
    assert said.count("[/b]\ufffd]0;title\ufffd[red]\ufffd") == 11
    assert not {"\x1b", "\x07", "\x9b"} & set(said)
    assert len(describe({"run": {"entry_point": "x" * 1000}})) == 160


class Says:
    """A node's websocket that says one thing."""

    def __init__(self, message: dict[str, Any]) -> None:
        self._message = message

    async def get_message(self) -> str:
        return json.dumps(self._message)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_end_of_a_program_is_told_without_commands_to_the_terminal(
    terminal: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "gone\x1b]0;title\x07\x9b2J"
    program = _Program(Says({"exit": 3, "reason": bad}), terminal, stdin=False)  # type: ignore[arg-type]
    trio.run(program._output)
    assert program.status == 3
    assert capsys.readouterr().err == "gone\ufffd]0;title\ufffd\ufffd2J" + ("\r\n" if terminal else "\n")
    program = _Program(Says({"error": bad}), terminal, stdin=False)  # type: ignore[arg-type]
    trio.run(program._output)
    assert ProgramLost(program.problem or "").message == "gone\ufffd]0;title\ufffd\ufffd2J"


@pytest.mark.integration
@trio_test
async def test_what_there_is(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w:
        [row] = await golem(w.r, "list", as_json=True)
        assert list(row) == ["id", "role", "state", "runtime", "age", "usage", "cost", "peer"]
        assert (row["id"], row["role"], row["state"], row["runtime"]) == (w.activity_id, "Requestor", "Ready", "host")
        assert row["peer"] == w.p.node_id
        assert b"Provider" in (await golem(w.p, "list")).stdout
        shown = await golem(w.r, "show", w.activity_id[:3], as_json=True)
        assert [batch["commands"] for batch in shown["batches"]] == [2]
        for _ in range(6):
            await w.execute({"run": {"entry_point": "/bin/true", "args": []}})
        shown = await golem(w.r, "show", w.activity_id, as_json=True)
        assert [batch["id"] for batch in shown["batches"]] == w.batches, "in the order in which they were sent"
        assert [batch["begun"] for batch in shown["batches"]] == sorted(batch["begun"] for batch in shown["batches"])
        refused = await golem(w.r, "show", "2")
        assert (refused.returncode, b"no activity '2'" in refused.stderr) == (1, True)
        refused = await golem(w.p, "destroy", "1")
        assert (refused.returncode, b"only the requestor" in refused.stderr) == (1, True)

        async def agent() -> None:
            await w.until(lambda: len(w.p.system.feeds.read("activities")) == 2)
            assert w.unit is not None
            w.unit.end("destroyed")

        w.nursery.start_soon(agent)
        ended = await golem(w.r, "destroy", "1")
        assert (ended.returncode, ended.stdout) == (0, f"Activity {w.activity_id} is ended.\n".encode()), ended.stderr
        assert await golem(w.r, "list", as_json=True) == []
        assert len(await golem(w.r, "list", "--all", as_json=True)) == 1
        counts = await golem(w.r, "status", as_json=True)
        assert counts["last1h"] == counts["total"] == {"Terminated": 1}
        assert counts["lastActivityTs"].endswith("Z")
        refused = await golem(w.r, "exec", "1", "--", "ls")
        assert (refused.returncode, b"has ended" in refused.stderr) == (255, True)


@pytest.mark.integration
@trio_test
async def test_exec(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w:
        ended = await golem(w.r, "exec", "1", "--env", "A=b c", "--", "sh", "-c", 'echo "$A"; echo oops >&2; exit 9')
        assert (ended.returncode, ended.stdout, ended.stderr) == (9, b"b c\n", b"oops\n")
        data = os.urandom(1 << 20)
        ended = await golem(w.r, "exec", "-i", "1", "--", "cat", stdin=data)
        assert (ended.returncode, ended.stdout == data) == (0, True)
        ended = await golem(w.r, "exec", "1", "--", "cat", stdin=data)  # without -i there is no input
        assert (ended.returncode, ended.stdout) == (0, b"")
        source = tmp_path / "source"
        source.write_bytes(data)
        with source.open("rb") as file:
            ended = await trio.run_process(command(w.r, "shell", "1", "--", "wc", "-c"), stdin=file, capture_stdout=True)
        assert ended.stdout.strip() == b"1048576"
        ended = await golem(w.r, "exec", "1", "--", "/none/such")
        assert (ended.returncode, b"cannot run /none/such" in ended.stderr) == (255, True)
        ended = await golem(w.r, "exec", "1", "--", "sh", "-c", "kill -9 $$")
        assert ended.returncode == 137
        for bad in (("exec", "1"), ("exec", "1", "-e", "A", "--", "ls")):
            assert (await golem(w.r, *bad)).returncode in (1, 2)


@pytest.mark.integration
@trio_test
async def test_ctrl_c_kills_what_exec_runs_even_while_it_reads_nothing(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w:
        for more in ((), ("-i",)):
            process = await trio.lowlevel.open_process(
                command(w.r, "exec", "1", *more, "--", "sh", "-c", "echo up; exec sleep 1000"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            with within(20):
                assert await process.stdout.receive_some() == b"up\n"
                with trio.move_on_after(0.3):
                    await process.stdin.send_all(bytes(4 << 20))  # as much as anybody takes
                process.send_signal(signal.SIGINT)
                assert await process.wait() == 130
                await w.runtime.terminals[-1].process.wait()
            await process.stdin.aclose()
            await process.stdout.aclose()


@pytest.mark.integration
@trio_test
async def test_a_reader_that_pauses_holds_the_program_and_nothing_else(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w:
        process = await trio.lowlevel.open_process(
            command(w.r, "exec", "1", "--", "head", "-c", "20000000", "/dev/zero"), stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        with within(30):
            assert (await process.stdout.receive_some(1)) == b"\0"
            await trio.sleep(0.5)
            assert w.runtime.terminals[-1].process.poll() is None  # it waits
            size = 1
            while data := await process.stdout.receive_some():
                size += len(data)
            assert (size, await process.wait()) == (20_000_000, 0)
        await process.stdout.aclose()


@pytest.mark.integration
@trio_test
async def test_nobody_reads_the_output(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w:
        line = " ".join(command(w.r, "exec", "1", "--", "yes"))
        with within(20):
            ended = await trio.run_process(["sh", "-c", f"{line} | head -2"], capture_stdout=True)
        assert ended.stdout == b"y\ny\n"
        with within(10):
            await w.runtime.terminals[-1].process.wait()


class Screen:
    """A terminal emulator with nothing to see: a command runs in it, under a real pseudo-terminal."""

    def __init__(self, process: trio.Process, master: int, slave: int) -> None:
        self.process, self.master, self.slave = process, master, slave
        self._stream = trio.lowlevel.FdStream(os.dup(master))
        self.seen = b""

    async def type(self, text: bytes) -> None:
        await self._stream.send_all(text)

    async def until(self, text: bytes) -> None:
        with within(20):
            while text not in self.seen:
                self.seen += await self._stream.receive_some()
        self.seen = self.seen.partition(text)[2]

    async def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        self.process.send_signal(signal.SIGWINCH)

    def settings(self) -> Any:
        return termios.tcgetattr(self.slave)


@asynccontextmanager
async def screen(world: HandWorld, *words: str, rows: int = 37, cols: int = 97) -> AsyncIterator[Screen]:
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
    before = termios.tcgetattr(slave)
    process = await trio.lowlevel.open_process(
        command(world.r, *words), stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    made = Screen(process, master, slave)
    try:
        yield made
        assert made.settings() == before  # as it was, however it ended
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()
            await made._stream.aclose()
        os.close(master)
        os.close(slave)


@pytest.mark.integration
@trio_test
async def test_a_shell_at_a_terminal(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w:
        async with screen(w, "shell", "1") as s:
            await s.until(b"guest$ ")
            assert not s.settings()[3] & termios.ECHO  # raw: the program echoes
            await s.type(b"stty size; echo T=$TERM\n")
            await s.until(b"37 97")
            await s.until(b"T=dumb")
            await s.resize(22, 55)
            await s.type(b"until [ \"$(stty size)\" = '22 55' ]; do :; done; echo resi''zed\n")
            await s.until(b"resized")
            await s.type(b"trap 'echo 4$((1+1))!; stop=1' INT; echo 1$((1+1))!; until [ $stop ]; do :; done\n")
            await s.until(b"12!")
            await s.type(b"\x03")
            await s.until(b"42!")
            await s.type(b"exit 6\n")
            with within(10):
                assert await s.process.wait() == 6
        async with screen(w, "shell", "1") as s:
            await s.until(b"guest$ ")
            await s.type(b"\r~.")
            await s.until(b"Hung up.")
            with within(10):
                await s.process.wait()
                await w.runtime.terminals[-1].process.wait()
        async with screen(w, "shell", "1", "--", "sh", "-c", "echo on; sleep 1000") as s:
            await s.until(b"on\r\n")
            s.process.terminate()
            with within(10):
                assert await s.process.wait() == 128 + signal.SIGTERM
                await w.runtime.terminals[-1].process.wait()
        async with screen(w, "shell", "1", "--", "sh", "-c", "echo on; sleep 1000") as s:
            await s.until(b"on\r\n")
            await w.destroy()
            await s.until(b"the activity has ended")
            with within(10):
                assert await s.process.wait() == 255


@pytest.mark.integration
@trio_test
async def test_watch(tmp_path: Path) -> None:
    async with hand_world(tmp_path) as w:
        for node in (w.r, w.p):
            process = await trio.lowlevel.open_process(command(node, "watch", "1"), stdout=subprocess.PIPE)
            assert process.stdout is not None
            seen = b""
            with within(20):
                while b"ok start" not in seen:
                    seen += await process.stdout.receive_some()
            if node is w.p:
                break
            process.kill()
            await process.wait()
            await process.stdout.aclose()
        assert b"deploy: " in seen  # progress, though the script did not ask for it
        capture = {"stdout": {"stream": {}}}
        await w.execute({"run": {"entry_point": "printf", "args": ["\\033[31mred"], "capture": capture}})
        with within(20):
            while b"ok run printf" not in seen:
                seen += await process.stdout.receive_some()
            assert "\ufffd[31mred".encode() in seen
            await w.execute({"run": {"entry_point": "false"}})
            while b"failed run false: ExeScript command exited with code 1" not in seen:
                seen += await process.stdout.receive_some()
            await w.destroy()
            while data := await process.stdout.receive_some():
                seen += data
            assert await process.wait() == 0
        assert b"Terminated - destroyed" in seen
        await process.stdout.aclose()
        lines = (await golem(w.r, "watch", "1")).stdout
        assert b"Terminated - destroyed" in lines


def test_usage_is_named_and_priced_as_the_agreement_says() -> None:
    counters = ["golem.usage.duration_sec", "golem.usage.cpu_sec"]
    offer = {"golem": {"com": {"usage": {"vector": counters}, "pricing": {"model": {"linear": {"coeffs": [0.1, 2, 1]}}}}}}
    signed = AgreementRow(
        "e" * 64, "Requestor", "0xr", "0xp", "", "", "", json.dumps({"offer": {"properties": offer}}).encode(), "Approved", 0, 0
    )
    rows = {"negotiation": {f"agreement/{'e' * 64}": signed}, "activity": {}}
    node: Any = SimpleNamespace(system=SimpleNamespace(rows=rows.__getitem__), clock=lambda: 100.0)
    row = ActivityRow("1" * 32, "e" * 64, "Requestor", "0xr", "0xp", 40.0, "Ready", usage=[20.0, 0.5])
    form = _form(node, row)
    assert form["usage"] == {"golem.usage.duration_sec": 20.0, "golem.usage.cpu_sec": 0.5}
    assert (form["cost"], form["age_s"], form["peer"]) == ("4", 60.0, "0xp")
    assert _form(node, replace(row, usage=[1.0]))["cost"] is None  # not what was agreed
    assert _form(node, replace(row, agreement_id="f" * 64))["usage"] == {"0": 20.0, "1": 0.5}
