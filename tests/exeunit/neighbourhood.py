"""A provider and its neighbour on one link, each in a network namespace: `python neighbourhood.py FOLDER` under `unshare -n`.

The provider (this process) tries to transfer from and to every address in three ways; what it was told is printed as JSON,
what each side's server was sent stands in the folder. Run by `test_neighbours.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import trio

from golem.exeunit.transfer import web
from golem.exeunit.transfer.spool import Spool, TransferError, TransferPolicy
from golem.files.outgoing import OutgoingFile

PORT = 8080
OWN = ("9.9.9.9", "2a00:1450::5", "198.41.0.4", "8.8.4.77", "2a02:26f0::5")
NEAR = ("9.9.9.10", "2a00:1450::6", "2a02:26f0::6", "81.0.0.6", "78.78.78.2")  # the last three by routes alone
FAR = ("1.1.1.1", "2606:4700::1111")
MINE = (
    "link set lo up", "link set d0 up", "addr add 9.9.9.9/24 dev d0", "addr add 2a00:1450::5/64 dev d0 nodad",
    "addr add 198.41.0.4/32 dev lo", "route add local 8.8.4.0/24 dev lo",
    "addr add 2a02:26f0::5/128 dev d0 nodad", "route add 2a02:26f0::/64 dev d0",  # as by DHCPv6 and an advertised prefix
    "route add 81.0.0.0/24 dev d0", "addr add 77.77.77.1 peer 78.78.78.2 dev d0",
    "route add default via 9.9.9.10", "-6 route add default via 2a00:1450::6",
)  # fmt: skip
THEIRS = (
    "link set lo up", "link set d1 up", "addr add 9.9.9.10/24 dev d1", "addr add 2a00:1450::6/64 dev d1 nodad",
    "addr add 2a02:26f0::6/128 dev d1 nodad", "route add 2a02:26f0::/64 dev d1", "addr add 81.0.0.6/32 dev lo",
    "addr add 78.78.78.2 peer 77.77.77.1 dev d1", "addr add 1.1.1.1/32 dev lo", "addr add 2606:4700::1111/128 dev lo nodad",
)  # fmt: skip


def ip(lines: tuple[str, ...], pid: int = 0) -> None:
    """Set up a namespace: that of a process, or our own."""
    inside = ["nsenter", f"--net=/proc/{pid}/ns/net"] if pid else []
    for line in lines:
        done = subprocess.run([*inside, "ip", *line.split()], capture_output=True, text=True)
        if done.returncode:
            print(json.dumps({"skip": f"ip {line}: {done.stderr.strip()}"}))
            sys.exit()


async def serve(log: Path, stream: trio.SocketStream) -> None:
    """Note what comes, and answer."""
    async with stream:
        try:
            head = await stream.receive_some()
            with log.open("ab") as file:
                file.write((head.partition(b"\r\n")[0] or b"connected") + b"\n")
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nsecret")
            await stream.send_eof()
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass


async def listen(log: Path, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    listeners: Any = await trio.open_tcp_listeners(PORT, host="::")
    listeners += await trio.open_tcp_listeners(PORT, host="0.0.0.0")
    await trio.serve_listeners(partial(serve, log), listeners, task_status=task_status)  # type: ignore[arg-type]


async def attempt(policy: TransferPolicy, host: str, way: str, folder: Path) -> str:
    """Return what came of it: what was got, or why not."""
    url = f"http://{f'[{host}]' if ':' in host else host}:{PORT}/{way}"
    with (folder / "file").open("w+b") as file, trio.fail_after(30):
        try:
            if way == "put":
                file.write(b"planted")
                file.flush()
                await web.Web(policy).upload(url, OutgoingFile(file.fileno(), 7), None)
                return "put"
            spool = Spool(file.fileno(), 1 << 20, None, None)
            await web.Web(policy).download(url, spool)
            await spool.finish()
        except TransferError as error:
            return str(error)
        return (folder / "file").read_text()


async def unseen(transport: Any, host: str, port: int) -> list[str]:
    """Stand for a look at an address that was another's then."""
    return [host]


async def provider(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(listen, folder / "own")
        transport: Any = web._PinnedTransport
        look = transport._addresses
        for way in ("get", "put", "get-unseen", "put-unseen"):
            transport._addresses = unseen if "unseen" in way else look
            for host in (*OWN, *NEAR, *FAR):
                found[f"{way.partition('-')[0]} {host}{' unseen' if 'unseen' in way else ''}"] = await attempt(
                    TransferPolicy(), host, way.partition("-")[0], folder
                )
        for host in NEAR:
            found[f"local {host}"] = await attempt(TransferPolicy.local(), host, "local", folder)
        nursery.cancel_scope.cancel()
    return found


def main(folder: Path) -> None:
    line = ["unshare", "-n", sys.executable, __file__, str(folder), "neighbour"]
    neighbour = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert neighbour.stdout is not None
        assert neighbour.stdin is not None
        assert neighbour.stdout.readline() == "here\n"
        ip((f"link add d0 type veth peer name d1 netns {neighbour.pid}",))
        ip(THEIRS, neighbour.pid)
        ip(MINE)
        neighbour.stdin.write("go\n")
        neighbour.stdin.flush()
        assert neighbour.stdout.readline() == "listening\n"
        print(json.dumps(trio.run(provider, folder)))
    finally:
        neighbour.kill()
        neighbour.wait()


async def neighbour(folder: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(listen, folder / "neighbour")
        print("listening", flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print("here", flush=True)
        sys.stdin.readline()
        trio.run(neighbour, Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]))
