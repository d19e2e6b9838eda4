"""Who listens on a TCP port of this machine, as the kernel says it: whoever has a node's port gets its agents' app-keys."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"
_NODES = ("golem", "yagna", "golem.cli")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket: its address, its user and its inode."""

    address: Address
    uid: int
    inode: str


def listeners(port: int) -> list[Listener]:
    """Return who listens on a port, at any address. Raises `OSError` where the kernel does not tell."""
    found = []
    for table in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):  # a kernel without IPv6
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                address, _, hex_port = words[1].rpartition(":")
                if words[3] == _LISTEN and int(hex_port, 16) == port:
                    found.append(Listener(_address(address), int(words[7]), words[9]))
    return found


def of_others(host: str, port: int) -> list[Listener]:
    """Return who of another user would hear those that ask for `host` (an IP address, or localhost) and `port`."""
    return [one for one in _heard(host, port) if one.uid != os.geteuid()]


def may_hear_keys(host: str, port: int) -> bool:
    """Return whether somebody listens there, and none but our user and root, who can read them anyway."""
    heard = _heard(host, port)
    return bool(heard) and all(one.uid in (os.geteuid(), 0) for one in heard)


def is_our_node(host: str, port: int) -> bool:
    """Return whether somebody listens there, and all who do are nodes of our user."""
    heard = _heard(host, port)
    return bool(heard) and all(one.uid == os.geteuid() and _is_node(one) for one in heard)


def _heard(host: str, port: int) -> list[Listener]:
    try:
        asked = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        asked = ipaddress.ip_address("127.0.0.1")
    near = asked.is_loopback or asked.is_unspecified  # people say localhost for both families
    return [
        one for one in listeners(port)
        if one.address == asked or one.address.is_unspecified or asked.is_unspecified or (near and one.address.is_loopback)
    ]  # fmt: skip


def _is_node(listener: Listener) -> bool:
    for pid in _holders(listener.inode):
        if pid == os.getpid():
            return True
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(os.path.basename(word) in _NODES for word in words):
                return True
    return False


def _holders(inode: str) -> Iterator[int]:
    """Yield the processes of ours that have a socket open."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            for handle in os.listdir(f"/proc/{name}/fd"):
                with suppress(OSError):
                    if os.readlink(f"/proc/{name}/fd/{handle}") == f"socket:[{inode}]":
                        yield int(name)


def _address(text: str) -> Address:
    """Return an address as `/proc/net` writes it: words of 32 bits in the machine's byte order."""
    raw = bytes.fromhex(text)
    words = (raw[at : at + 4] for at in range(0, len(raw), 4))
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    found = ipaddress.ip_address(packed)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found
