"""`.env` of the working directory: settings of this program below those of the environment, and nothing else.

Whoever may write into the folder in which we are started may write this file. So it sets none but the documented names,
never those that other programs or our children obey (`PATH`, `PYTHONPATH`, `DOCKER_HOST`), nor that of programs to run
(`EXE_UNIT_PATH`); a file of another user, or one that all may write, is not read at all.
"""

from __future__ import annotations

import io
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from dotenv import dotenv_values

MAX_BYTES = 1 << 20
_NAMES = frozenset((
    "YAGNA_API_URL", "YAGNA_APPKEY", "YAGNA_DATADIR", "YAGNA_AUTOCONF_APPKEY", "YAGNA_AUTOCONF_ID_SECRET",
    "YAGNA_API_ALLOW_ORIGIN", "YAGNA_DEV_SKIP_ALLOCATION_VALIDATION", "MAX_REST_TIMEOUT", "DEFAULT_SUBSCRIPTION_TTL",
    "MARKET_MAX_EVENTS_DEFAULT", "MARKET_MAX_EVENTS_MAX", "MARKET_EVENT_STORE_DAYS", "MARKET_DB_CLEANUP_INTERVAL",
    "UNRESPONSIVE_LIMIT_SECONDS", "INACTIVITY_LIMIT_SECONDS", "PAYMENT_CYCLE_DEFAULT_INTERVAL", "NODE_NAME", "SUBNET",
    "YA_PAYMENT_NETWORK", "YA_RT_CORES", "YA_RT_MEM", "YA_RT_STORAGE", "MAX_SIMULTANEOUS_AGREEMENTS",
    "IDLE_AGREEMENT_TIMEOUT", "AGREEMENT_APPROVE_TIMEOUT", "MIN_AGREEMENT_EXPIRATION", "MAX_AGREEMENT_EXPIRATION",
    "MAX_AGREEMENT_EXPIRATION_WITHOUT_DEADLINE", "DEBIT_NOTE_INTERVAL", "MIN_DEBIT_NOTE_INTERVAL", "MAX_DEBIT_NOTE_INTERVAL",
    "DEBIT_NOTE_ACCEPTANCE_DEADLINE", "PAYMENT_TIMEOUT_REQUIRED_DURATION", "RUNTIME_TEST_INTERVAL", "GOLEM_DATA_DIR",
    "GOLEM_PROFILE", "GOLEM_CHAIN_DIR", "GOLEM_CHAIN_URL", "GOLEM_LISTEN", "GOLEM_BOOTSTRAP", "GOLEM_MDNS",
    "GOLEM_NETWORK_NAME", "GOLEM_PASSWORD", "GOLEM_PASSWORD_FILE", "GOLEM_PLAIN_KEY", "GOLEM_IMAGES_MAX_GIB",
    "GOLEM_PROVIDER_DIR", "MIN_PAYMENT_AMOUNT_GLM", "GOLEM_CREDIT_FLOOR", "GOLEM_CREDIT_FACTOR", "GOLEM_CREDIT_GROWTH",
    "GOLEM_PAY_PACE",
))  # fmt: skip
_PATTERN = re.compile(r"[A-Z]{1,20}_GETH_ADDR\Z")


@dataclass(frozen=True, slots=True)
class DotEnv:
    """What a `.env` gave: names that count, names that do not, or why it is not read."""

    path: Path
    given: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    refusal: str = ""

    def note(self) -> str:
        """Return a line for the log, "" where there is nothing to say."""
        said = [f"settings of {self.path}: {', '.join(sorted(self.given)) or 'none'}"] if self.given or self.ignored else []
        said += [f"not for such a file, and ignored: {', '.join(self.ignored)[:500]}"] if self.ignored else []
        return self.refusal or "; ".join(said)


_set: dict[str, str] = {}  # what we have put into the environment ourselves
_read = DotEnv(Path())


def load_environment() -> dict[str, str]:
    """Return the environment, with a `.env` of the working directory below it."""
    global _read
    path = Path.cwd() / ".env"
    values, refusal = _values(path)
    given = {name: value for name, value in values.items() if name in _NAMES or _PATTERN.match(name)}
    fresh = {name: value for name, value in given.items() if os.environ.get(name) in (None, _set.get(name))}
    os.environ.update(fresh)
    _set.update(fresh)
    _read = DotEnv(path, frozenset(fresh), tuple(sorted(set(values) - set(given))), refusal)
    return dict(os.environ)


def dot_env() -> DotEnv:
    """Return what `load_environment` found."""
    return _read


def _values(path: Path) -> tuple[dict[str, str], str]:
    """Return what a file says, or why it is not read. Nothing of it is expanded: it could carry our secrets elsewhere."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, f"{path} is not read: {error.strerror}"
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            return {}, f"{path} is not read: not a file of at most {MAX_BYTES} bytes"
        ours = {found.st_uid, os.lstat(path).st_uid} <= {os.geteuid(), 0}  # a link of his may lead to a file of ours
        if not ours or found.st_mode & stat.S_IWOTH:
            return {}, f"{path} is not read: it is another user's, or all may write it"
        text = file.read(MAX_BYTES).decode("utf-8", "replace")
    values = dotenv_values(stream=io.StringIO(text), interpolate=False)
    return {name: value for name, value in values.items() if value is not None and "\0" not in name + value}, ""
