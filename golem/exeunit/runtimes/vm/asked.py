"""What an image and a request ask for together: volumes, ports, a command, where programs are looked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from golem.exeunit.runtime import RuntimeFault, VolumeRequest
from golem.exeunit.runtimes.vm.container import NAME_FILES
from golem.exeunit.runtimes.vm.images import EngineImage

MAX_VOLUMES = 64


def volume_requests(image: EngineImage, asked: Sequence[VolumeRequest]) -> list[VolumeRequest]:
    """Return the image's volumes and those asked for, whose kind counts where both name a path."""
    found = {path: VolumeRequest(path) for path in image.volumes} | {request.path: request for request in asked}
    if len(found) > MAX_VOLUMES:
        raise RuntimeFault(f"too many volumes: {len(found)}, at most {MAX_VOLUMES}")
    for path in found:
        if path == "/" or path.split("/")[1] in ("proc", "sys", "dev", ".golem") or path in NAME_FILES:
            raise RuntimeFault(f"a volume cannot be at {path}")
    return list(found.values())


def path_of(inspected: Mapping[str, Any]) -> str:
    """Return the PATH of a container, "" if it has none of its own."""
    words = (inspected.get("Config") or {}).get("Env") or ()
    return next((str(word)[5:] for word in reversed(words) if str(word).startswith("PATH=")), "")


def tcp_ports(image: EngineImage) -> tuple[int, ...]:
    """Return the ports that the image says it listens on."""
    found = (re.fullmatch(r"(\d{1,5})(?:/tcp)?", port) for port in image.ports)
    return tuple(sorted({int(match[1]) for match in found if match is not None and 0 < int(match[1]) < 65536}))


def command_of(image: EngineImage, entry_point: str, args: Sequence[str]) -> list[str]:
    """Return the words of a command; without an entry point they are the image's own. Raises RuntimeFault."""
    argv = [entry_point, *args] if entry_point else [*image.entrypoint, *(args or image.cmd)]
    if not argv:
        raise RuntimeFault("an empty entry point stands for the image's own ENTRYPOINT or CMD, and it has none")
    return argv
