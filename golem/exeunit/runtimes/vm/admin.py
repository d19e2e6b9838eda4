"""Administration of a Docker Engine over its SDK: versions, images, volumes, containers.

The SDK blocks, so every call runs in a thread; a few at once, each with a client of its own. It is imported at the first
call, because that takes a good part of a second. What lasts or has to be cancelled is `client`'s business.

Errors of every call: `EngineGone` when the Engine does not answer, `NoSuch` and `InUse` where no other result is named,
RuntimeFault with the Engine's own words for everything else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import trio

from golem.exeunit.runtime import RuntimeFault

if TYPE_CHECKING:
    from docker.api.client import APIClient

T = TypeVar("T")

DEFAULT_HOST = "unix:///var/run/docker.sock"
MAX_CALLS = 4  # at once
CALL_TIMEOUT_S = 30.0
IMAGE_TIMEOUT_S = 600.0  # between two answers of the Engine while it takes in an image
REMOVE_POLL_S = 0.1
MAX_ERROR_CHARS = 500
_CHUNK_BYTES = 1 << 20
OLDEST_API = "1.41"  # of Docker 20.10; spoken with every Engine that still does


class EngineGone(RuntimeFault):
    """The Engine does not answer."""


class NoSuch(RuntimeFault):
    """The Engine has no such image, volume or container."""


def socket_path(host: str | None = None) -> Path:
    """Return where the Engine listens: `host`, else `DOCKER_HOST`, else the usual place.

    Errors: ValueError for anything but unix:// (an Engine on another machine cannot share directories with us).
    """
    host = host or os.environ.get("DOCKER_HOST") or DEFAULT_HOST
    if not host.startswith("unix:///"):
        raise ValueError(f"DOCKER_HOST must be unix:///path/to/socket, not {host!r}")
    return Path(host.removeprefix("unix://"))


class InUse(RuntimeFault):
    """The Engine cannot do that while the image, volume or container is used, or the name is taken."""


@dataclass(frozen=True)
class EngineFacts:
    """What sets one Engine apart from another, as far as it matters here."""

    version: str
    api: str
    podman: bool
    rootless: bool
    seccomp: bool
    root_id: int  # user and group id on this machine of root in a container; 0: ids are not remapped
    cpus: int
    cgroups: str  # "1" or "2"
    pids_limit: bool

    @property
    def text(self) -> str:
        """The Engine in a few words."""
        kind = "podman's socket" if self.podman else "Docker Engine"
        users = f"container root is user {self.root_id}" if self.root_id else "user ids not remapped"
        rootless = ", rootless" if self.rootless else ""
        return f"{kind} {self.version} (API {self.api}), {users}{rootless}, cgroup v{self.cgroups}"


class Admin:
    """One process's way to administer one Engine."""

    def __init__(self, path: Path) -> None:
        """`path`: the Engine's socket, see `socket_path`."""
        self.path = path
        self.abandons = False  # whether every call that is cancelled is left behind in its thread: it may never return
        self._idle: list[APIClient] = []
        self._limiter = trio.CapacityLimiter(MAX_CALLS)
        self.api: str | None = None  # what is spoken with this Engine, once it has been asked

    async def _call(self, work: Callable[[APIClient], T], *, timeout_s: float = CALL_TIMEOUT_S, abandon: bool = False) -> T:
        """Run `work` in a thread. `abandon`: when cancelled, leave it behind, as what it makes does no harm."""
        try:
            return await trio.to_thread.run_sync(
                self._in_thread, work, timeout_s, limiter=self._limiter, abandon_on_cancel=abandon or self.abandons
            )
        except InterruptedError:
            await trio.lowlevel.checkpoint_if_cancelled()  # most likely why it was interrupted
            raise

    def _in_thread(self, work: Callable[[APIClient], T], timeout_s: float) -> T:
        import docker.errors
        import requests
        from docker.api.client import APIClient

        try:
            client = self._idle.pop()
        except IndexError:
            client = APIClient(base_url=f"unix://{self.path}", version=self.api or OLDEST_API, timeout=CALL_TIMEOUT_S)
        client.timeout = timeout_s
        try:
            if self.api is None:
                self.api = spoken_api(client.version(api_version=False))
                client = APIClient(base_url=f"unix://{self.path}", version=self.api, timeout=timeout_s)
            return work(client)
        except docker.errors.NotFound as error:
            raise NoSuch(_explained(error)) from None
        except docker.errors.APIError as error:
            raise (InUse if error.status_code == HTTPStatus.CONFLICT else RuntimeFault)(_explained(error)) from None
        except InterruptedError:
            raise
        except (requests.exceptions.RequestException, docker.errors.DockerException, OSError) as error:
            raise EngineGone(f"the Docker Engine at {self.path} does not answer: {_innermost(error)}") from None
        finally:
            self._idle.append(client)

    def let_go(self) -> None:
        """Close the connections that are kept for the next call; there may be one."""
        while self._idle:
            self._idle.pop().close()

    # -- the Engine
    async def version(self) -> dict[str, Any]:
        """Return what GET /version says."""
        found: dict[str, Any] = await self._call(lambda client: client.version(api_version=False), abandon=True)
        return found

    async def info(self) -> dict[str, Any]:
        """Return what GET /info says."""
        found: dict[str, Any] = await self._call(lambda client: client.info(), abandon=True)
        return found

    async def facts(self) -> EngineFacts:
        """Ask who the Engine is."""
        version, info = await self.version(), await self.info()
        options = [str(option) for option in info.get("SecurityOptions") or ()]
        return EngineFacts(
            version=str(version.get("Version", "?")),
            api=str(version.get("ApiVersion", "0")),
            podman=any("podman" in str(part.get("Name", "")).lower() for part in version.get("Components") or ()),
            rootless=any("name=rootless" in option for option in options),
            seccomp=any("name=seccomp" in option for option in options),
            root_id=_root_id(options, str(info.get("DockerRootDir", ""))),
            cpus=int(info.get("NCPU") or 1),
            cgroups=str(info.get("CgroupVersion") or "1"),
            pids_limit=bool(info.get("PidsLimit")),
        )

    # -- images
    async def load_image(self, chunks: Iterator[bytes]) -> list[str]:
        """Take in a Docker archive, compressed or not; returns names and ids (`sha256:...`) of its images.

        `chunks` is called in a thread; an InterruptedError of it breaks the load off.
        """
        return await self._call(lambda client: _loaded(client.load_image(chunks)), timeout_s=IMAGE_TIMEOUT_S)

    async def import_image(self, rootfs: BinaryIO, tag: str, changes: Sequence[str] = ()) -> str:
        """Make an image called `tag` (`name:tag`) of a root file system as tar; returns its id.

        `changes` are lines of a Dockerfile (CMD, ENTRYPOINT, ENV, EXPOSE, USER, VOLUME, WORKDIR).
        """
        repository, _, label = tag.rpartition(":")

        def work(client: APIClient) -> str:
            text = client.import_image(_chunks(rootfs), repository, label, changes=list(changes))
            if '"error"' in text:
                raise RuntimeFault(f"Docker Engine: {text[-MAX_ERROR_CHARS:]}")
            return str(client.inspect_image(tag)["Id"])

        return await self._call(work, timeout_s=IMAGE_TIMEOUT_S, abandon=True)

    async def inspect_image(self, name: str) -> dict[str, Any] | None:
        """Return what the Engine knows of an image, None if it has none of that name or id."""
        try:
            found: dict[str, Any] = await self._call(lambda client: client.inspect_image(name), abandon=True)
        except NoSuch:
            return None
        return found

    async def list_images(self, reference: str) -> list[dict[str, Any]]:
        """List the images with a name like `reference` (such as `golem/*`)."""
        filters = {"reference": reference}
        found: list[dict[str, Any]] = await self._call(lambda client: client.images(filters=filters), abandon=True)
        return found

    async def remove_image(self, name: str) -> bool:
        """Remove a name, and the image when it was its last; False where a container uses it or it is gone."""
        try:
            await self._call(lambda client: client.remove_image(name), timeout_s=IMAGE_TIMEOUT_S)
        except (NoSuch, InUse):
            return False
        return True

    async def image_ids_in_use(self) -> frozenset[str]:
        """Return the image ids of all containers, running or not."""
        found: list[dict[str, Any]] = await self._call(lambda client: client.containers(all=True), abandon=True)
        return frozenset(str(entry["ImageID"]) for entry in found)

    async def root_dir(self) -> Path | None:
        """Return the directory of this machine where the Engine keeps its data."""
        path = (await self.info()).get("DockerRootDir")
        return Path(path) if isinstance(path, str) and path.startswith("/") else None

    # -- volumes
    async def create_volume(self, name: str, options: Mapping[str, str], labels: Mapping[str, str]) -> None:
        """Make a volume of the `local` driver with its `options`."""
        await self._call(lambda client: client.create_volume(name, "local", dict(options), dict(labels)))

    async def volumes(self, label: str) -> list[dict[str, Any]]:
        """List the volumes that have a label."""
        found: dict[str, Any] = await self._call(lambda client: client.volumes({"label": label}), abandon=True)
        return found.get("Volumes") or []

    async def remove_volume(self, name: str) -> None:
        """Remove a volume; one that is not there is no error."""
        await self._gone(lambda client: client.remove_volume(name))

    # -- containers
    async def create_container(self, name: str, config: Mapping[str, Any]) -> str:
        """Make a container of a body as POST /containers/create takes it; returns its id."""
        made = await self._call(lambda client: client.create_container_from_config(dict(config), name))
        return str(made["Id"])

    async def start_container(self, name: str) -> None:
        """Start a container that was created."""
        await self._call(lambda client: client.start(name))

    async def inspect_container(self, name: str) -> dict[str, Any] | None:
        """Return what the Engine knows of a container, None if there is none of that name or id."""
        try:
            found: dict[str, Any] = await self._call(lambda client: client.inspect_container(name), abandon=True)
        except NoSuch:
            return None
        return found

    async def containers(self, label: str) -> list[dict[str, Any]]:
        """List the containers that have a label, also those that do not run."""
        found: list[dict[str, Any]] = await self._call(
            lambda client: client.containers(all=True, filters={"label": label}), abandon=True
        )
        return found

    async def remove_container(self, name: str) -> None:
        """Kill and remove a container and its anonymous volumes; one that is not there is no error."""
        while True:
            try:
                await self._gone(lambda client: client.remove_container(name, v=True, force=True))
                return
            except InUse:  # somebody else is removing it: until that is done it is there
                await trio.sleep(REMOVE_POLL_S)

    async def _gone(self, work: Callable[[APIClient], object]) -> None:
        try:
            await self._call(work, abandon=True)
        except NoSuch:
            pass


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    """Cut a file into parts as HTTP sends them; given the file itself, the SDK would send small ones."""
    return iter(lambda: file.read(_CHUNK_BYTES), b"")


def _loaded(answers: Any) -> list[str]:
    names = []
    for answer in answers:
        if "error" in answer:
            raise RuntimeFault(f"Docker Engine: {str(answer['error'])[:MAX_ERROR_CHARS]}")
        match = re.match(r"Loaded image(?: ID)?: (\S+)", str(answer.get("stream", "")))
        if match is not None:
            names.append(match[1])
    return names


def _root_id(options: Sequence[str], root_dir: str) -> int:
    """Return the user id of container root; an Engine with remapped ids has it in the name of its directory."""
    match = re.search(r"/(\d{1,10})\.(\d{1,10})/*\Z", root_dir)
    return int(match[1]) if match and any("name=userns" in option for option in options) else 0


def spoken_api(version: Mapping[str, Any]) -> str:
    """Return the API to speak with an Engine, from its answer to `version`: the oldest of ours that it takes."""
    return max(OLDEST_API, str(version.get("MinAPIVersion") or OLDEST_API), key=_number)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d{1,6}", version))


def _explained(error: Any) -> str:
    text = error.explanation
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return f"Docker Engine: {str(text or error)[:MAX_ERROR_CHARS]}"


def _innermost(error: BaseException) -> str:
    """Return the words of the system in what the HTTP library has wrapped around them."""
    found = re.search(r"(?:FileNotFoundError|ConnectionRefusedError|PermissionError)\(\d+, '([^']*)'\)", str(error))
    return found[1] if found else type(error).__name__
