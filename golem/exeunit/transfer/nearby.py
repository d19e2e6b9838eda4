"""Public addresses that are not far away: this machine's own, and those of its neighbours on the same link.

What listens there may trust its network: a firewall stands at the edge, and not between neighbours.
"""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress

import psutil

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def is_own(ip: Address) -> bool:
    """Return whether an address leads back to this machine: the kernel would speak to it from itself. Sends nothing."""
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((str(ip), 9))
        return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]) == ip
    return False


def links() -> list[Network]:
    """Return the networks that this machine is on."""
    found: list[Network] = []
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6) and entry.netmask:
                with suppress(ValueError):
                    address = ipaddress.ip_address(entry.address.partition("%")[0])
                    bits = int(ipaddress.ip_address(entry.netmask)).bit_count()
                    found.append(ipaddress.ip_network(f"{address}/{bits}", strict=False))
    return found


def is_neighbour(ip: Address) -> bool:
    """Return whether an address is on a link of this machine."""
    return any(ip in network for network in links() if network.version == ip.version and network.prefixlen)
