"""The embedded dev chain: an Ethereum chain in a process of its own, shared by every node on a data root.

This module is the client side and imports nothing heavy: `ensure_devchain` starts the process if nobody serves the
directory, `stop_devchain` ends it, `url_of` looks without starting. The process itself is `__main__`: `chain` (py-evm,
mempool, mining) over `store` (SQLite), spoken to by `server` (HTTP) through `methods` (JSON-RPC).
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
from pathlib import Path

import trio

from golem.base.children import CWD, child_environment, python_line
from golem.base.plain_http import load_httpx, trust_nobody

INFO_NAME = "chain.json"
LOCK_NAME = "chain.lock"
LOG_NAME = "devchain.log"
BUSY_EXIT = 3
LOOPBACK = "127.0.0.1"
LOG_LIMIT = 4 << 20  # bytes; a longer log moves aside at the next start
START_S = 60.0  # about 1.5 s on an idle machine

_started: list[subprocess.Popen[bytes]] = []  # our own children, kept so that a dead one is reaped


class DevChainError(Exception):
    """The dev chain does not start, answer or stop; says where its log is."""


def client_version(pid: int) -> str:
    """What the chain of process `pid` calls itself."""
    return f"golem-devchain/py-evm/{pid}"


def _info(directory: Path) -> dict[str, int] | None:
    try:
        info = json.loads((directory / INFO_NAME).read_text())
        return {name: int(info[name]) for name in ("port", "pid", "chain_id")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def token_of(directory: Path | str) -> str:
    """Token of the developer's methods of the chain in `directory`; "" when there is none that we may read."""
    try:
        return str(json.loads((Path(directory) / INFO_NAME).read_text()).get("token", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _is_served(directory: Path) -> bool:
    """Does a living process hold the lock of this directory?"""
    try:
        with (directory / LOCK_NAME).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _folder(directory: Path | str) -> Path:
    path = Path(directory).resolve()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


async def url_of(directory: Path | str) -> str | None:
    """URL of the chain served from `directory`, or None when none answers there."""
    info = _info(Path(directory))
    if info is None or not _is_served(Path(directory)):
        return None  # what is left of a chain that is gone: its port may be anybody's
    url = f"http://{LOOPBACK}:{info['port']}"
    call = {"jsonrpc": "2.0", "id": 1, "method": "web3_clientVersion", "params": []}
    await load_httpx()
    import httpx

    try:
        async with httpx.AsyncClient(timeout=5.0, trust_env=False, verify=trust_nobody()) as client:
            told = (await client.post(url, json=call)).json().get("result", "")
    except (httpx.HTTPError, ValueError, AttributeError):
        return None
    return url if told == client_version(info["pid"]) else None  # else the port has gone to somebody else


def _spawn(directory: Path, arguments: tuple[str, ...]) -> subprocess.Popen[bytes]:
    log = directory / LOG_NAME
    if log.exists() and log.stat().st_size > LOG_LIMIT:
        log.replace(directory / (LOG_NAME + ".old"))
    command = python_line("golem.chain.devchain", "--data-dir", str(directory), "--max-log", str(LOG_LIMIT), *arguments)
    with log.open("ab") as out:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=CWD,
            env=child_environment() | {"PYTHONWARNINGS": "ignore"},  # it outlives its node and serves others
            start_new_session=True,  # it serves other nodes too: our Ctrl-C is not for it
        )
    _started[:] = [each for each in _started if each.poll() is None] + [child]
    return child


async def ensure_devchain(directory: Path | str, *arguments: str) -> str:
    """URL of the chain in `directory`, starting its process (with extra command-line `arguments`) if none serves it.

    Safe to call from many processes at once: the lock lets one win and the others wait for it. Raises DevChainError.
    """
    directory = _folder(directory)
    child: subprocess.Popen[bytes] | None = None
    with trio.move_on_after(START_S):
        while True:
            if (url := await url_of(directory)) is not None:
                return url
            status = child.poll() if child else None
            if child is not None and status not in (None, BUSY_EXIT):
                raise DevChainError(f"the dev chain ended with status {status}, see {directory / LOG_NAME}")
            if (child is None or status == BUSY_EXIT) and not _is_served(directory):
                child = _spawn(directory, arguments)
            await trio.sleep(0.05)
    raise DevChainError(f"the dev chain did not answer within {START_S:.0f} s, see {directory / LOG_NAME}")


async def stop_devchain(directory: Path | str, timeout_s: float = 10.0) -> bool:
    """End the chain's process. False when none was running; DevChainError when it does not end."""
    directory = _folder(directory)
    if not _is_served(directory):
        return False
    info = _info(directory)
    if info is None:
        raise DevChainError(f"{directory} is locked by a process that has not said its id yet")
    os.kill(info["pid"], signal.SIGTERM)  # whoever takes the lock removes chain.json first: this is the holder's id
    with trio.move_on_after(timeout_s):
        while _is_served(directory):
            await trio.sleep(0.05)
        _started[:] = [each for each in _started if each.poll() is None]
        return True
    raise DevChainError(f"the dev chain (process {info['pid']}) did not end within {timeout_s:.0f} s")
