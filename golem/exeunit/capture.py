"""What is kept of a command's output, and what of it is sent live.

A `Collector` takes the bytes of one side (stdout or stderr) in the order they came, hands back what to emit as a live
event, and gives the final value when the command ends. Buffers are bounded: whatever a mode allows, no more than
`max_bytes` is held, and a text that had to be cut says so in a last line. What is sent live goes on for ever.
Neighbours: `protocol.exeunit` (the modes as requestors write them); the exe-unit's ports, which feed it from
`runtimes.base.Runtime.run`.

Values are as messages carry them: text for `str`, bytes for `bin`; None when nothing was captured.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Literal

from protocol.activity import MAX_OUTPUT_BYTES, output_size
from protocol.exeunit import CaptureMode, Stream

Output = str | bytes
Part = Literal["head", "tail", "headTail"]

CUT_NOTE = "\n[cut by the provider: the output had {} bytes, of which a result takes less]\n"
# What commands other than `run` are captured with.
CAPTURE_ALL = CaptureMode(stream=Stream())


@dataclass(frozen=True)
class _Plan:
    """A capture mode spelled out. `limit_bytes` None means everything (up to the collector's own bound)."""

    part: Part
    limit_bytes: int | None
    binary: bool
    stream: bool


def _plan(mode: CaptureMode | None) -> _Plan | None:
    """Errors: ValueError with a text for the requestor."""
    if mode is None:
        return None
    if (mode.at_end is None) == (mode.stream is None):
        raise ValueError("a capture mode is either atEnd or stream")
    if mode.stream is not None:
        return _Plan("head", _size("limit", mode.stream.limit), _is_binary(mode.stream.format), stream=True)
    assert mode.at_end is not None
    sizes: tuple[tuple[Part, int | None], ...] = (
        ("head", mode.at_end.head),
        ("tail", mode.at_end.tail),
        ("headTail", mode.at_end.head_tail),
    )
    given = [(part, size) for part, size in sizes if size is not None]
    if len(given) > 1:
        raise ValueError(f"capture takes one of head, tail and headTail, not {' and '.join(part for part, _ in given)}")
    if not given:
        return _Plan("head", None, _is_binary(mode.at_end.format), stream=False)
    ((part, size),) = given
    return _Plan(part, _size(part, size), _is_binary(mode.at_end.format), stream=False)


def _is_binary(form: str | None) -> bool:
    return form in ("bin", "binary")


def _size(key: str, value: int | None) -> int | None:
    if value is not None and value < 0:
        raise ValueError(f"capture {key} must be a number of bytes, not {value}")
    return value


def decode(data: bytes, binary: bool = False) -> Output | None:
    """Bytes as text (UTF-8, else every byte as the code point of the same value) or as they are; None if empty."""
    if not data:
        return None
    if binary:
        return data
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


class Collector:
    """One side of one command."""

    def __init__(self, mode: CaptureMode | None, max_bytes: int = MAX_OUTPUT_BYTES) -> None:
        """`mode` None discards everything.

        Errors: ValueError when the mode makes no sense; the text is for the requestor.
        """
        self._mode = _plan(mode)
        part = self._mode.part if self._mode else "head"
        asked = self._mode.limit_bytes if self._mode else 0
        limit = max_bytes if asked is None else min(asked, max_bytes)
        self._head_max = {"head": limit, "tail": 0, "headTail": (limit + 1) // 2}[part]
        self._tail_max = limit - self._head_max
        self._head, self._tail = bytearray(), bytearray()
        self._bounded = asked is None or asked > max_bytes
        self._live_max = asked  # None: without end
        self._live = None if self._mode is None or self._mode.binary else _LiveText()
        self.total_bytes = 0

    @property
    def truncated(self) -> bool:
        """Whether bytes the mode asked for were dropped because of `max_bytes`."""
        return self._bounded and self.total_bytes > self._head_max + self._tail_max

    def feed(self, chunk: bytes) -> Output | None:
        """Take the next bytes; returns what to emit live, if anything."""
        self.total_bytes += len(chunk)
        if self._mode is None:
            return None
        room = self._head_max - len(self._head)
        taken, rest = chunk[:room], chunk[room:]
        self._head += taken
        if self._tail_max and rest:
            self._tail += rest[-self._tail_max :]
            del self._tail[: -self._tail_max]
        if not self._mode.stream:
            return None
        if self._live_max is not None:
            chunk = chunk[: max(0, self._live_max - (self.total_bytes - len(chunk)))]
        return self._live.feed(chunk) if self._live else decode(chunk, binary=True)

    def finish(self) -> Output | None:
        """The output has ended; returns a last live event, if an unfinished character was held back."""
        if self._mode is None or not self._mode.stream or self._live is None:
            return None
        return self._live.finish()

    def result(self) -> Output | None:
        """The command's final stdout or stderr value."""
        return self.fitted(None)

    def size(self) -> int:
        """Return the bytes of the final value as a message carries it: text that is no UTF-8 takes two for one."""
        return output_size(self.result())

    def fitted(self, max_bytes: int | None) -> Output | None:
        """Return the final value, of at most `max_bytes` in a message: of what the mode keeps the part that it asks for."""
        if self._mode is None:
            return None
        value = decode(bytes(self._head + self._tail), self._mode.binary)
        cut = max_bytes is not None and output_size(value) > max_bytes
        if value is None or not (cut or self.truncated):
            return value
        most = output_size(value) if max_bytes is None else max_bytes
        if isinstance(value, bytes):
            return self._cut(value, most)
        note = CUT_NOTE.format(self.total_bytes).encode()
        if most <= 2 * len(note):
            note = b""
        return (self._cut(value.encode(), most - len(note)) + note).decode("utf-8", "ignore")

    def _cut(self, data: bytes, most: int) -> bytes:
        if len(data) <= most:
            return data
        first = {"head": most, "tail": 0, "headTail": (most + 1) // 2}[self._mode.part if self._mode else "head"]
        return data[:first] + data[len(data) - (most - first) :]


def fit_sides(stdout: Collector, stderr: Collector, max_bytes: int = MAX_OUTPUT_BYTES) -> tuple[Output | None, Output | None]:
    """Return the final values of both sides, of at most `max_bytes` together: what one does not take, the other may."""
    out, err = stdout.size(), stderr.size()
    if out + err <= max_bytes:
        return stdout.fitted(out), stderr.fitted(err)
    err_max = min(err, max(max_bytes // 2, max_bytes - out))
    return stdout.fitted(max_bytes - err_max), stderr.fitted(err_max)


class _LiveText:
    """Cuts a byte stream into texts without splitting a UTF-8 sequence; holds back at most three bytes."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, chunk: bytes) -> str | None:
        data = self._held + chunk
        try:
            text, used = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError:
            text, used = data.decode("latin-1"), len(data)
        self._held = data[used:]
        return text or None

    def finish(self) -> str | None:
        held, self._held = self._held, b""
        return held.decode("latin-1") or None
