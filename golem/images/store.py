"""The images that this node's user has pushed: files named by their SHA3-224, found by tag, hash or alias.

Requestors' scripts ask the REST API for a tag (`golem/rest/registry.py`) and get a `gftp://` URL, from which providers on
any machine fetch the image over the network of the nodes (`golem/files/server.py`). `golem image` fills the store.

One folder of the data directory: `<sha3>` is an image, `index.json` knows names and dates, `.*.part` is on its way in.
A file takes its name only when all of it is on the disk, the index is replaced whole, and the image is there before the
index says so; thus a crash loses at most the names of the image that was arriving. What lies there under a hash and is
not in the index is taken up again without names. Files are cloned where the file system can, else copied, and never
linked: a link would change with the user's file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio

from golem.base import settings_file
from golem.files.on_disk import FileSource
from golem.files.outgoing import FileIdentity, identity_of
from golem.private_files import write_private
from protocol.gftp import FileFault

log = logging.getLogger("golem.images.store")

IMAGES = "images"  # the folder in the data directory
INDEX = "index.json"
MAX_INDEX_BYTES = 64 << 20
PART_SUFFIX = ".part"
MAX_IMAGE_BYTES = 64 << 30
MAX_IMAGES = 1000
MAX_NAMES = 32  # tags of one image, and aliases of one
MAX_PUSHES = 4  # at a time
MAX_ENDED_PUSHES = 32  # whose end nobody has asked for yet
SPARE_BYTES = 64 << 20  # left free on the disk, which the journal shares
STEP_BYTES = 4 << 20
MAX_TAG_LENGTH = 255
DEFAULT_TAG = "latest"
_SHA3_224 = re.compile(r"[0-9a-f]{56}")
_ALIAS = re.compile(r"[0-9a-f]{40,128}")
_PART = r"[A-Za-z0-9][A-Za-z0-9._\-]*"
_TAG = re.compile(rf"(?P<name>{_PART}(:[0-9]{{1,5}}(?=/))?(/{_PART})*)(:(?P<version>[A-Za-z0-9_][A-Za-z0-9._\-]{{0,127}}))?")
_FICLONE = 0x40049409  # linux/fs.h


class RegistryError(ValueError):
    """What was asked for cannot be done; the text is for people."""


class Publisher(Protocol):
    """Who makes files readable for other nodes: `golem.files.server.FileServer`."""

    def offer(self, name: str, what: FileSource, owner: object) -> None: ...

    def withdraw(self, name: str, owner: object) -> bool: ...


class StoredImage(msgspec.Struct, frozen=True, kw_only=True):
    """One image. `sha3` is that of the file, 56 hex digits; `format` and `source` are what the pusher said of it."""

    sha3: str
    size: int
    created: float  # seconds since the epoch
    format: str = ""
    source: str = ""
    tags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()  # hashes that scripts may ask for instead

    @property
    def published_name(self) -> str:
        """The name under which other nodes find the file."""
        return f"image-{self.sha3}"

    def url(self, node_id: str) -> str:
        """Return the URL for providers, who fetch over the network of the nodes: REST need not be in their reach."""
        return f"gftp://{node_id}/{self.published_name}"

    def link(self, api_url: str) -> str:
        """Return the URL of the file at a REST API."""
        return f"{api_url.rstrip('/')}/v1/image/{self.sha3}"


class _Index(msgspec.Struct, frozen=True):
    version: int
    images: tuple[StoredImage, ...]


@dataclass(frozen=True)
class PushOrder:
    """What to take in. A file in the store's own folder is moved, any other one copied."""

    path: Path
    tags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    format: str = ""
    source: str = ""
    identity: FileIdentity | None = None  # of the file that was meant, where others might put another into its place


@dataclass
class Push:
    """An image on its way in."""

    order: PushOrder
    done_bytes: int = 0
    total_bytes: int = 0
    image: StoredImage | None = None
    failure: str = ""
    ended: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


def normal_tag(text: str) -> str:
    """Return a tag as it is kept: `alpine` is `alpine:latest`. Raises `RegistryError`."""
    match = _TAG.fullmatch(text) if len(text) <= MAX_TAG_LENGTH else None
    if match is None:
        raise RegistryError(f"not an image tag: {text[:80]!r} (expected a name such as alpine:3.20 or team/render)")
    return f"{match['name']}:{match['version'] or DEFAULT_TAG}"


def is_tag(text: str) -> bool:
    """Return whether a text could be a tag (digits of a hash could)."""
    return len(text) <= MAX_TAG_LENGTH and _TAG.fullmatch(text) is not None


def normal_hash(text: str) -> str:
    """Return a hash in lower case, without the prefixes it comes with. Raises `RegistryError`."""
    digits = text.strip().lower().removeprefix("sha3:").removeprefix("sha256:").removeprefix("0x")
    if not _ALIAS.fullmatch(digits):
        raise RegistryError(f"not a hash: {text[:80]!r} (expected 40 to 128 hex digits; an image's SHA3-224 has 56)")
    return digits


class Registry:
    """The store. Its files are this process's alone: the data directory is locked."""

    def __init__(self, folder: Path, publisher: Publisher, now: Callable[[], float], max_bytes: int) -> None:
        """Open the store and publish what is in it. `max_bytes` bounds all images together. Raises `OSError`."""
        self.folder, self.max_bytes = folder, max_bytes
        self._publisher, self._now = publisher, now
        self._images: dict[str, StoredImage] = {}
        self._incoming_bytes = 0
        self._pushes: dict[str, Push] = {}
        self._nursery: trio.Nursery | None = None
        self._writing = trio.Lock()
        self._limiter = trio.CapacityLimiter(2)  # hashing takes a core for each
        folder.mkdir(mode=0o700, exist_ok=True)
        self._open()

    # -- reading
    def images(self) -> list[StoredImage]:
        """Return all images, oldest first."""
        return sorted(self._images.values(), key=lambda image: (image.created, image.sha3))

    def by_tag(self, tag: str) -> StoredImage | None:
        """Return the image of a tag. Raises `RegistryError` for what is no tag."""
        wanted = normal_tag(tag)
        return next((image for image in self._images.values() if wanted in image.tags), None)

    def by_hash(self, digest: str) -> StoredImage | None:
        """Return the image with a SHA3-224 or an alias. Raises `RegistryError` for what is no hash."""
        wanted = normal_hash(digest)
        return self._images.get(wanted) or next((image for image in self._images.values() if wanted in image.aliases), None)

    def exactly(self, sha3: str) -> StoredImage | None:
        """Return the image whose file has this SHA3-224, aliases apart."""
        return self._images.get(sha3.lower())

    def named(self, name: str) -> StoredImage:
        """Return the image of a tag, a hash, an alias, or eight and more first digits of one hash. Raises `RegistryError`."""
        found = self.by_tag(name) if is_tag(name) else None
        digits = name.strip().lower().removeprefix("sha3:").removeprefix("0x")
        if found is None and re.fullmatch(r"[0-9a-f]{8,128}", digits):
            matching = {image.sha3: image for image in self._images.values() if image.sha3.startswith(digits)}
            if len(matching) > 1:
                raise RegistryError(f"{len(matching)} images have a hash that begins with {digits}: give more of it")
            found = next(iter(matching.values()), None) or (self.by_hash(digits) if _ALIAS.fullmatch(digits) else None)
        if found is None:
            raise RegistryError(f"no image {name[:80]!r} in this node's registry (see golem image list)")
        return found

    def path(self, image: StoredImage) -> Path:
        """Return where an image's file lies."""
        return self.folder / image.sha3

    def total_bytes(self) -> int:
        """Return the size of all images together."""
        return sum(image.size for image in self._images.values())

    # -- pushing
    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Carry out pushes until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def begin(self, order: PushOrder, number: str) -> None:
        """Begin to take in an image, under an id for `push` and `cancel` that the caller chose. Raises `RegistryError`."""
        if number in self._pushes or not 8 <= len(number) <= 64:
            raise RegistryError("not a new push")
        if sum(not push.ended.is_set() for push in self._pushes.values()) >= MAX_PUSHES:
            raise RegistryError(f"{MAX_PUSHES} images are being pushed already: try again when one is done")
        assert self._nursery is not None
        checked = PushOrder(order.path, *_checked_names(order.tags, order.aliases), order.format[:80], order.source[:255],
                            order.identity)  # fmt: skip
        ended = [old for old, push in self._pushes.items() if push.ended.is_set()]
        for old in ended[: max(0, len(ended) - MAX_ENDED_PUSHES + 1)]:
            del self._pushes[old]
        self._pushes[number] = Push(checked)
        self._nursery.start_soon(self._carry_out, self._pushes[number])

    def push(self, number: str) -> Push:
        """Return a push that `begin` gave out. Raises `RegistryError`."""
        if number not in self._pushes:
            raise RegistryError("no such push: the node was started anew, or its end was long ago")
        return self._pushes[number]

    def cancel(self, number: str) -> bool:
        """Give up a push; returns whether nothing of it stays: one that has ended is left alone."""
        push = self._pushes.get(number)
        if push is not None:
            push.scope.cancel()
        return push is None or push.image is None

    async def _carry_out(self, push: Push) -> None:
        try:
            with push.scope:
                push.image = await self.add(push.order, push)
            if push.image is None:
                push.failure = "given up"
        except RegistryError as error:
            push.failure = str(error)
        except OSError as error:
            push.failure = _disk_text(error)
        finally:
            push.ended.set()

    async def add(self, order: PushOrder, push: Push | None = None) -> StoredImage:
        """Take in an image, hashing it; the same content once more only adds its names. Raises `RegistryError`, `OSError`."""
        push = push or Push(order)
        tags, aliases = _checked_names(order.tags, order.aliases)
        part, sha3, size = await self._take_in(order.path, push)
        try:
            async with self._writing:
                held = self._images.get(sha3)
                if held is None and len(self._images) >= MAX_IMAGES:
                    raise RegistryError(f"the registry holds {MAX_IMAGES} images: remove some (golem image remove)")
                base = held or StoredImage(sha3=sha3, size=size, created=self._now())
                image = msgspec.structs.replace(
                    base, tags=_joined("tags", base.tags, tags), aliases=_joined("aliases", base.aliases, aliases),
                    format=order.format or base.format, source=order.source or base.source,
                )  # fmt: skip
                if held is None:
                    os.rename(part, self.path(image))
                try:
                    await self._keep(image)
                except OSError:
                    if held is None:
                        self.path(image).unlink()
                    raise
                self._publish(image)
            return image
        finally:
            part.unlink(missing_ok=True)

    async def _keep(self, image: StoredImage) -> None:
        """Put an image into the index; its names leave the images that had them."""
        images = {}
        for sha3, other in self._images.items():
            tags = tuple(tag for tag in other.tags if tag not in image.tags)
            aliases = tuple(alias for alias in other.aliases if alias not in image.aliases)
            images[sha3] = msgspec.structs.replace(other, tags=tags, aliases=aliases)
        images[image.sha3] = image
        await self._write_index(images)

    # -- removing
    async def remove(self, name: str) -> StoredImage:
        """Remove a tag, and with its last one the image; by hash the image at once. Returns it as it was.

        Downloads that are under way end early. Raises `RegistryError`, `OSError`.
        """
        async with self._writing:
            image = self.named(name)
            tag = normal_tag(name) if is_tag(name) else ""
            rest = tuple(one for one in image.tags if one != tag)
            if tag in image.tags and rest:
                await self._keep(msgspec.structs.replace(image, tags=rest))
                return image
            self._publisher.withdraw(image.published_name, self)
            self.path(image).unlink(missing_ok=True)  # before the index: or it would be taken up again after a crash
            self._images = {sha3: other for sha3, other in self._images.items() if sha3 != image.sha3}
            await self._write_index(self._images)
            return image

    # -- the folder
    def _open(self) -> None:
        for part in self.folder.glob(f".*{PART_SUFFIX}"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        for image in self._read_index():
            try:
                if self.path(image).stat().st_size == image.size:
                    self._images[image.sha3] = image
                else:
                    log.warning("image %s has changed on the disk and is left out", image.sha3)
                    self.path(image).unlink()
            except FileNotFoundError:
                log.warning("image %s is gone from the disk", image.sha3)
        for path in self.folder.iterdir():
            if _SHA3_224.fullmatch(path.name) and path.name not in self._images and path.is_file():
                status = path.stat()
                self._images[path.name] = StoredImage(sha3=path.name, size=status.st_size, created=status.st_mtime)
        for image in self._images.values():
            self._publish(image)

    def _read_index(self) -> tuple[StoredImage, ...]:
        path = self.folder / INDEX
        try:
            text = settings_file.read_text(path, MAX_INDEX_BYTES)
            if text is None:
                return ()
            found = msgspec.json.decode(text, type=_Index).images
            if all(_SHA3_224.fullmatch(image.sha3) for image in found):
                return found
            reason = "it names what is no SHA3-224"
        except (msgspec.DecodeError, settings_file.BadSettingsFile) as error:
            reason = str(error)
        aside = path.with_name(f"{INDEX}.broken")
        log.error("the registry's index cannot be read (%s); it is now %s, and the images have no tags", reason, aside)
        path.replace(aside)
        return ()

    async def _write_index(self, images: dict[str, StoredImage]) -> None:
        with trio.CancelScope(shield=True):  # what is said and what is on the disk stay the same
            await trio.to_thread.run_sync(self._write_index_now, msgspec.json.encode(_Index(1, tuple(images.values()))).decode())
            self._images = images

    def _write_index_now(self, text: str) -> None:
        write_private(self.folder / INDEX, text)
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _publish(self, image: StoredImage) -> None:
        try:
            self._publisher.offer(image.published_name, FileSource(self.path(image)), self)
        except FileFault as fault:
            log.warning("image %s is not published: %s", image.sha3, fault)

    async def _take_in(self, path: Path, push: Push) -> tuple[Path, str, int]:
        """Bring a file into the folder under a temporary name; returns that, the SHA3-224 and the size in bytes."""
        own = path.parent == self.folder and path.name.endswith(PART_SUFFIX)
        part = path if own else self.folder / f".{secrets.token_hex(8)}{PART_SUFFIX}"
        async with self._limiter:
            origin = await trio.to_thread.run_sync(_open_regular, path)
            target, reserved, done = -1, 0, False
            try:
                found = os.fstat(origin)
                if push.order.identity not in (None, identity_of(found)):
                    raise RegistryError(f"{path} was replaced or changed after it was looked at")
                size = push.total_bytes = found.st_size
                self._check_room(size, own)
                self._incoming_bytes += size
                reserved = size
                target = origin if own else os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                sha3 = await _copy(origin, target, size, push)
                await trio.to_thread.run_sync(os.fsync, target)
                done = True
            finally:
                self._incoming_bytes -= reserved
                os.close(origin)
                if target not in (-1, origin):
                    os.close(target)
                if not done:
                    part.unlink(missing_ok=True)
        return part, sha3, size

    def _check_room(self, size: int, on_disk: bool) -> None:
        if size == 0:
            raise RegistryError("the file is empty")
        if size > MAX_IMAGE_BYTES:
            raise RegistryError(f"the image is too large: {size} bytes, at most {MAX_IMAGE_BYTES}")
        used = self.total_bytes() + self._incoming_bytes
        if used + size > self.max_bytes:
            raise RegistryError(
                f"no room: the registry holds {used >> 20} of at most {self.max_bytes >> 20} MiB, the image has"
                f" {size >> 20} (golem image remove, or GOLEM_IMAGES_MAX_GIB of the node)"
            )
        free = os.statvfs(self.folder)
        if not on_disk and free.f_bavail * free.f_frsize < size + SPARE_BYTES:
            raise RegistryError(f"the disk is full: {size + SPARE_BYTES >> 20} MiB are needed in {self.folder}")


def _checked_names(tags: Iterable[str], aliases: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(normal_tag(tag) for tag in tags), tuple(normal_hash(alias) for alias in aliases)


def _joined(kind: str, held: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    joined = tuple(dict.fromkeys(held + new))
    if len(joined) > MAX_NAMES:
        raise RegistryError(f"more than {MAX_NAMES} {kind} of one image")
    return joined


def _open_regular(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
    except OSError as error:
        raise RegistryError(f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RegistryError(f"not a regular file: {path}")
    return descriptor


async def _copy(origin: int, target: int, size: int, push: Push) -> str:
    """Bring `size` bytes from one open file to another (the same: only read them); returns their SHA3-224."""
    sha3 = hashlib.sha3_224()
    cloned = origin == target or await trio.to_thread.run_sync(_clone, origin, target)

    def step(offset: int) -> int:
        data = os.pread(target if cloned else origin, min(STEP_BYTES, size - offset), offset)
        sha3.update(data)
        view = memoryview(data)
        while view and not cloned:
            view = view[os.write(target, view) :]
        return len(data)

    while push.done_bytes < size:
        taken = await trio.to_thread.run_sync(step, push.done_bytes)
        if not taken:
            break
        push.done_bytes += taken
    if push.done_bytes < size or os.fstat(target).st_size != size or os.fstat(origin).st_size != size:
        raise RegistryError(f"{push.order.path} changed while it was read")
    return sha3.hexdigest()


def _clone(origin: int, target: int) -> bool:
    """Have two files share their blocks until one is changed; returns whether the file system can do that."""
    try:
        fcntl.ioctl(target, _FICLONE, origin)
    except OSError:
        return False
    return True


def _disk_text(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return f"the node could not do it: {error.strerror or error}"
