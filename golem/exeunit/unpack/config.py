"""An image's configuration: what of it is kept, and in which bounds.

Kept: ENTRYPOINT, CMD, ENV, WORKDIR, USER, VOLUME and EXPOSE; of these, what Docker takes and then does nothing with (variables
without a name or a value, ports that are none) is left out. Left behind: HEALTHCHECK (the Engine would run it by
itself), labels (those of containers say whose they are), ONBUILD, STOPSIGNAL and everything about hosts.
Runs in the sandboxed child of `images`. Neighbour: `archives`.
"""

from __future__ import annotations

import json
import posixpath
import re
from typing import Any

from golem.exeunit.unpack.inflate import BadImage

MAX_WORDS = 4096
MAX_WORD_BYTES = 128 << 10  # as much as Linux takes for one argument
MAX_WORDS_BYTES = 1 << 20
MAX_VOLUMES = 64
MAX_PORTS = 1024
_PORT = re.compile(r"\d{1,5}(-\d{1,5})?(/(tcp|udp|sctp))?")
CREATED = "1970-01-01T00:00:00Z"  # equal packages become equal images


def read_json(raw: bytes, what: str) -> Any:
    """Parse a text of bounded length. Errors: BadImage."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadImage(f"{what} is not valid JSON: {str(error)[:200]}") from None


def text_of(value: Any, what: str) -> str:
    """Return a value that must be a text without NUL. Errors: BadImage."""
    if not isinstance(value, str) or not value or "\0" in value or len(value) > MAX_WORD_BYTES:
        raise BadImage(f"{what} must be a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadImage(f"{what} must be a text that UTF-8 can hold") from None
    return value


def check_platform(image: dict[str, Any], machine: str) -> None:
    """Errors: BadImage when a Docker or OCI image's configuration names another system than linux on `machine`."""
    name = f"{image.get('os') or 'linux'}/{image.get('architecture') or machine}"
    if name != f"linux/{machine}":
        raise BadImage(f"the image is for {name[:100]}, this provider is linux/{machine}")


def image_config(given: Any, machine: str) -> dict[str, Any]:
    """Return the configuration to be written for `machine` (amd64, arm64 ...), all but its layers.

    `given`: a container's configuration as Docker has it, from a stranger. Errors: BadImage.
    """
    if not isinstance(given, dict):
        raise BadImage("the image's configuration has no object 'config'")
    config = {
        "Entrypoint": _command(given, "Entrypoint"),
        "Cmd": _command(given, "Cmd"),
        "Env": _environment(given),
        "WorkingDir": _path(given.get("WorkingDir") or "/", "WorkingDir"),
        "User": _user(given.get("User") or ""),
        "Volumes": {_path(path, "Volumes"): {} for path in _keys(given, "Volumes", MAX_VOLUMES)},
        "ExposedPorts": {port: {} for port in _keys(given, "ExposedPorts", MAX_PORTS) if _PORT.fullmatch(port)},
    }
    return {
        "architecture": machine,
        "os": "linux",
        "created": CREATED,
        "config": {key: value for key, value in config.items() if value},
        "history": [],
    }


def _words(given: dict[str, Any], key: str) -> list[str]:
    words = given.get(key) or []
    if not isinstance(words, list) or len(words) > MAX_WORDS:
        raise BadImage(f"{key} must be a list of at most {MAX_WORDS} texts")
    for word in words:
        if word != "":
            text_of(word, key)
    if sum(len(word) for word in words) > MAX_WORDS_BYTES:
        raise BadImage(f"{key} is longer than {MAX_WORDS_BYTES} bytes")
    return words


def _command(given: dict[str, Any], key: str) -> list[str]:
    if isinstance(given.get(key), str):
        return [text_of(given[key], key)]
    return _words(given, key)


def _environment(given: dict[str, Any]) -> list[str]:
    return [word for word in _words(given, "Env") if "=" in word[1:]]


def _keys(given: dict[str, Any], key: str, most: int) -> list[str]:
    """Return the keys of an object that stands for a set."""
    found = given.get(key) or {}
    if not isinstance(found, dict) or len(found) > most:
        raise BadImage(f"{key} must be an object with at most {most} keys")
    return sorted(text_of(name, key) for name in found)


def _path(path: Any, what: str) -> str:
    """Return an absolute path, as Docker reads it: ".." leads no higher than the root. Errors: BadImage for control characters
    and overlong ones.
    """
    text = text_of(path, what)
    if len(text.encode()) > 4095 or any(ord(letter) < 32 for letter in text):
        raise BadImage(f"{what}: {text[:100]!r} is no path for a container")
    return "/" + posixpath.normpath("/" + text).lstrip("/")


def _user(user: Any) -> str:
    if isinstance(user, str) and re.fullmatch(r"(root|0+)(:.*)?", user):
        return ""  # which is root, too, and no names have to be looked up in the guest's files at each command
    if not isinstance(user, str) or not re.fullmatch(r"[A-Za-z0-9_.$-]{0,64}(:[A-Za-z0-9_.$-]{1,64})?", user):
        raise BadImage(f"User: {str(user)[:100]!r} is no user or user:group")
    return user
