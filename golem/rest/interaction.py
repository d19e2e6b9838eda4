"""Activity API, a hand inside: a shell in a running activity by websocket. HTTP services inside it: `proxy.py`.

    GET /activity-api/v1/activity/{id}/shell?tty=1&rows=24&cols=80&cmd=ls&cmd=-l&env=NAME%3Dvalue      (websocket)

The app-key is the right to it, as for every call (`Authorization: Bearer` or `authToken=`). Without `cmd` the image's
shell runs; `tty=0` runs without a terminal; `flow=1` has output wait for the client (below). What may not be is refused
before the handshake, with a status and a JSON message (403 the provider does not allow it, 409 not started, 410 ended,
501 the runtime has none, 503 too many).

Client to server: binary messages are input; text messages are JSON: `{"resize": [rows, cols]}`, `{"end": true}` (no more
input; a terminal gets Ctrl-D), with `flow=1` also `{"taken": bytes}` (so much output is dealt with; told at least every
64 KiB). A client may then stop for as long as it likes, while one without that is cut off when it takes nothing for a
minute. Closing the websocket hangs up, which kills the program.
Server to client: binary messages are output; with `tty=0` each begins with one byte, 1 for stdout or 2 for stderr. Text
messages are JSON: `{"taken": bytes}` (so much input has reached the program; a client that keeps at most 256 KiB untaken
can always be heard), and as the last one `{"exit": status, "reason": text or null}` or `{"error": text, "code": word}`.
Neighbours: `golem/interaction/broker.py` holds the stream to the exe-unit.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import msgspec
import trio
from quart import Blueprint, websocket
from wsproto.frame_protocol import CloseReason

from golem.interaction.broker import Exit, Output, Taken, TerminalClient
from golem.rest.activity import UNREACHABLE, find
from golem.rest.edge import ApiError
from golem.rest.sockets import close_websocket
from protocol.interaction import InteractionFault, OpenTerminal
from protocol.states import Role

if TYPE_CHECKING:
    from golem.node.node import Node

log = logging.getLogger("golem.rest")

STATUS = {
    "bad_request": 400, "forbidden": 403, "conflict": 409, "gone": 410, "unsupported": 501, "busy": 503, "refused": 502,
    "lost": 502, "unreachable": 500,
}  # fmt: skip


def api_error(fault: InteractionFault) -> ApiError:
    """Return the answer that says what came of an interaction."""
    text = f"{UNREACHABLE} ({fault})" if fault.code == "unreachable" else str(fault)
    return ApiError(STATUS.get(fault.code, 500), text)


def blueprint(node: Node) -> Blueprint:
    """Return the shell of the activity API of `node`."""
    api = Blueprint("interaction", __name__, url_prefix="/activity-api/v1")

    @api.websocket("/activity/<activity_id>/shell")
    async def shell(activity_id: str) -> None:
        row = find(node, activity_id, Role.REQUESTOR)
        try:
            request, flow = _request(), _flag("flow", "0")
            terminal = await node.interactions.open_terminal(row, request)
        except InteractionFault as fault:
            raise api_error(fault) from None
        try:
            await websocket.accept()
            await _Shell(terminal, request.tty, flow, node.stopping).run()
        finally:
            with trio.CancelScope(shield=True):
                await terminal.aclose()

    return api


def _request() -> OpenTerminal:
    """Read the query of the websocket at hand. Raises `ApiError`."""
    env = {}
    for pair in websocket.args.getlist("env"):
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ApiError(400, f"query parameter env={pair[:40]!r}: expected NAME=value")
        env[name] = value
    return OpenTerminal(websocket.args.getlist("cmd"), env, _flag("tty", "1"), _number("rows", 24), _number("cols", 80))


def _flag(name: str, default: str) -> bool:
    text = websocket.args.get(name, default).lower()
    if text not in ("0", "1", "false", "true"):
        raise ApiError(400, f"query parameter {name}={text[:40]!r}: expected 0 or 1")
    return text in ("1", "true")


def _number(name: str, default: int) -> int:
    text = websocket.args.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise ApiError(400, f"query parameter {name}={text[:40]!r}: expected a number")
    return int(text)


class _Control(msgspec.Struct, forbid_unknown_fields=True):
    """A text message of the client."""

    resize: tuple[int, int] | None = None
    end: bool = False
    taken: int = 0


class _Shell:
    """The websocket at hand and a program, joined."""

    def __init__(self, terminal: TerminalClient, tty: bool, flow: bool, stopping: trio.Event) -> None:
        self._terminal, self._tty, self._flow, self._stopping = terminal, tty, flow, stopping
        self._fault: InteractionFault | None = None

    async def run(self) -> None:
        """Until the program has ended or broke off, and the client knows; Quart cancels it when the client has left."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._guard, self._read, nursery.cancel_scope)
            nursery.start_soon(self._guard, self._write, nursery.cancel_scope)
            nursery.start_soon(self._guard, self._watch_node, nursery.cancel_scope)
        if self._fault is not None:
            await _say({"error": str(self._fault), "code": self._fault.code})
        await close_websocket(CloseReason.INTERNAL_ERROR if self._fault else CloseReason.NORMAL_CLOSURE)

    async def _guard(self, task: Any, scope: trio.CancelScope) -> None:
        try:
            await task()
        except InteractionFault as fault:
            self._fault = self._fault or fault
        scope.cancel()

    async def _read(self) -> None:
        while True:
            message = await websocket.receive()
            if isinstance(message, bytes):
                await self._terminal.send(message)
            elif message:
                await self._control(message)

    async def _watch_node(self) -> None:
        await self._stopping.wait()
        raise InteractionFault("lost", "the node is stopping")

    async def _control(self, text: str) -> None:
        try:
            control = msgspec.json.decode(text, type=_Control)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InteractionFault("bad_request", f"not a message of a shell: {str(error)[:200]}") from None
        if control.resize is not None:
            await self._terminal.resize(*control.resize)
        if control.end:
            await self._terminal.end_input()
        if self._flow and control.taken > 0:
            await self._terminal.taken(control.taken)

    async def _write(self) -> None:
        while True:
            match await self._terminal.receive():
                case Output(side, data):
                    await websocket.send(data if self._tty else bytes((side,)) + data)
                    if not self._flow:
                        await self._terminal.taken(len(data))
                case Taken(size):
                    await _say({"taken": size})
                case Exit(code, reason):
                    await _say({"exit": code, "reason": reason})
                    return


async def _say(message: dict[str, Any]) -> None:
    await websocket.send(json.dumps(message))
