"""What is said on a byte stream to an exe-unit: the shell and the services of a running activity.

The requestor's node opens a stream named `exeunit` at the provider's node; that one checks who asks, has the exe-unit
dial back over the bus (stream `exeunit-back`, with a token that counts once) and joins the two. Frames are MessagePack
arrays behind their length (four bytes, big-endian):

    requestor's node                              the exe-unit (or, before it is reached, the provider's node)
    ["open", activity id], then one of
    ["terminal", argv, env, tty, rows, cols]  ->  ["ok"]
        ["input", bytes]                              ["taken", bytes of input that the program has got]
        ["end"]              no more input            ["output", 1 stdout or 2 stderr, bytes]
        ["taken", bytes of output dealt with]         ["exit", status, reason or nil], and the stream ends
        ["resize", rows, cols]
    ["connect", port]                         ->  ["ok"]
        as above, without "resize"                    as above; ["end"] before "exit" where the service ends its way first
                                                  ["error", code, text] instead of any of these, and the stream ends

Port 0 is the one port that the image exposes, or 80. A requestor that leaves (its side of the stream ends) has hung up:
the program is killed. So that this is seen at once, and that a user may stop reading for an hour, both sides always read
frames: each keeps at most `WINDOW_BYTES` on the way that the other has not taken yet.
Neighbours: `golem/interaction/wire.py` reads and writes frames; `golem/interaction/broker.py` (nodes) and
`golem/exeunit/interaction.py` speak.
"""

from __future__ import annotations

from typing import Any

import msgspec

STREAM, BACK = "exeunit", "exeunit-back"
STDOUT, STDERR = 1, 2
WINDOW_BYTES = 256 << 10
ACK_BYTES = 64 << 10  # less than this need not be told to be taken
DATA_BYTES = 32 << 10  # of input or output in one frame
MAX_FRAME_BYTES = 256 << 10
MAX_WINDOW_SIDE = 4096  # rows or columns


class InteractionFault(Exception):
    """An interaction was refused or broke; the text is for the requestor.

    `code`: bad_request, forbidden, unsupported, conflict (not started), gone (ended), busy, refused (by the service or
    the runtime), unreachable (the provider), lost (broke off).
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class OpenTerminal(msgspec.Struct, frozen=True, array_like=True, tag="terminal"):
    """Run a program with live input; an empty `argv` is the image's shell."""

    argv: list[str]
    env: dict[str, str] = {}
    tty: bool = False
    rows: int = 24
    cols: int = 80


class Connect(msgspec.Struct, frozen=True, array_like=True, tag="connect"):
    """Open a TCP connection to a service on the activity's loopback address."""

    port: int


Request = OpenTerminal | Connect


def check_request(raw: Any) -> Request:
    """Return a request from its frame. Raises `InteractionFault`."""
    try:
        request: Request = msgspec.convert(raw, Request)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InteractionFault("bad_request", f"malformed request: {str(error)[:200]}") from None
    match request:
        case OpenTerminal(rows=rows, cols=cols):
            check_window(rows, cols)
        case Connect(port) if not 0 <= port <= 65535:
            raise InteractionFault("bad_request", f"not a port: {port}")
    return request


def check_window(rows: int, cols: int) -> None:
    """Raise `InteractionFault` where a terminal cannot have this size."""
    if not (1 <= rows <= MAX_WINDOW_SIDE and 1 <= cols <= MAX_WINDOW_SIDE):
        raise InteractionFault("bad_request", f"a window has 1 to {MAX_WINDOW_SIDE} rows and columns, not {rows} x {cols}")
