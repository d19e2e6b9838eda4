"""The data directory of a node: made private, locked while it runs, with the log of its steps."""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import AsyncExitStack, ExitStack, suppress
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from actors.kernel.trace import Line
from golem.config import ConfigError
from golem.private_files import check_ours, make_private, strangers_in

log = logging.getLogger("golem.node")

MAX_NAMED = 20
STEP_LOG_BYTES, STEP_LOG_FILES = 16 * 1024 * 1024, 4


def make_folder(path: Path, use: str) -> None:
    """Make a private directory if it is not there. Raises `ConfigError`."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_ours(path)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise ConfigError(f"cannot use the {use} directory {path}: {reason}") from None
    except ValueError as error:
        raise ConfigError(f"cannot use the {use} directory {path}: {error}") from None


def lock_data_dir(data_dir: Path, stack: ExitStack[Any] | AsyncExitStack) -> None:
    """Make the data directory and hold its lock until the stack unwinds. Raises `ConfigError`."""
    make_folder(data_dir, "data")
    try:
        handle = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use the data directory {data_dir}: {error.strerror}") from None
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f"another node runs on {data_dir} (choose another with golem --data-dir DIR)") from None
    try:
        opened, strange = make_private(data_dir), strangers_in(data_dir)
    except OSError as error:
        raise ConfigError(f"cannot make the data directory {data_dir} private: {error}") from None
    if strange:
        whose = f"{', '.join(strange[:MAX_NAMED])} in the data directory {data_dir} belongs to another user"
        raise ConfigError(f"{whose}, whose app-keys, networks or payments would be ours (move it away, or chown it)")
    if opened:
        log.warning("the data directory %s was open to other users; closed now: %s", data_dir, ", ".join(opened[:MAX_NAMED]))


def step_log(data_dir: Path) -> Any:
    """Return the sink of trace lines: `<data_dir>/steps.log`, rotated, read by `golem trace`."""
    handler = RotatingFileHandler(data_dir / "steps.log", maxBytes=STEP_LOG_BYTES, backupCount=STEP_LOG_FILES)
    handler.setFormatter(logging.Formatter("%(message)s"))

    def begin_anew(_record: logging.LogRecord) -> None:
        """A full disk: the journal has the say. What is in the buffer is dropped, the next line opens the file again."""
        stream: TextIOWrapper | None = handler.stream
        handler.stream = None
        with suppress(OSError):
            if stream is not None:
                stream.close()

    handler.handleError = begin_anew  # type: ignore[assignment,method-assign]
    logger = logging.Logger("golem.steps", logging.INFO)
    logger.addHandler(handler)

    def write(line: Line) -> None:
        logger.info(line.json())

    return write
