"""Arguments by file: what an Engine is told of a command it keeps for minutes after its end, several times over.

So a command with many arguments is a short one for the Engine: our `relay_program` maps a file that is laid out as the kernel
wants arguments, and becomes the program, looked for as the Engine would look for it.
Neighbours: `golem.exeunit.runtimes.vm.runtime`; `container` binds folder and program into containers.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from golem.exeunit.runtime import RuntimeFault, check_arguments, environment_words
from golem.exeunit.runtimes.vm.init_program import RELAY_BASE, RELAY_BYTES

RELAY_PATH, FILES_PATH = "/.golem/run", "/.golem/arguments"  # in containers
MOST_BY_EXEC = 32 << 10
MAX_ENVIRONMENT_BYTES = 128 << 10
MAX_PROGRAM_BYTES = 4095  # of a path, as the kernel counts
MAX_WORD_BYTES = (128 << 10) - 1  # of one argument
MAX_PLACES, MAX_PLACES_BYTES = 256, 256 << 10
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def check_command(argv: Sequence[str], env: Mapping[str, str]) -> None:
    """Refuse what the kernel would, before an Engine chokes on it. Errors: RuntimeFault."""
    variables = environment_words(env)
    check_arguments([*argv, *variables])
    if len(argv[0].encode()) > MAX_PROGRAM_BYTES:
        raise RuntimeFault(f"the name of the program is too long: {len(argv[0].encode())} bytes, at most {MAX_PROGRAM_BYTES}")
    for word in (*argv, *variables):
        if (size := len(word.encode())) > MAX_WORD_BYTES:
            raise RuntimeFault(f"an argument or variable is too long: {size} bytes, at most {MAX_WORD_BYTES}")
    if (size := _size(variables)) > MAX_ENVIRONMENT_BYTES:
        raise RuntimeFault(f"the environment is too long: {size} bytes, at most {MAX_ENVIRONMENT_BYTES}")


def is_long(argv: Sequence[str]) -> bool:
    """Return whether arguments go by file."""
    return _size(argv) > MOST_BY_EXEC


def write_arguments(folder: Path, argv: Sequence[str], search: str) -> tuple[Path, list[str]]:
    """Write a file of arguments; returns it, and the command line that takes them from there. Raises OSError.

    `folder`: what containers see at `FILES_PATH`; `search`: the PATH by which the program is looked for.
    """
    path = folder / uuid.uuid4().hex
    path.write_bytes(_laid_out(_places(argv[0], search), [word.encode() for word in argv]))
    path.chmod(0o644)
    return path, [RELAY_PATH, f"{FILES_PATH}/{path.name}"]


def _places(name: str, search: str) -> list[bytes]:
    """Return where a program may be."""
    if "/" in name:
        return [name.encode()]
    found, size = [], 0
    for folder in search.split(":")[:MAX_PLACES]:
        place = f"{folder or '.'}/{name}".encode()
        if (size := size + len(place)) > MAX_PLACES_BYTES:
            break
        found.append(place)
    return found


def _laid_out(places: Sequence[bytes], argv: Sequence[bytes]) -> bytes:
    """Return a file: where argv begins, the places and a zero, argv and a zero, and then the texts that these point to."""
    pointers, texts = [0, *places, 0, *argv, 0], bytearray()
    start = RELAY_BASE + 8 * len(pointers)
    numbers = [RELAY_BASE + 8 * (len(places) + 2)]
    for text in pointers[1:]:
        numbers.append(start + len(texts) if isinstance(text, bytes) else 0)
        texts += text + b"\0" if isinstance(text, bytes) else b""
    content = struct.pack(f"<{len(numbers)}Q", *numbers) + texts
    assert len(content) <= RELAY_BYTES
    return content


def _size(words: Sequence[str]) -> int:
    return sum(len(word.encode()) + 1 for word in words)
