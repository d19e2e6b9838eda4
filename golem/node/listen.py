"""The socket of the REST API: bound before anything else, and by our own user alone; and what systemd is told."""

from __future__ import annotations

import logging
import os
import socket

from golem.base.ports import is_our_node, of_others
from golem.config import Config, ConfigError

log = logging.getLogger("golem.node")


def bind_api(config: Config) -> socket.socket:
    """Return the socket of the REST API. Raises `ConfigError`.

    Another free port stands for the default one only where a node of our own user has that: agents bring their keys to it.
    """
    host, port, by_default = config.api_host, config.api_port, not config.api_port_fixed
    try:
        sock = _listening(host, port)
    except OSError as error:
        if not by_default or not is_our_node(host, port):
            advice = "" if isinstance(error, socket.gaierror) else _whose(host, port)
            raise ConfigError(f"cannot serve REST on {host}:{port}: {error.strerror or error}{advice}") from None
        sock = _listening(host, 0)
    if port and (strangers := of_others(host, sock.getsockname()[1])):
        sock.close()
        beside = ", ".join(str(one.address) for one in strangers)
        raise ConfigError(f"cannot serve REST on {host}:{port}: the port is another user's at {beside}{_whose(host, port)}")
    return sock


def _listening(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _notice_lost_clients(sock)
        sock.bind((host, port))
        sock.listen(256)  # until the server, which says its own
    except OSError:
        sock.close()
        raise
    return sock


def _whose(host: str, port: int) -> str:
    """Return what to do about a port that somebody has."""
    holders = {one.uid for one in of_others(host, port)}
    who = f" (user {', '.join(map(str, sorted(holders)))} has it, and would get the app-keys of your agents)" if holders else ""
    return f"{who}; end what listens there, or choose with --api-url (http://127.0.0.1:0 is any free port)"


def _notice_lost_clients(sock: socket.socket) -> None:
    """Have connections end whose client is gone without a word, or takes nothing any more; accepted ones inherit it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 60_000)):
        if (number := getattr(socket, option, None)) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, number, value)


def notify_systemd(state: str) -> None:
    """Tell systemd, where it started us, of a state (`READY=1`)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect("\0" + address[1:] if address.startswith("@") else address)
                sock.send(state.encode())
            except OSError as error:
                log.warning("cannot notify systemd: %s", error)
