"""Descriptors: a file `ya-*.json` adds a runtime to a provider without a change to the code.

    [{"name": "process", "version": "0.1.0", "supervisor-path": "exe-unit", "runtime-path": "process-runtime",
      "description": "...", "extra-args": ["--cap-handoff", "--runtime-arg=X"], "properties": {},
      "config": {"counters": {"golem.usage.duration_sec": {"name": "duration", "description": "Duration", "price": true}}}}]

`runtime-path` is relative to the file and speaks the interface of `runtime.py`. The supervisor `exe-unit` is
this package; programs of others in its place are not started: limits, metering and the node's bus are the supervisor's.
A descriptor names a program that runs with the provider's rights, so a file that anybody may write is refused, and so
is whatever in it is not of the form above: a misspelt key must not be silently without effect.
Neighbours: `runtimes/__init__` looks a name up here; the provider agent lists and watches the same places.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from protocol import strict_json
from protocol.property_names import RUNTIME_NAME, RUNTIME_VERSION, USAGE_CPU, USAGE_DURATION

SEARCH = "EXE_UNIT_PATH"
SUPERVISOR = "exe-unit"
PATTERN = "ya-*.json"
CAP_HANDOFF = ("--cap-handoff", "--runtime-managed-hardware")
RUNTIME_ARG = "--runtime-arg"
DEFAULT_PRICED = (USAGE_DURATION, USAGE_CPU)
MAX_FILES = 256
MAX_FILE_BYTES = 64 * 1024
MAX_RUNTIMES = 32  # of one file
MAX_ITEMS = 64  # extra arguments, properties, counters
MAX_TEXT = 4096
_KEYS = {"name", "version", "supervisor-path", "runtime-path", "description", "extra-args", "properties", "config"}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}\Z", re.ASCII)
_VERSION = re.compile(r"[\w.+-]{1,64}\Z", re.ASCII)
_PROPERTY = re.compile(r"[\w!-]+(\.[\w!-]+)*\Z", re.ASCII)


class DescriptorError(ValueError):
    """A descriptor that cannot be used; the text names the file and says why."""


@dataclass(frozen=True)
class Descriptor:
    """One runtime of a file. `priced`: the usage counters that a preset may put a price on."""

    file: Path
    name: str
    version: str
    supervisor: str
    runtime: Path | None
    description: str = ""
    extra_args: tuple[str, ...] = ()
    properties: Mapping[str, Any] = field(default_factory=dict)
    priced: tuple[str, ...] = DEFAULT_PRICED

    def command(self) -> tuple[Path, bool, tuple[str, ...]]:
        """Return the runtime's program, whether it is told the limits, and its own first arguments.

        Errors: DescriptorError that says why this supervisor does not run it.
        """
        if self.supervisor != SUPERVISOR:
            raise self._error(f"supervisor-path {self.supervisor!r}: only `{SUPERVISOR}`, this node's own supervisor, is started")
        if self.runtime is None:
            raise self._error("no runtime-path")
        handoff, arguments = self._options()
        try:
            found = self.runtime.stat()
        except OSError as error:
            raise self._error(f"runtime-path {self.runtime}: {error.strerror}") from None
        if not stat.S_ISREG(found.st_mode) or not os.access(self.runtime, os.X_OK):
            raise self._error(f"runtime-path {self.runtime} is not a program")
        _check_owner(found, self._error, f"runtime-path {self.runtime}")
        return self.runtime, handoff, arguments

    def _options(self) -> tuple[bool, tuple[str, ...]]:
        """Read the supervisor's flags in `extra-args`."""
        handoff, arguments, words = False, [], iter(self.extra_args)
        for word in words:
            flag, separator, value = word.partition("=")
            if word in CAP_HANDOFF:
                handoff = True
            elif flag == RUNTIME_ARG:
                following = value if separator else next(words, None)
                if following is None:
                    raise self._error(f"extra-args: {RUNTIME_ARG} without a value")
                arguments.append(following)
            else:
                raise self._error(f"extra-args: this supervisor has no {word[:100]!r}")
        return handoff, tuple(arguments)

    def _error(self, text: str) -> DescriptorError:
        return DescriptorError(f"{self.file}: runtime {self.name!r}: {text}")


@dataclass(frozen=True)
class Catalogue:
    """The runtimes found, by name, and what was wrong with the rest."""

    runtimes: Mapping[str, Descriptor]
    problems: tuple[str, ...]


def default_places(data_dir: Path | None = None) -> list[str]:
    """Return where descriptors are looked for unless `EXE_UNIT_PATH` says otherwise. `data_dir`: of the provider agent."""
    places = [str(data_dir / "plugins")] if data_dir else []
    return [*places, os.path.expanduser("~/.local/lib/golem/plugins"), "/usr/local/lib/golem/plugins", "/usr/lib/golem/plugins"]


def find_descriptors(places: str | None, data_dir: Path | None = None, taken: Iterable[str] = ()) -> Catalogue:
    """Read the descriptors of `places` (files, directories, patterns, joined by `os.pathsep`), else of the default ones.

    `taken` names are those of built-in runtimes. A file that cannot be used is a problem, never an error.
    """
    found: dict[str, Descriptor] = {}
    problems: list[str] = []
    named = [place for place in (places or "").split(os.pathsep) if place]
    for place in named or default_places(data_dir):
        files = _files(place)
        if named and not files and not os.path.isdir(place):
            problems.append(f"{place}: no such descriptor")
        for file in files:
            try:
                for one in read_descriptors(file):
                    if one.name in taken:
                        raise one._error("a built-in runtime has this name")
                    if one.name in found and found[one.name].file != file:
                        raise one._error(f"defined by {found[one.name].file} already")
                    found[one.name] = one
            except DescriptorError as error:
                problems.append(str(error))
    return Catalogue(found, tuple(problems))


def _files(place: str) -> list[Path]:
    """Return the descriptor files of one place, sorted, at most MAX_FILES."""
    pattern = os.path.join(glob.escape(place), PATTERN) if os.path.isdir(place) else os.path.expanduser(place)
    return [Path(name).absolute() for name in sorted(islice(glob.iglob(pattern), MAX_FILES)) if not os.path.isdir(name)]


def read_descriptors(file: Path) -> list[Descriptor]:
    """Read one file.

    Errors: DescriptorError.
    """
    try:
        raw = strict_json.loads(_content(file))
    except ValueError as error:
        if isinstance(error, DescriptorError):
            raise
        raise DescriptorError(f"{file} is not JSON: {str(error)[:200]}") from None
    if not isinstance(raw, list) or len(raw) > MAX_RUNTIMES:
        raise DescriptorError(f"{file}: expected a list of at most {MAX_RUNTIMES} runtimes")
    found = [_Reader(file, number, one).read() for number, one in enumerate(raw)]
    if len({one.name for one in found}) < len(found):
        raise DescriptorError(f"{file}: two runtimes of one name")
    return found


def _content(file: Path) -> bytes:
    def error(text: str) -> DescriptorError:
        return DescriptorError(f"{file}: {text}")

    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not hold us up
    except OSError as fault:
        raise error(f"cannot be read: {fault.strerror}") from None
    with os.fdopen(descriptor, "rb") as opened:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise error("not a file")
        _check_owner(status, error, "this file")
        data = opened.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise error(f"larger than {MAX_FILE_BYTES} bytes")
    return data


def _check_owner(status: os.stat_result, error: Any, what: str) -> None:
    """Refuse what somebody else could have put there."""
    if status.st_uid not in (0, os.geteuid()):
        raise error(f"{what} belongs to user {status.st_uid}, neither to root nor to the user who runs the provider")
    if status.st_mode & stat.S_IWOTH:
        raise error(f"{what} may be written by anybody")


class _Reader:
    """One runtime of a file."""

    def __init__(self, file: Path, number: int, raw: Any) -> None:
        self._file, self._what = file, f"runtime {number + 1}"
        if not isinstance(raw, dict):
            raise self._error("expected an object")
        self._raw: dict[str, Any] = raw

    def read(self) -> Descriptor:
        name = self._text("name", _NAME, "1 to 64 letters, digits, '.', '_' or '-'")
        self._what = f"runtime {name!r}"
        if unknown := sorted(set(self._raw) - _KEYS):
            raise self._error(f"unknown key {', '.join(map(repr, unknown))[:200]}")
        program = self._raw.get("runtime-path")
        if program is not None:
            program = self._file.parent / self._text("runtime-path")
        arguments = self._raw.get("extra-args", [])
        if not isinstance(arguments, list) or len(arguments) > MAX_ITEMS or not all(map(_is_text, arguments)):
            raise self._error(f"extra-args: expected a list of at most {MAX_ITEMS} texts")
        return Descriptor(
            self._file,
            name,
            self._text("version", _VERSION, "a version such as 0.1.0"),
            self._text("supervisor-path"),
            program,
            self._text("description") if "description" in self._raw else "",
            tuple(arguments),
            dict(self._properties()),
            self._priced(),
        )

    def _error(self, text: str) -> DescriptorError:
        return DescriptorError(f"{self._file}: {self._what}: {text}")

    def _text(self, key: str, form: re.Pattern[str] | None = None, expected: str = "a text") -> str:
        value = self._raw.get(key)
        if not _is_text(value) or not value or (form is not None and not form.match(value)):
            raise self._error(f"{key}: expected {expected}")
        return str(value)

    def _object(self, where: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = where.get(key, {})
        if not isinstance(value, dict) or len(value) > MAX_ITEMS:
            raise self._error(f"{key}: expected an object of at most {MAX_ITEMS} keys")
        return value

    def _properties(self) -> Iterator[tuple[str, Any]]:
        for key, value in self._object(self._raw, "properties").items():
            full = f"golem.runtime.{key}"
            if not _PROPERTY.match(key) or full in (RUNTIME_NAME, RUNTIME_VERSION):
                raise self._error(f"properties: {key[:100]!r} is not for a descriptor to set")
            if not is_property_value(value):
                raise self._error(f"properties: {key[:100]}: expected a text, number, truth value or a list of texts")
            yield full, value

    def _priced(self) -> tuple[str, ...]:
        config = self._object(self._raw, "config")
        if unknown := sorted(set(config) - {"counters"}):
            raise self._error(f"config: unknown key {', '.join(map(repr, unknown))[:200]}")
        if "counters" not in config:
            return DEFAULT_PRICED
        priced = []
        for name, counter in self._object(config, "counters").items():
            fields = {"name": str, "description": str, "price": bool}
            if not isinstance(counter, dict) or set(counter) - set(fields) or not _PROPERTY.match(name):
                raise self._error(f"counters: {name[:100]!r}: expected an object with name, description and price")
            for key, kind in fields.items():
                if not isinstance(counter.get(key, kind()), kind):
                    raise self._error(f"counters: {name[:100]}: {key} is not in order")
            if counter.get("price", False):
                priced.append(name)
        return tuple(priced)


def _is_text(value: Any) -> bool:
    """Return whether a value is a text that an argument or a property can be: bounded, no NUL, no half surrogates."""
    return isinstance(value, str) and len(value) <= MAX_TEXT and "\0" not in value and value.isprintable()


def is_property_value(value: Any) -> bool:
    """Return whether a value can be that of an offer's property."""
    if isinstance(value, list):
        return len(value) <= MAX_ITEMS and all(map(_is_text, value))
    return (isinstance(value, bool | int | float) and abs(value) < 2**53) or _is_text(value)
