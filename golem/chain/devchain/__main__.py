"""The dev chain's process: `python -m golem.chain.devchain --data-dir D [--host A] [--port N] [--block-time S] [--idle-exit S]`.

A lock file makes it the only one on its directory; `chain.json` beside it, for this user alone, tells clients {"port", "pid",
"chain_id", "token"}. It prefers the port it had last time, so that nodes survive its restart, and keeps its token.
Exit status 3: another process serves already; 4: its directory was deleted while it served.
"""

from __future__ import annotations

import argparse
import fcntl
import ipaddress
import json
import logging
import os
import secrets
import signal
import sys
from pathlib import Path

import trio

from golem.base.imports import tame_imports
from golem.base.printing import set_up_logs
from golem.chain.devchain import BUSY_EXIT, INFO_NAME, LOCK_NAME, LOOPBACK, token_of
from golem.chain.devchain.genesis import CHAIN_ID
from golem.private_files import write_private

TOKEN_BYTES = 16
LOOK_S = 2.0  # between looks whether the directory is still there
GONE_EXIT = 4


def last_port(directory: Path) -> int:
    try:
        return int(json.loads((directory / INFO_NAME).read_text())["port"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def last_token(directory: Path) -> str:
    """The token of the developer's methods: the last one, where nobody else could read it, or a new one."""
    path = directory / INFO_NAME
    known = token_of(directory) if path.is_file() and not path.stat().st_mode & 0o077 else ""
    return known if len(known) == 2 * TOKEN_BYTES else secrets.token_hex(TOKEN_BYTES)


async def gone(path: Path, descriptor: int) -> None:
    """Return once `path` is no longer the file that is open: whoever deleted the directory wants no chain of it."""
    held = os.fstat(descriptor)
    while True:
        await trio.sleep(LOOK_S)
        try:
            there = path.stat()
        except FileNotFoundError:
            return
        except OSError:
            continue  # that says nothing
        if (there.st_dev, there.st_ino) != (held.st_dev, held.st_ino):
            return


async def serve(options: argparse.Namespace, port_before: int, token: str, lock: int) -> int:
    # py-evm is heavy: imported only once the lock is ours
    tame_imports()
    from golem.chain.devchain.chain import DevChain
    from golem.chain.devchain.server import Server

    directory: Path = options.data_dir
    chain = DevChain(directory, chain_id=options.chain_id, tail=options.tail)
    server = Server(chain, options.block_time, token)
    try:
        try:
            listeners = await server.listen(options.port or port_before, options.host)
        except OSError:
            if options.port:
                raise
            listeners = await server.listen(0, options.host)
    except OSError as error:
        raise SystemExit(f"cannot serve on {options.host} port {options.port or 'any'}: {error}") from None
    port = listeners[0].socket.getsockname()[1]
    info = {"port": port, "pid": os.getpid(), "chain_id": chain.chain_id, "token": token}
    write_private(directory / INFO_NAME, json.dumps(info))
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"dev chain {chain.chain_id} at http://{host}:{port}, block {chain.head.block_number}", flush=True)
    if not ipaddress.ip_address(options.host).is_loopback:
        print(f"warning: whoever reaches {host}:{port} may have this chain's play money; serve it on a network you"
              " trust only", file=sys.stderr, flush=True)  # fmt: skip
    status = 0
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            nonlocal status
            await gone(directory / LOCK_NAME, lock)
            print(f"{directory} was deleted: this chain is of no use any more, and ends", file=sys.stderr, flush=True)
            status = GONE_EXIT
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:

            async def run() -> None:
                await server.run(listeners, options.idle_exit)
                nursery.cancel_scope.cancel()

            nursery.start_soon(run)
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break
    return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m golem.chain.devchain", description="The embedded dev chain.")
    parser.add_argument("--data-dir", type=Path, required=True, help="directory of this chain")
    parser.add_argument("--host", default=LOOPBACK, metavar="ADDR", help="IP address to serve, besides 127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="TCP port (default: the last one, or any)")
    parser.add_argument("--block-time", type=float, default=0.5, metavar="S", help="seconds between empty blocks")
    parser.add_argument("--tail", type=int, default=12, help="empty blocks after the last transaction")
    parser.add_argument("--chain-id", type=int, default=CHAIN_ID)
    parser.add_argument("--idle-exit", type=float, default=0.0, metavar="S", help="end after S seconds without a call")
    parser.add_argument("--max-log", type=int, default=0, metavar="BYTES", help="a longer log begins anew (0: never)")
    options = parser.parse_args(argv)
    if options.block_time <= 0 or options.tail < 0:
        parser.error("--block-time must be positive and --tail not negative")
    try:
        ipaddress.ip_address(options.host)
    except ValueError:
        parser.error(f"--host {options.host}: expected an IP address of this machine, or 0.0.0.0 for all")
    set_up_logs(logging.INFO, "%(asctime)s %(levelname)s %(name)s %(message)s", most_bytes=options.max_log)
    options.data_dir.mkdir(parents=True, exist_ok=True)
    with (options.data_dir / LOCK_NAME).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process serves {options.data_dir} (`golem chain stop` ends it; the blocks stay)", file=sys.stderr)
            return BUSY_EXIT
        port_before, token = last_port(options.data_dir), last_token(options.data_dir)
        (options.data_dir / INFO_NAME).unlink(missing_ok=True)  # it speaks of a process that is gone
        return trio.run(serve, options, port_before, token, lock.fileno())


if __name__ == "__main__":
    sys.exit(main())
