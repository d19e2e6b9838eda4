"""A Docker Engine of our own on this machine, for demo, tests and benchmarks: nothing of the system's Engine is touched.

It runs without systemd, bridge and firewall rules, on a socket below one folder, and is gone when the block ends: the
containers, their mounts and the folder's content with it. It takes root and the `dockerd` program (Debian: docker.io).
A provider's own Engine is used by `DOCKER_HOST`, not by this.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
DRIVERS = ("overlay2", "vfs")  # the second is slow and works everywhere
_MAX_SOCKET_PATH_BYTES = 107


class LocalEngineError(Exception):
    """The Engine cannot be started here; the text says why."""


def missing() -> str | None:
    """Return why no Engine can be started on this machine, None if one can."""
    if os.geteuid() != 0:
        return "a Docker Engine of our own needs root"
    absent = [name for name in ("dockerd", "containerd", "runc") if shutil.which(name) is None]
    return f"no {', '.join(absent)} on this machine (Debian: apt-get install docker.io)" if absent else None


class LocalEngine:
    """An Engine that this process started. `host` is what `DOCKER_HOST` wants."""

    def __init__(self, folder: Path, userns: bool = True) -> None:
        """`userns`: whether containers' user ids are remapped."""
        self.folder, self.userns = folder, userns
        self.socket = folder / "docker.sock"
        self.host = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start (again) and return when the API answers. Raises `LocalEngineError`."""
        if problem := missing():
            raise LocalEngineError(problem)
        if len(os.fsencode(self.socket)) > _MAX_SOCKET_PATH_BYTES:
            raise LocalEngineError(f"the path is too long for a socket: {self.socket}")
        self.folder.mkdir(parents=True, exist_ok=True)
        for driver in DRIVERS:
            if self._start(driver):
                return
        raise LocalEngineError(f"dockerd did not start:\n{self.log_tail()}")

    def _start(self, driver: str) -> bool:
        flags = ["--userns-remap=default"] if self.userns else []
        with (self.folder / "dockerd.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["dockerd", "--data-root", self.folder / "data", "--exec-root", self.folder / "exec",
                 "--pidfile", self.folder / "docker.pid", "-H", self.host, "--iptables=false", "--ip6tables=false",
                 "--ip-forward=false", "--ip-masq=false", "--bridge=none", "--userland-proxy=false",
                 "--exec-opt", "native.cgroupdriver=cgroupfs", "--storage-driver", driver, *flags],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._answers():
                return True
            time.sleep(0.02)
        self.stop()
        return False

    def _answers(self) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(2)
            sock.connect(str(self.socket))
            sock.sendall(b"GET /_ping HTTP/1.0\r\nHost: engine\r\n\r\n")
            return b" 200 " in sock.recv(64)
        return False

    def stop(self, sign: int = signal.SIGTERM) -> None:
        """End the Engine's process; with SIGKILL the containers it ran live on."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(sign)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def remove(self) -> None:
        """Take away what a stopped Engine left: processes of its folder, mounts, files."""
        for pid in self._own_processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for point in reversed(self._mounts()):
            subprocess.run(["umount", "--lazy", point], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _own_processes(self) -> list[int]:
        """Return containerd and its shims, which name our exec root, and what runs in containers of our folder."""
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and self._is_own(Path("/proc", name))]

    def _is_own(self, process: Path) -> bool:
        with suppress(OSError):
            if os.fsencode(self.folder / "exec") in (process / "cmdline").read_bytes():
                return True
            for line in (process / "mountinfo").read_text().splitlines():
                if line.split()[4] == "/":  # of a container that outlived its shim: an overlay of directories of ours
                    return f"{self.folder / 'data'}/" in line
        return False

    def _mounts(self) -> list[str]:
        inside = f"{self.folder.resolve()}/"
        points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
        return [point for point in points if point.startswith(inside)]

    def log_tail(self, lines: int = 15) -> str:
        """Return the end of the Engine's log."""
        with suppress(OSError):
            return "\n".join((self.folder / "dockerd.log").read_text(errors="replace").splitlines()[-lines:])
        return "(no log)"


@contextmanager
def open_engine(folder: Path, userns: bool = True) -> Iterator[LocalEngine]:
    """Run an Engine on `folder` for the length of the block. Raises `LocalEngineError`."""
    engine = LocalEngine(folder, userns)
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()
        engine.remove()
