"""A hand inside an activity: two nodes' buses and an exe-unit's end, over real pseudo-terminals and TCP of this machine."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from worlds.host_runtime import HostRuntime
from worlds.patience import within
from worlds.support import trio_test
from worlds.wire import A, B, Node, two_nodes

from actors.activity.rows import ActivityRow
from golem.bus.client import BusClient, open_stream
from golem.exeunit.__main__ import offer_template
from golem.exeunit.interaction import MAX_STREAMS, UnitInteractions, allowed_interactions
from golem.exeunit.live import LiveLog
from golem.exeunit.runtime import Interaction
from golem.exeunit.runtimes import make_runtime
from golem.interaction.broker import DIALLING_EACH, Exit, Interactions, Output, Taken, TerminalClient
from golem.interaction.wire import Channel
from protocol.codec import length_prefixed
from protocol.interaction import BACK, STREAM, WINDOW_BYTES, InteractionFault, OpenTerminal

ACTIVITY = "1" * 32
PROVIDER, REQUESTOR = A, B


def row(role: str, state: str = "Ready") -> ActivityRow:
    return ActivityRow(ACTIVITY, "a" * 64, role, REQUESTOR, PROVIDER, 0.0, state)


@dataclass
class Hand:
    """Both nodes and the exe-unit's end."""

    requestor: Interactions
    provider_node: Node
    requestor_node: Node
    runtime: HostRuntime
    unit: UnitInteractions
    rows: dict[str, ActivityRow]
    nursery: trio.Nursery
    state: str = "Ready"
    tmp_path: Path = Path()
    dialled: int = 0

    async def terminal(self, *argv: str, **options: Any) -> TerminalClient:
        return await self.requestor.open_terminal(row("Requestor"), OpenTerminal(list(argv), **options))

    async def refused(self, *argv: str) -> InteractionFault:
        with pytest.raises(InteractionFault) as caught:
            await self.terminal(*argv)
        return caught.value


@asynccontextmanager
async def hand(
    tmp_path: Path, allowed: str | None = None, interactions: Sequence[Interaction] = ("shell", "proxy-http")
) -> AsyncIterator[Hand]:
    with within(20):
        async with two_nodes(tmp_path) as (provider, requestor, nursery):
            rows = {ACTIVITY: row("Provider")}
            Interactions(PROVIDER, provider.router, rows.get)
            runtime = HostRuntime(nursery, interactions)

            async def on_call(sender: str, target: str, payload: bytes) -> bytes:
                made.dialled += 1
                match msgspec.msgpack.decode(payload):
                    case ["dial", token]:
                        return msgspec.msgpack.encode(made.unit.call(nursery, token))
                raise AssertionError

            client = BusClient(tmp_path / "a.sock", f"exeunit:{ACTIVITY}", "exeunit", on_call=on_call)
            unit = UnitInteractions(
                ACTIVITY, runtime, allowed_interactions(allowed, runtime), lambda: made.state,
                lambda: client.open_stream("", BACK), lambda: runtime.ports,
            )  # fmt: skip
            made = Hand(
                Interactions(REQUESTOR, requestor.router, {}.get), provider, requestor, runtime, unit, rows, nursery,
                tmp_path=tmp_path,
            )  # fmt: skip
            await nursery.start(client.run)
            yield made
            await runtime.stop()


async def collect(terminal: TerminalClient) -> tuple[bytes, bytes, Exit]:
    """Read to the end; returns both sides and the end."""
    sides = {1: b"", 2: b""}
    while True:
        match await terminal.receive():
            case Output(side, data):
                sides[side] += data
                await terminal.taken(len(data))
            case Exit() as end:
                return sides[1], sides[2], end


async def wait_for(terminal: TerminalClient, text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        match await terminal.receive():
            case Output(_, data):
                seen += data
                await terminal.taken(len(data))
            case Exit():
                raise AssertionError(seen)
    return seen


async def flood(terminal: TerminalClient) -> None:
    for _ in range(100):
        await terminal._channel.write("input", bytes(32 << 10))
    while True:
        await terminal.receive()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@trio_test
async def test_a_program_its_sides_and_its_status(tmp_path: Path) -> None:
    async with hand(tmp_path) as h:
        terminal = await h.terminal("sh", "-c", 'cat; echo "$WHO" >&2; exit 7', env={"WHO": "me"})
        await terminal.send(b"all\0 bytes\xff")
        await terminal.end_input()
        assert await collect(terminal) == (b"all\0 bytes\xff", b"me\n", Exit(7, None))
        await terminal.aclose()
        with pytest.raises(InteractionFault, match="cannot run /none/such"):
            await h.terminal("/none/such")
        terminal = await h.terminal("sh", "-c", "kill -9 $$")
        assert (await collect(terminal))[2].code == 137
        await terminal.aclose()


@trio_test
async def test_a_shell_with_a_window_that_changes_and_ctrl_c(tmp_path: Path) -> None:
    async with hand(tmp_path) as h:
        terminal = await h.terminal(tty=True, rows=33, cols=77)
        await terminal.send(b"stty size; tty\n")
        assert b"33 77" in await wait_for(terminal, b"/dev/pts")
        await terminal.resize(44, 99)
        await terminal.send(b"until [ \"$(stty size)\" = '44 99' ]; do :; done; echo resi''zed\n")
        await wait_for(terminal, b"resized")
        await terminal.send(b"trap 'echo 4$((1+1))!; stop=1' INT; echo 1$((1+1))!; until [ $stop ]; do :; done\n")
        await wait_for(terminal, b"12!")
        await terminal.send(b"\x03")
        await wait_for(terminal, b"42!")
        with pytest.raises(InteractionFault, match="rows and columns"):
            await terminal.resize(0, 80)
        await terminal.send(b"exit 5\n")
        assert (await collect(terminal))[2] == Exit(5, None)
        await terminal.aclose()


@trio_test
async def test_more_than_fits_any_buffer_goes_both_ways(tmp_path: Path) -> None:
    async with hand(tmp_path) as h:
        terminal = await h.terminal("cat")
        data = os.urandom(3 * WINDOW_BYTES)
        taken = 0
        got = bytearray()

        async def write() -> None:
            await terminal.send(data)
            await terminal.end_input()

        h.nursery.start_soon(write)
        while not isinstance(event := await terminal.receive(), Exit):
            if isinstance(event, Taken):
                taken += event.size
            else:
                got += event.data
                await terminal.taken(len(event.data))
        assert (bytes(got) == data, taken, event.code) == (True, len(data), 0)
        await terminal.aclose()


@trio_test
async def test_hanging_up_kills_at_once_even_a_program_that_does_not_read(tmp_path: Path) -> None:
    async with hand(tmp_path) as h:
        terminal = await h.terminal("sleep", "1000")

        async def send() -> None:
            with pytest.raises(InteractionFault):
                await terminal.send(bytes(10 * WINDOW_BYTES))

        h.nursery.start_soon(send)
        while terminal._untaken < WINDOW_BYTES:
            await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert terminal._untaken == WINDOW_BYTES  # it stops at the window, it does not swallow memory
        pid = h.runtime.terminals[0].process.pid
        assert alive(pid)
        await terminal.aclose()
        while alive(pid):
            await trio.sleep(0.01)


@trio_test
async def test_output_waits_for_its_reader_and_not_on_the_way(tmp_path: Path) -> None:
    async with hand(tmp_path) as h:
        terminal = await h.terminal("yes")
        got, quiet = 0, False
        while not quiet:
            with trio.move_on_after(0.3 if got > WINDOW_BYTES // 2 else math.inf) as scope:
                event = await terminal.receive()
                assert isinstance(event, Output)
                got += len(event.data)
            quiet = scope.cancelled_caught
        assert got <= WINDOW_BYTES
        await terminal.taken(got)
        await terminal.receive()
        await terminal.aclose()  # it is seen, though the program is held
        while alive(h.runtime.terminals[0].process.pid):
            await trio.sleep(0.01)


@trio_test
async def test_who_ignores_the_window_is_cut_off(tmp_path: Path) -> None:
    async with hand(tmp_path) as h:
        terminal = await h.terminal("sleep", "1000")
        with pytest.raises(InteractionFault, match=r"of input on the way|broke") as caught:
            await flood(terminal)
        assert caught.value.code in ("bad_request", "lost")
        await terminal.aclose()
        while alive(h.runtime.terminals[0].process.pid):
            await trio.sleep(0.01)
        for nonsense in (["input", "text"], ["resize", -1, 5], ["dance"], ["input", b""]):
            terminal = await h.terminal("sleep", "1000")
            await terminal._channel.write(*nonsense)
            with pytest.raises(InteractionFault):
                await terminal.receive()
            await terminal.aclose()


@trio_test
async def test_what_is_refused_says_why(tmp_path: Path) -> None:
    async with hand(tmp_path) as h:
        h.state = "Deployed"
        fault = await h.refused("ls")
        assert (fault.code, "not started: it is deployed" in str(fault)) == ("conflict", True)
        h.state = "Ready"
        fault = await h.refused("a\0b")
        assert (fault.code, str(fault)) == ("refused", "an argument holds a NUL byte")
        fault = await h.refused(*["x" * 1000] * 400)
        assert "out of bounds" in str(fault) or fault.code == "lost"
        open_one = await h.terminal("sleep", "1000")
        h.unit.end("the activity has ended: destroyed")
        with pytest.raises(InteractionFault, match="the activity has ended: destroyed") as caught:
            await open_one.receive()
        assert caught.value.code == "gone"
        fault = await h.refused("ls")
        assert (fault.code, str(fault)) == ("gone", "the activity has ended: destroyed")
        h.rows[ACTIVITY] = row("Provider", "Terminated")
        assert (await h.refused("ls")).code == "gone"
        with pytest.raises(InteractionFault, match="has ended"):
            await h.requestor.open_terminal(row("Requestor", "Terminated"), OpenTerminal(["ls"]))


@trio_test
async def test_a_provider_that_allows_nothing_and_a_runtime_that_has_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    async with hand(tmp_path / "a", allowed="proxy-http") as h:
        fault = await h.refused("ls")
        assert (fault.code, str(fault)) == ("forbidden", "the provider does not allow shells")
    (tmp_path / "b").mkdir()
    async with hand(tmp_path / "b", allowed="", interactions=("proxy-http",)) as h:
        fault = await h.refused("ls")
        assert (fault.code, str(fault)) == ("unsupported", "runtime host has no shell")
        with pytest.raises(InteractionFault, match=r"the provider does not allow connections to services \(proxy-http\)"):
            await h.requestor.connect(row("Requestor"), 80)


@trio_test
async def test_strangers_and_the_provider_itself_are_refused(tmp_path: Path) -> None:
    async with hand(tmp_path) as h:
        h.rows[ACTIVITY] = msgspec.structs.replace(row("Provider"), requestor="0x" + "c" * 40)
        fault = await h.refused("id")  # the stranger claims the row it likes; the provider's counts
        assert (fault.code, str(fault)) == ("forbidden", "not an activity of this requestor")
        h.rows.clear()
        assert (await h.refused("id")).code == "forbidden"
        h.rows[ACTIVITY] = row("Requestor")
        assert (await h.refused("id")).code == "forbidden"
        h.rows[ACTIVITY] = row("Provider")
        own = Channel(await open_stream(tmp_path / "a.sock", "", STREAM))  # by the provider's own bus
        await own.write("open", ACTIVITY)
        assert await own.read() == ["error", "forbidden", "not an activity of this requestor"]
        await own.aclose()
        assert h.dialled == 0


@trio_test
async def test_a_token_counts_once_and_from_the_bus_alone(tmp_path: Path) -> None:
    async with hand(tmp_path) as h:
        for path, node in ((tmp_path / "a.sock", ""), (tmp_path / "b.sock", PROVIDER)):
            stray = Channel(await open_stream(path, node, BACK))
            await stray.write("token", "0" * 32, ACTIVITY)
            assert await stray.read() is None
            await stray.aclose()
        tokens = []
        dial = h.unit.call

        def watched(nursery: trio.Nursery, token: str) -> list[str]:
            tokens.append(token)
            return dial(nursery, token)

        h.unit.call = watched  # type: ignore[method-assign]
        terminal = await h.terminal("sleep", "1000")
        again = Channel(await open_stream(tmp_path / "a.sock", "", BACK))
        await again.write("token", tokens[0], ACTIVITY)
        assert await again.read() is None
        await again.aclose()
        await terminal.aclose()


@trio_test
async def test_open_streams_are_counted_and_given_back(tmp_path: Path) -> None:
    async with hand(tmp_path) as h:
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        port = listener.socket.getsockname()[1]
        h.nursery.start_soon(trio.serve_listeners, lambda stream: stream.receive_some(1), [listener])
        streams = [await h.requestor.connect(row("Requestor"), port) for _ in range(MAX_STREAMS)]
        fault = await h.refused("true")
        assert fault.code == "busy"
        for stream in streams:
            await stream.aclose()
        while h.unit._open:
            await trio.sleep(0.01)
        assert (await collect(await h.terminal("true")))[2] == Exit(0, None)


@trio_test
async def test_an_exe_unit_that_is_stuck_takes_no_others_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, well = "2" * 32, "3" * 32
    rows = {name: msgspec.structs.replace(row("Provider"), activity_id=name) for name in (stuck, well)}
    asked: list[str] = []

    async def answer(sender: str, target: str, payload: bytes) -> bytes:
        asked.append(target)
        if target.endswith(stuck):
            await trio.sleep_forever()
        return msgspec.msgpack.encode(["error", "refused", "not today"])

    faults: list[str] = []

    async def ask(mine: Interactions, name: str) -> None:
        with pytest.raises(InteractionFault) as caught:
            await mine.connect(msgspec.structs.replace(row("Requestor"), activity_id=name), 80)
        faults.append(f"{caught.value.code}: {caught.value}")

    monkeypatch.setattr("golem.interaction.broker.OPEN_S", 3.0)
    monkeypatch.setattr("golem.interaction.broker.MAX_WAITING", DIALLING_EACH + 2)
    async with two_nodes(tmp_path) as (provider, requestor, nursery):
        theirs = Interactions(PROVIDER, provider.router, rows.get)
        mine = Interactions(REQUESTOR, requestor.router, {}.get)
        for name in (stuck, well):
            client = BusClient(tmp_path / "a.sock", f"exeunit:{name}", "exeunit", on_call=answer)
            nursery.start_soon(client.run)
        with within(20):
            while len(provider.bus.peers()) < 2:
                await trio.sleep(0.01)
            async with trio.open_nursery() as asking:
                for _ in range(DIALLING_EACH + 2):
                    asking.start_soon(ask, mine, stuck)
                while len(asked) < DIALLING_EACH:
                    await trio.sleep(0.01)
                await ask(mine, well)
                assert faults == ["refused: not today"]
                await ask(mine, stuck)
                assert faults.pop() == "busy: too many streams wait for this exe-unit"
                assert asked.count(f"exeunit:{stuck}") == DIALLING_EACH
            assert len(faults) == DIALLING_EACH + 3
            assert not theirs._shares
            assert not theirs._dialling
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_connection_with_an_end_of_its_own_each_way(tmp_path: Path) -> None:
    async with hand(tmp_path) as h:

        async def serve(stream: trio.SocketStream) -> None:
            data = b"".join([chunk async for chunk in stream])
            await stream.send_all(data[::-1])

        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        port = listener.socket.getsockname()[1]
        h.nursery.start_soon(trio.serve_listeners, serve, [listener])
        channel = await h.requestor.connect(row("Requestor"), port)
        data = os.urandom(2 << 20)
        await channel.send_all(data)
        await channel.send_eof()
        got = bytearray()
        while chunk := await channel.receive_some():
            got += chunk
        assert bytes(got) == data[::-1]
        await channel.aclose()
        heard = trio.Event()

        async def listen(stream: trio.SocketStream) -> None:
            await stream.send_all(b"that is all")
            await stream.send_eof()
            assert b"".join([chunk async for chunk in stream]) == b"but " + data
            heard.set()

        second = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        h.nursery.start_soon(trio.serve_listeners, listen, [second])
        channel = await h.requestor.connect(row("Requestor"), second.socket.getsockname()[1])
        await channel.send_all(b"but ")
        assert (await channel.receive_some(), await channel.receive_some()) == (b"that is all", b"")
        await channel.send_all(data)
        await channel.send_eof()
        await heard.wait()
        await channel.aclose()
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            dead = unused.getsockname()[1]
            with pytest.raises(InteractionFault, match=f"port {dead} of the activity: nothing answers") as caught:
                await h.requestor.connect(row("Requestor"), dead)
        assert caught.value.code == "refused"
        h.runtime.ports = (port,)
        await (await h.requestor.connect(row("Requestor"), 0)).aclose()  # the one port of the image
        h.runtime.ports = (port, 81)
        with pytest.raises(InteractionFault, match="several ports"):
            await h.requestor.connect(row("Requestor"), 0)
        with pytest.raises(InteractionFault, match="not a port"):
            await h.requestor.connect(row("Requestor"), 65536)


@trio_test
async def test_a_unit_that_is_away_or_says_no(tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (provider, requestor, _):
        Interactions(PROVIDER, provider.router, {ACTIVITY: row("Provider")}.get)
        mine = Interactions(REQUESTOR, requestor.router, {}.get)
        with pytest.raises(InteractionFault, match="the exe-unit cannot be reached: endpoint address not found") as caught:
            await mine.open_terminal(row("Requestor"), OpenTerminal(["ls"]))
        assert caught.value.code == "unreachable"
        elsewhere = msgspec.structs.replace(row("Requestor"), provider="0x" + "d" * 40)
        with pytest.raises(InteractionFault, match="the provider cannot be reached"):
            await mine.open_terminal(elsewhere, OpenTerminal(["ls"]))


def test_the_offer_says_what_is_allowed(tmp_path: Path) -> None:
    everything: frozenset[Interaction] = frozenset({"shell", "proxy-http"})
    properties = offer_template({"golem.runtime.capabilities": ["vpn"]}, everything)["properties"]
    assert properties["golem.runtime.capabilities"] == ["vpn", "shell", "proxy-http"]
    assert "golem.runtime.capabilities" not in offer_template({})["properties"]
    wasm = make_runtime("wasmtime", tmp_path)
    assert allowed_interactions(None, wasm) == allowed_interactions("shell,proxy-http", wasm) == frozenset()
    with pytest.raises(ValueError, match="unknown interaction 'ssh'"):
        allowed_interactions("shell,ssh", wasm)


@trio_test
async def test_watchers_see_all_batches_and_progress_nobody_asked_for() -> None:
    live = LiveLog()
    live.add("one", 0, 1.0, {"started": {}})
    live.add("one", 0, 2.0, {"progress": {}}, asked=False)
    live.add("two", 0, 3.0, {"started": {}})
    assert [(event.number, event.batch_id) for event in await live.watch(-1, 0)] == [(0, "one"), (1, "one"), (2, "two")]
    assert [event.number for event in await live.watch(1, 0)] == [2]
    assert await live.watch(2, 0.01) == []
    assert [event.id for event in live.read("one", -1)] == [0]
    for number in range(20):
        live.add("big", number, 4.0, {"stdout": "x" * (1 << 20)}, asked=number % 2 == 0)
    first = (await live.watch(-1, 0))[0]
    assert first.number > 2  # the oldest went first, also from its batch
    assert live.read("one", -1) == []
    assert live.read("big", -1)[0].index >= first.index


class Scripted:
    """A stream on which a hostile provider has said all it says."""

    def __init__(self, *frames: list[Any]) -> None:
        self._bytes = b"".join(length_prefixed(msgspec.msgpack.encode(frame)) for frame in frames)

    async def receive_some(self, n: int) -> bytes:
        found, self._bytes = self._bytes[:n], self._bytes[n:]
        return found


@trio_test
async def test_a_requestor_holds_little_of_what_a_hostile_provider_says() -> None:
    for frames in ([["output", 1, b""]], [["end"]] * 2, [["exit", 0, None]] * 2, [["exit", 0, None], ["end"]]):
        client = TerminalClient(Channel(Scripted(*frames)))
        for _ in frames[1:]:
            await client._progress()
        with pytest.raises(InteractionFault, match="nonsense"):
            await client._progress()
    client = TerminalClient(Channel(Scripted(*[["taken", 1]] * 1000, ["output", 1, b"x"], ["taken", 1])))
    for _ in range(1002):
        await client._progress()
    assert len(client._events) == 1
    assert (await client.receive(), await client.receive()) == (Taken(1001), Output(1, b"x"))
