"""Every text that a peer can send, through every command and into every log: nothing that commands a terminal comes out.

Nor what turns the direction of writing, nor a line of its own; and no number, however long, ends a command.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from click.testing import CliRunner
from rich.console import Console
from worlds.support import trio_test

from actors.kernel.complaints import KEPT_PEERS, MOST_A_MINUTE, Complaints
from actors.kernel.trace import Line, story
from golem.base.printing import TRACEBACK_INDENT, BoundedStream, Moderation, SafeFormatter, printable, quoted
from golem.bus.server import Bus, BusPeer
from golem.cli import main
from golem.cli.output import fail, say, table, text, value
from golem.cli.watch import Watcher, describe
from golem.net.types import RemoteError
from protocol.codec import Envelope, decode_batch, encode_batch
from protocol.types import Violation

SEED = int(os.environ.get("SIM_SEED", "16"))
ESCAPES = ("\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\x1bc", "\x1b]52;c;cm0gLXJm\x07", "\x08\x08", "\x00", "\x7f", "\x85")
TURNS = ("\u202e", "\u2066", "\u200f", "\u061c", "\u2028", "\u2029", "\ufeff", "\ud800", "\U000e0041")
FORGED = ("\n2026-01-01 00:00:00,000 INFO golem.node: all is well", "\r\nError: send money", "\x0b\x0c")
HOSTILE = "a" + "".join((*ESCAPES, *TURNS, *FORGED)) + "[/bold][red]z"
LONG = 10**400


def is_clean(said: str, lines: int | None = None, *, laid_out: bool = False) -> None:
    """Check what reached the terminal; what is `laid_out` may have lines of its own."""
    bad = [char for char in said if not (char.isprintable() or char in "\n\t")]
    assert bad == [], said
    assert laid_out or not any(line.startswith(("2026-01-01", "Error: send")) for line in said.splitlines()), said
    assert lines is None or said.count("\n") == lines, said


def test_texts() -> None:
    for one in (*ESCAPES, *TURNS, *FORGED, HOSTILE):
        is_clean(quoted(one), 0)
        is_clean(printable(one), laid_out=True)
    assert quoted("a\n\t\x1b\u202e\ud800é世界🙂 ") == "a\\n\\t\ufffd\\u202e\\ud800é世界🙂 "
    dice = random.Random(SEED)
    for _ in range(200):
        text_of_any = "".join(chr(dice.randrange(0x110000)) for _ in range(50))
        is_clean(quoted(text_of_any), 0)
        quoted(text_of_any).encode()


def test_what_commands_print_with(capsys: pytest.CaptureFixture[str]) -> None:
    table(["a", "b"], [[HOSTILE, LONG], [float("inf"), None]], note=HOSTILE)
    table(["a"], [], note=HOSTILE)
    value({HOSTILE: HOSTILE, "list": [HOSTILE, {HOSTILE: [LONG]}], "deep": {"x": HOSTILE}})
    value(HOSTILE)
    say(HOSTILE)
    text(HOSTILE, HOSTILE)
    seen = capsys.readouterr()
    is_clean(seen.out)
    is_clean(fail(HOSTILE).message, 0)
    is_clean(seen.err, 1)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_row_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool) -> None:
    """Long words are cut or wrapped by whoever shows them: what follows begins no line that looks like a row."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    monkeypatch.setattr("golem.cli.output.console", lambda: Console(soft_wrap=True, highlight=False, width=80))
    forged = "2026-01-01 INFO all is well"
    for length in (10, 70, 78, 390, 398, 5000, 100_000):
        long = " ".join(["x" * length] + [forged] * 50)
        table(["a", "b", "c"], [[long, long, "last"], ["y", "z", "\N{LATIN SMALL LETTER E WITH ACUTE}世界" * 40]])
        said = capsys.readouterr().out
        assert not any(line.lstrip().startswith("2026") and line.index("2026") < 2 for line in said.splitlines()), said
        assert len(said) < 100_000
        if not is_terminal:
            assert [line.strip()[0] for line in said.splitlines()] == ["a", "─", "x", "y"]
            assert "last" in said


# -- what the running node answers, through the bus, command by command
COMMANDS: list[list[str]] = [
    ["status"], ["id", "show"], ["id", "list"], ["app-key", "list"], ["app-key", "show", "x"], ["net", "status"],
    ["net", "sessions"], ["net", "ping"], ["net", "ping", "x"], ["net", "connect", "x"], ["market", "agreements", "list"],
    ["market", "offers"], ["market", "demands"], ["market", "show", "offer", "x"], ["market", "explain", "x"],
    ["market", "explain", "x", "y"], ["payment", "accounts"], ["payment", "driver", "list"], ["payment", "fund"],
    ["payment", "init"], ["payment", "status"], ["activity", "list"], ["activity", "show", "x"], ["activity", "watch", "x"],
    ["activity", "destroy", "x"], ["image", "list"], ["image", "show", "x"], ["image", "remove", "x"],
]  # fmt: skip


@asynccontextmanager
async def lying_node(folder: Path, answer: Callable[[str], Any]) -> AsyncIterator[None]:
    """A bus whose every answer is what peers said."""
    bus = Bus(folder / "bus.sock", "0x" + "a" * 40)

    async def call(client: BusPeer, node: str, target: str, payload: bytes) -> bytes:
        found = answer(target)
        if isinstance(found, Exception):
            raise found
        return json.dumps(found).encode()

    bus.on_call = call
    async with trio.open_nursery() as nursery:
        await nursery.start(bus.run)
        yield
        nursery.cancel_scope.cancel()


def run_command(folder: Path, line: list[str]) -> Any:
    return CliRunner().invoke(main, ["--data-dir", str(folder), *line])


@pytest.mark.parametrize("leaf", [HOSTILE, LONG, -LONG, 1e308, None], ids=["text", "number", "negative", "float", "nothing"])
@trio_test
async def test_every_command_whatever_the_node_says(tmp_path: Path, leaf: Any) -> None:
    """Answers grow: whatever a command looks for, it finds, and it is hostile."""
    said: Any = None
    async with lying_node(tmp_path, lambda target: said):
        for line in COMMANDS:
            row: dict[str, Any] = {"state": "Terminated"} if "watch" in line else {}
            for shape in (row, [row], {"links": [[leaf] * 3]}, leaf, [leaf], [[leaf] * 12]):
                said = shape
                for _ in range(40):
                    result = await trio.to_thread.run_sync(run_command, tmp_path, line)
                    is_clean(result.output)
                    if not isinstance(result.exception, KeyError) or result.exception.args[0] in row:
                        break
                    row[result.exception.args[0]] = leaf


@trio_test
async def test_every_command_whatever_the_node_refuses_with(tmp_path: Path) -> None:
    async with lying_node(tmp_path, lambda target: RemoteError(HOSTILE)):
        for line in COMMANDS:
            result = await trio.to_thread.run_sync(run_command, tmp_path, line)
            assert result.exit_code in (1, 2), line
            is_clean(result.output)


EVENTS = [
    {"started": {"command": {"run": {"entry_point": HOSTILE, "args": [HOSTILE, LONG]}}}},
    {"started": {"command": {HOSTILE: HOSTILE}}}, {"progress": {"progress": [LONG, LONG], "message": HOSTILE}},
    {"progress": {"progress": [1, LONG]}}, {"progress": {"progress": [LONG, 1]}},
    {"progress": {"progress": [-LONG, -1], "message": LONG}}, {"progress": {"progress": [1, 0]}},
    {"progress": {"progress": [1, 3], "message": HOSTILE}}, {"stdout": HOSTILE}, {"stderr": [27, 91, 50, 74]},
    {"stderr": [LONG, -1]}, {"stdout": {"x": HOSTILE}}, {"finished": {"return_code": LONG, "message": HOSTILE}},
    {"finished": {"return_code": 0, "message": LONG}}, {HOSTILE: HOSTILE}, {},
]  # fmt: skip


@pytest.mark.parametrize("plain", [True, False])
def test_what_happens_in_an_activity(plain: bool) -> None:
    out = io.StringIO()
    watcher = Watcher(Console(file=out, highlight=False, color_system=None, width=200), plain=plain)
    watcher.state(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    for number, kind in enumerate(EVENTS):
        watcher.tell({"number": number, "batch": HOSTILE, "index": LONG, "kind": kind})
        watcher.tell({"number": number, "batch": HOSTILE, "index": 0, "kind": kind})
    is_clean(out.getvalue(), laid_out=True)
    is_clean(describe({"run": {"entry_point": HOSTILE, "args": list(HOSTILE)}}), 0)


@trio_test
async def test_watching_goes_on_to_the_end(tmp_path: Path) -> None:
    events = [{"number": number, "batch": "b", "index": 0, "kind": kind} for number, kind in enumerate(EVENTS)]
    state = {"state": "Terminated", "reason": HOSTILE, "error": HOSTILE}
    async with lying_node(tmp_path, lambda target: {"id": "x", "activity": state, "events": events, "problem": HOSTILE}):
        result = await trio.to_thread.run_sync(run_command, tmp_path, ["activity", "watch", "x"])
        assert result.exit_code == 0, result.exception
        is_clean(result.output, laid_out=True)


@pytest.mark.integration
@trio_test
async def test_files_that_cannot_be_had(tmp_path: Path) -> None:
    """`gftp` says why: in the words of the node that has the file."""
    async with lying_node(tmp_path, lambda target: RemoteError(HOSTILE)):
        line = [sys.executable, "-m", "golem.files.tool", "download", f"gftp://0x{'b' * 40}/" + "c" * 64, str(tmp_path / "out")]
        env = {**os.environ, "GOLEM_DATA_DIR": str(tmp_path)}
        done = await trio.run_process(line, env=env, capture_stdout=True, capture_stderr=True, check=False)
        assert done.returncode == 1
        is_clean(done.stderr.decode(), 1)
        is_clean(done.stdout.decode())


# -- logs and stories
def logged(*records: tuple[Any, ...], error: BaseException | None = None) -> str:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(SafeFormatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.Logger("golem.test")
    logger.addHandler(handler)
    for words in records:
        logger.error(*words, exc_info=error)
    return out.getvalue()


def test_a_record_is_a_line() -> None:
    is_clean(logged((HOSTILE,)), 1)
    is_clean(logged(("%s and %r", HOSTILE, HOSTILE)), 1)
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        said = logged(("crashed: %s", error), error=error)
    is_clean(said)
    assert all(line.startswith(TRACEBACK_INDENT) for line in said.splitlines()[1:])


def test_lines_have_an_end() -> None:
    said = logged(("%s", "x" * 5_000_000))
    assert len(said) < 10_000
    assert "of 5000000 characters" in said
    try:
        raise ValueError("\n" * 100_000)
    except ValueError as error:
        said = logged(("crashed",), error=error)
    assert said.count("\n") < 1000


UNGUARDED = """
import logging, sys, threading, warnings, gc
TEXT = {text!r}
def said(**_):
    logging.getLogger("some.library").warning("%s", TEXT)
    warnings.warn(TEXT, UserWarning)
    def end():
        raise ValueError(TEXT)
    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    class Lost:
        def __del__(self):
            raise ValueError(TEXT)
    Lost()
    raise ValueError(TEXT)
from {module} import main
main.commands[{command!r}].callback = said
main.commands[{command!r}].params = []
main([{command!r}])
"""


@pytest.mark.integration
@pytest.mark.parametrize(("module", "command"), [("golem.cli", "status"), ("golem.files.tool", "version")])
def test_what_python_says_by_itself(module: str, command: str) -> None:
    """Programs without a log, threads, and exceptions that nobody catches: their text goes to the terminal, too."""
    code = UNGUARDED.format(text=HOSTILE, module=module, command=command)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    said = done.stderr.decode()
    assert said.count("[/bold]") >= 5, said
    is_clean(said)
    assert done.returncode == 1


def test_one_place_does_not_fill_the_log() -> None:
    moderation, at = Moderation(5), 1000.0

    def record(line: int, words: str, at: float) -> logging.LogRecord:
        made = logging.LogRecord("x", logging.INFO, "file", line, words, (), None)
        made.created = at
        return made

    passed = [moderation.filter(record(1, "peer", at + number / 100)) for number in range(600)]
    assert passed.count(True) == 5
    assert moderation.filter(record(2, "other", at))
    later = record(1, "peer", at + 61)
    assert moderation.filter(later)
    assert later.getMessage() == "peer (and 595 lines like it before)"


def test_a_log_of_a_unit_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "unit.log"
    with path.open("a") as stream:
        handler = BoundedStream(stream, 10_000)
        for number in range(2_000):
            handler.emit(logging.LogRecord("x", logging.INFO, "f", 1, f"line {number} " + "x" * 100, (), None))
    assert path.stat().st_size < 11_000
    assert path.read_text().endswith("x" * 100 + "\n")
    assert "line 1999" in path.read_text()


def test_a_peer_that_breaks_the_protocol_is_told_of_once_a_minute() -> None:
    complaints = Complaints()
    said = [complaints.held_back("0xa", 1000 + second / 10) for second in range(1200)]
    assert [one for one in said if one is not None] == [0, 599]
    many = [complaints.held_back(f"0x{number}", 2000.0) for number in range(1000)]
    assert sum(one is not None for one in many) == MOST_A_MINUTE
    assert len(complaints._peers) <= KEPT_PEERS
    assert complaints.held_back("0xa", 100.0) is not None, "a clock that was set back"


def test_stories_of_peers() -> None:
    line = Line(1.0, "trace", "market", f"0xa/{HOSTILE}", HOSTILE, (HOSTILE,), HOSTILE)
    assert line.json().isascii()
    for said in story([line.json()], "trace"):
        is_clean(quoted(said), 0)


@pytest.mark.parametrize("name", [*ESCAPES, *TURNS[:-2], *FORGED, "", " ", "é", "a b", "/", "x" * 150])
def test_actors_have_names_of_an_alphabet(name: str) -> None:
    good = Envelope("0xa/market", "0xb/market", "e", 1, 0, "t", b"")
    assert decode_batch(encode_batch([good])) == [good]
    for bad in ({"sender": f"0xa/{name}"}, {"to": f"0xb/{name}"}, {"sender": f"{name}/market"}):
        with pytest.raises(Violation):
            decode_batch(encode_batch([msgspec.structs.replace(good, **bad)]))
    if name and name not in ("/", "x" * 150):
        with pytest.raises(Violation):
            decode_batch(encode_batch([msgspec.structs.replace(good, trace=name)]))
