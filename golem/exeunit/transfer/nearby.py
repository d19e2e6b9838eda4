"""Public addresses that are not far away: this machine's own, and those of its neighbours on the same link.

What listens there may trust its network: a firewall stands at the edge, and not between neighbours.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_ROUTES = Path("/proc/net/route"), Path("/proc/net/ipv6_route")
_MAX_TABLE_BYTES = 64 << 20
_UP, _GATEWAY, _REJECT = 0x1, 0x2, 0x200
# Shorter prefixes without a gateway are no neighbourhood: they stand for everything, as tunnels have it.
_LEAST_BITS = {4: 8, 6: 16}


def is_own(ip: Address) -> bool:
    """Return whether an address leads back to this machine: the kernel would speak to it from itself. Sends nothing."""
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((str(ip), 9))
        return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]) == ip
    return False


def links() -> list[Network]:
    """Return the networks that this machine is on: those of its addresses, and those it has a route to without a gateway.

    An address from DHCPv6 names no network, and neither does one end of a link of two: there the routes alone tell.
    """
    found: list[Network] = []
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6) and entry.netmask:
                with suppress(ValueError):
                    address = ipaddress.ip_address(entry.address.partition("%")[0])
                    bits = int(ipaddress.ip_address(entry.netmask)).bit_count()
                    found.append(ipaddress.ip_network(f"{address}/{bits}", strict=False))
    found += (one for path in _ROUTES for one in _routes(path) if one.prefixlen >= _LEAST_BITS[one.version])
    return found


def _routes(path: Path) -> Iterator[Network]:
    """Yield the networks that a table of the kernel has routes to without a gateway."""
    with suppress(OSError), path.open() as table:  # a kernel without IPv6 has no such file
        for line in table.read(_MAX_TABLE_BYTES).splitlines():
            words = line.split()
            with suppress(ValueError, IndexError):
                if len(words) == 10:
                    flags, size, packed = int(words[8], 16), int(words[1], 16), bytes.fromhex(words[0])
                else:  # words of 32 bits in the machine's byte order
                    flags, size = int(words[3], 16), int(words[7], 16).bit_count()
                    packed = int(words[1], 16).to_bytes(4, sys.byteorder)
                if flags & _UP and not flags & (_GATEWAY | _REJECT):
                    yield ipaddress.ip_network((packed, size), strict=False)


def is_neighbour(ip: Address) -> bool:
    """Return whether an address is on a link of this machine."""
    return any(ip in network for network in links() if network.version == ip.version and network.prefixlen)
