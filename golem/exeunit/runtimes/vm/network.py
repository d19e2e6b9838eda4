"""The way from an exe-unit to services inside its container, which has no network but its own loopback.

A socket belongs to the network namespace it was made in, so one is made by a thread that has entered the container's and
never does anything else; connecting it can then be done anywhere.
Neighbour: `golem.exeunit.runtimes.vm.runtime`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading

import trio

from golem.exeunit.runtime import RuntimeFault

CONNECT_TIMEOUT_S = 10.0
_CLONE_NEWNET = 0x40000000
_LOOPBACK = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_libc = ctypes.CDLL(None, use_errno=True)


class GuestNetwork:
    """The network namespace of a container, held open until `close`."""

    def __init__(self, pid: int) -> None:
        """`pid`: a process of the container; check after this that it still is. Raises OSError, also where it shares
        our network.
        """
        self._descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(self._descriptor).st_ino == os.stat("/proc/self/ns/net").st_ino:
            self.close()
            raise OSError(errno.EPERM, "the container shares this machine's network")

    def close(self) -> None:
        """Let go of the namespace; may be repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    async def connect(self, port: int) -> trio.SocketStream:
        """Connect to a TCP port on the container's loopback. Errors: RuntimeFault."""
        if not 0 < port < 65536:
            raise RuntimeFault(f"not a port: {port}")
        problem = "nothing listens there"
        for family, address in _LOOPBACK:
            try:
                inner = trio.socket.from_stdlib_socket(self._socket(family))
            except OSError as error:
                problem = error.strerror or str(error)
                continue
            try:
                with trio.fail_after(CONNECT_TIMEOUT_S):
                    await inner.connect((address, port))
            except (OSError, trio.TooSlowError) as error:
                inner.close()
                if family == socket.AF_INET and not isinstance(error, ConnectionRefusedError):
                    problem = getattr(error, "strerror", None) or "no answer"
                continue
            except BaseException:
                inner.close()
                raise
            return trio.SocketStream(inner)
        raise RuntimeFault(f"cannot connect to port {port} in the container: {problem}")

    def _socket(self, family: int) -> socket.socket:
        """Make a socket in the namespace; takes well below a millisecond."""
        made: list[socket.socket | OSError] = []

        def inside() -> None:
            if _libc.setns(self._descriptor, _CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                made.append(OSError(code, f"the container's network cannot be entered: {os.strerror(code)}"))
                return
            try:
                made.append(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=inside, name="guest network")  # of no pool: its namespace stays changed
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]
