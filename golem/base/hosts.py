"""Which host an address or a `Host` header names: read in the one form that all programs read alike. Pure but for our name.

A website can have its name lead to this machine, and its pages then speak to what listens here as to their own site. What
serves without a key serves those alone who name it by an address or by a name of this machine (`is_of_this_machine`).
"""

from __future__ import annotations

import ipaddress
import re
import socket

WEB = {b"http": 80, b"https": 443, b"ws": 80, b"wss": 443}  # schemes of the web, with their ports
_AUTHORITY = re.compile(rb"(\[[0-9A-Fa-f:]{2,39}\]|[A-Za-z0-9._-]{1,253})(?::([1-9]\d{0,4}))?\Z")
_LABEL = re.compile(rb"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\Z")
_NUMBER = re.compile(rb"(?:\d+|0x[0-9a-f]*)\Z")  # as the last label: the name is an address in some spelling


def read_authority(authority: bytes, scheme: bytes) -> tuple[bytes, int] | None:
    """Return host and port of an authority in canonical form, None for any other: clients would read it in several ways."""
    match = _AUTHORITY.match(authority)
    if match is None or (port := int(match[2] or WEB[scheme or b"http"])) > 65535:
        return None
    host = match[1].lower()
    if host.startswith(b"["):
        try:
            return (host, port) if str(ipaddress.IPv6Address(host[1:-1].decode())).encode() == host[1:-1] else None
        except ValueError:
            return None
    labels = host.split(b".")
    if _NUMBER.match(labels[-1]):
        try:
            return (str(ipaddress.IPv4Address(host.decode())).encode(), port)
        except ValueError:
            return None
    return (host, port) if all(_LABEL.match(label) for label in labels) else None


def is_this_machine(host: bytes) -> bool:
    """Return whether a canonical host is loopback, or an address that stands for no machine but one's own."""
    if host == b"localhost" or host.endswith(b".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.strip(b"[]").decode())
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        packed = int(address)
        inner = packed & 0xFFFFFFFF
        if packed > 1 and (packed >> 32 in (0, 0xFFFF, 0xFFFF << 16, 0x64FF9B << 64) or address.sixtofour is not None):
            address = address.sixtofour or ipaddress.IPv4Address(inner)
    return address.is_loopback or address.is_unspecified or int(address) >> 24 == 0


def is_of_this_machine(authority: bytes) -> bool:
    """Return whether a `Host` header names who serves here: by any address, as localhost, or by this machine's own name."""
    found = read_authority(authority, b"http")
    if found is None:
        return False
    host = found[0]
    own = socket.gethostname().lower().encode("ascii", "ignore")
    is_address = host.startswith(b"[") or _NUMBER.match(host.rpartition(b".")[2]) is not None
    return is_address or is_this_machine(host) or host in (own, own + b".local")
