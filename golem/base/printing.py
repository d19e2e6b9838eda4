"""What strangers say, on its way to a terminal or into a log: nothing of it commands the terminal or forges a line.

Control characters become U+FFFD; line feeds, and whatever else is not a printable character (those that turn the direction
of writing, half surrogates), are written as escapes (`\\n`, `\\u202e`). `quoted` makes a text one line; `printable` leaves a
text of several lines as it is laid out.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import threading
import warnings
from typing import Any, TextIO

MOST_CHARS = 8192  # of a log line: what is longer is cut, since a peer may have written it
MOST_LINES = 400  # of a traceback: messages of exceptions may have any number
SAME_A_MINUTE = 30  # lines of one place in the code, whatever they say
TRACEBACK_INDENT = "    | "


def quoted(text: str) -> str:
    """Return a text as one line of printable characters."""
    return text if text.isprintable() else "".join(char if char.isprintable() else _escaped(char) for char in text)


def printable(text: str) -> str:
    """Return a text of several lines with nothing in it that commands a terminal."""
    return "".join(char if char in "\n\t" or char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    if char in "\n\t" or not (char < " " or "\x7f" <= char <= "\x9f"):
        return char.encode("unicode-escape").decode("ascii")
    return "\ufffd"


def sayable(error: Exception, most_chars: int) -> str:
    """Return the text of an error for a wire: half surrogates, which JSON can bring in, are in no UTF-8."""
    return str(error)[:most_chars].encode("utf-8", "backslashreplace").decode()


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]}... of {len(text)} characters"


class SafeFormatter(logging.Formatter):
    """A record is a line, whatever was put into it; the lines of its traceback are set apart."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = quoted(_cut(record.message))
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).split("\n")
        if len(lines) > MOST_LINES:
            lines[MOST_LINES // 2 : -MOST_LINES // 2] = ["..."]
        return "\n".join(TRACEBACK_INDENT + quoted(_cut(line)) for line in lines)


class Moderation(logging.Filter):
    """Lets a place in the code write so many lines a minute; how many it held back stands in the next one that passes."""

    def __init__(self, most: int = SAME_A_MINUTE) -> None:
        super().__init__()
        self._most = most
        self._told: dict[tuple[str, int], tuple[float, int]] = {}  # by place: when its minute began, lines in it

    def filter(self, record: logging.LogRecord) -> bool:
        place = (record.pathname, record.lineno)
        began, lines = self._told.get(place, (record.created, 0))
        if record.created - began >= 60 or record.created < began:
            if lines > self._most:
                record.msg, record.args = f"{record.getMessage()} (and {lines - self._most} lines like it before)", ()
            began, lines = record.created, 0
        self._told[place] = (began, lines + 1)
        return lines < self._most


class BoundedStream(logging.StreamHandler[TextIO]):
    """Writes to a file that begins anew when it is too long."""

    def __init__(self, stream: TextIO, most_bytes: int) -> None:
        super().__init__(stream)
        self._most_bytes = most_bytes

    def emit(self, record: logging.LogRecord) -> None:
        try:
            handle = self.stream.fileno()
            found = os.fstat(handle)
            if stat.S_ISREG(found.st_mode) and found.st_size > self._most_bytes:
                os.ftruncate(handle, 0)
                self.stream.write(f"(what stood here was longer than {self._most_bytes} bytes)\n")
        except (OSError, ValueError):
            pass  # a stream without a file
        super().emit(record)


def set_up_logs(level: int | str, form: str, *, most_bytes: int = 0) -> None:
    """Log to standard error, a file of at most about `most_bytes` there (0: of any length)."""
    handler = BoundedStream(sys.stderr, most_bytes) if most_bytes else logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter(form))
    handler.addFilter(Moderation())
    logging.basicConfig(level=level, handlers=[handler])
    guard_stderr()


def guard_stderr() -> None:
    """Have what Python itself writes to standard error pass the same way: programs without a log of their own have that, too.

    These are records where no log is set up, warnings, and exceptions that end the process or a thread or that nobody catches.
    """
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(SafeFormatter())
    sys.excepthook = _say_exception
    sys.unraisablehook = lambda lost: _say_exception(lost.exc_type, lost.exc_value, lost.exc_traceback)
    threading.excepthook = lambda lost: _say_exception(lost.exc_type, lost.exc_value, lost.exc_traceback)
    warnings.formatwarning = _warning_line


def _say_exception(kind: type[BaseException], error: BaseException | None, trace: Any) -> None:
    """Print an exception that ends the process, or that nobody catches."""
    if error is not None and not issubclass(kind, SystemExit):
        print(SafeFormatter().formatException((kind, error, trace)), file=sys.stderr)


def _warning_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    return f"{filename}:{lineno}: {category.__name__}: {quoted(str(message))}\n"
