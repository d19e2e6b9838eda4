"""`golem image`: images for one's own tasks, kept and served by one's node (`golem/images/store.py`).

A Docker tag is exported here, by this process, from the Engine at `DOCKER_HOST`: the node never talks to one.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from golem.cli.client import ask_node
from golem.cli.output import fail, say, table, text, value, wants_json
from golem.files.outgoing import FileIdentity, identity_of
from golem.images.docker_archive import ArchiveError, normalise

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DEFAULT_HOST = "unix:///var/run/docker.sock"
CHUNK_BYTES = 1 << 20
POLL_S = 0.25
MIB = 1 << 20
PART_SUFFIX = ".part"  # of files on their way into the store: the node moves them, and removes what was left behind


@click.group()
def image() -> None:
    """Images for your own tasks, served by this node."""


@image.command("push")
@click.argument("source")
@click.option("-t", "--tag", "tags", multiple=True, help="Name for scripts. [of a Docker image: its own]")
@click.option("--alias", "aliases", multiple=True, metavar="HASH", help="Hash that scripts ask for and get this image instead.")
@click.option("--any-format", is_flag=True, help="Take a file of a format that no built-in runtime knows.")
def image_push(source: str, tags: tuple[str, ...], aliases: tuple[str, ...], any_format: bool) -> None:
    """Store an image at the node and say how scripts find it.

    SOURCE is a tag of the Docker Engine at DOCKER_HOST, or a file: a Docker archive (docker save), an OCI layout, a GVMI,
    a tar with a root file system, a WebAssembly module, a WASI package.
    """
    folder = Path(ask_node("image_store", tags=tags, aliases=aliases)["folder"])
    path = Path(source).expanduser()
    with _bars() as bars:
        if path.is_file() or path.is_fifo() or not _could_be_image(source, path):
            real, identity = _meant(path)
            kind = _format_of(real, any_format)
            found = _store(bars, real, tags, aliases, kind, path.name, identity)
        else:
            with _exported(bars, source, folder) as (archive, engine_image):
                kind = _format_of(archive, any_format)
                tags = tags or tuple({source for tag in engine_image["RepoTags"] or () if _means(tag, source)})
                found = _store(bars, archive, tags, (*aliases, engine_image["Id"]), kind, source)
    _show(found)


@image.command("list")
def image_list() -> None:
    """List the images, one line a tag."""
    rows = []
    for one in ask_node("image_list"):
        rows += [[tag, one["sha3"], round(one["size"] / MIB, 1), one["format"], one["created"]] for tag in one["tags"] or [""]]
    note = "" if rows else "No images. Push one: golem image push SOURCE"
    table(["tag", "sha3", "size [MiB]", "format", "created"], rows, note)


@image.command("show")
@click.argument("name")
def image_show(name: str) -> None:
    """Show an image: of a tag, a hash, or the first digits of its hash."""
    _show(ask_node("image_show", name=name))


@image.command("remove")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--untagged", is_flag=True, help="Remove the images that have no tag (any more).")
def image_remove(names: tuple[str, ...], untagged: bool) -> None:
    """Remove tags, or images by hash. An image goes with its last tag."""
    wanted = [*names, *(one["sha3"] for one in ask_node("image_list") if untagged and not one["tags"])]
    if not wanted and not untagged:
        raise click.UsageError("which image? Give a tag or a hash")
    removed = [ask_node("image_remove", name=name)["sha3"] for name in wanted]
    if wants_json():
        value(removed)
        return
    for name, sha3 in zip(wanted, removed, strict=True):
        text(f"{name} removed" if sha3.startswith(name) else f"{name} ({sha3[:12]}…) removed")


def register(main: click.Group) -> None:
    main.add_command(image)


# -- what comes in
def _could_be_image(source: str, path: Path) -> bool:
    """Return whether a source that is no file may be an image of an Engine: a folder of that name does not matter."""
    looks_like_file = path.is_absolute() or source.startswith((".", "~")) or source.endswith((".tar", ".gvmi", ".wasm", ".gz"))
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,255}", source) is not None and not looks_like_file


def _meant(path: Path) -> tuple[Path, FileIdentity | None]:
    """Return a file without links, and which one it is now: in a folder that others write, another may take its place."""
    real = Path(os.path.realpath(path))
    try:
        return real, identity_of(os.lstat(real))
    except OSError:
        return path.absolute(), None  # the error is told where it is opened


def _format_of(path: Path, any_format: bool) -> str:
    """Return what a file is. Ends the command where that cannot be used."""
    from golem.exeunit.runtime import ImageFormat
    from golem.exeunit.transfer.packages import detect_format  # these take a while, and most commands need none of it

    if path.is_dir():
        raise fail(f"{path} is a directory; pack it: tar -C {path} -c . > rootfs.tar")
    if path.exists() and not path.is_file():
        raise fail(f"not a regular file: {path}")
    try:
        found = detect_format(path)
    except OSError as error:
        raise fail(f"cannot read {path}: {error.strerror}") from None
    none = (ImageFormat.OTHER, ImageFormat.NOTHING)
    if found is not None and found not in none:
        return str(found.value)
    if any_format:
        return str(ImageFormat.OTHER.value)
    known = "; ".join(one.value for one in ImageFormat if one not in none)
    raise fail(f"{path} is of an unknown format; known: {known} (--any-format takes it all the same)")


@contextmanager
def _exported(bars: Progress, tag: str, folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Export an image of the Engine into `folder`; gives the archive and what the Engine says of it. No file stays."""
    saved, archive = (folder / f".{secrets.token_hex(8)}{PART_SUFFIX}" for _ in range(2))
    try:
        engine_image = _save(bars, tag, saved)
        bar = bars.add_task("packing", total=saved.stat().st_size)
        with archive.open("xb") as target:
            normalise(saved, target, partial(bars.advance, bar))
        saved.unlink()
        yield archive, engine_image
    except ArchiveError as error:
        raise fail(f"what the Engine gave for {tag} cannot be used: {error}") from None
    except OSError as error:
        _give_up(error, folder)
    finally:
        saved.unlink(missing_ok=True)
        archive.unlink(missing_ok=True)


def _means(tag: str, source: str) -> bool:
    """Return whether a full tag of an Engine is what the user wrote (and not the image's id, say)."""
    return tag in (source, f"{source}:latest") or tag.endswith((f"/{source}", f"/{source}:latest"))


def _save(bars: Progress, tag: str, target: Path) -> dict[str, Any]:
    """Write an Engine's image to a file as the Engine gives it; returns what the Engine says of it."""
    import docker
    import requests

    host = os.environ.get("DOCKER_HOST") or DEFAULT_HOST
    if not host.startswith("unix://"):
        raise fail(f"DOCKER_HOST={host}: expected the socket of an Engine on this machine (unix:///...)")
    found: dict[str, Any] = {}
    try:
        client = docker.APIClient(base_url=host, version="auto", timeout=60)
        try:
            found = client.inspect_image(tag)
            bar = bars.add_task(f"exporting {tag}", total=found.get("Size"))
            with target.open("xb") as out:
                for chunk in client.get_image(found["Id"], CHUNK_BYTES):
                    out.write(chunk)
                    bars.advance(bar, len(chunk))
            bars.update(bar, total=target.stat().st_size)
            return found
        finally:
            client.close()
    except docker.errors.ImageNotFound:
        raise fail(f"{tag} is neither a file nor an image of the Docker Engine at {host} (docker pull {tag}?)") from None
    except docker.errors.APIError as error:
        raise fail(f"the Docker Engine refused: {error.explanation or error}") from None
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        if found:
            raise fail(f"the Docker Engine at {host} broke off while it gave {tag}: {_cause(error)}") from None
        raise fail(f"{tag} is no file, and no Docker Engine answers at {host} (set DOCKER_HOST): {_cause(error)}") from None


def _cause(error: BaseException) -> str:
    """Return what the bottom of a chain of errors says: libraries wrap a refused connection several times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return getattr(error, "strerror", None) or str(error)


def _give_up(error: OSError, folder: Path) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise fail(f"the disk is full: {folder}") from None
    raise fail(f"cannot write to {folder}: {error.strerror or error}") from None


# -- to the node
def _store(
    bars: Progress, path: Path, tags: Sequence[str], aliases: Sequence[str], kind: str, source: str,
    identity: FileIdentity | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Have the node take in a file; returns what it says of the image. Ctrl-C calls it off."""
    number = secrets.token_hex(8)
    bar: TaskID = bars.add_task("storing", total=None)
    with _interrupts() as pressed:
        try:
            ask_node("image_push", push=number, path=str(path), tags=tags, aliases=aliases, format=kind, source=source,
                     identity=identity)  # fmt: skip
            while not pressed.is_set():
                state = ask_node("image_progress", push=number, wait_s=POLL_S)
                bars.update(bar, completed=state["done"], total=state["total"] or None)
                if state["image"] is not None and not pressed.is_set():
                    found: dict[str, Any] = state["image"]
                    return found
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            said = "called off: nothing was stored" if ask_node("image_cancel", push=number) else "too late: the image is stored"
            say(said)
            raise


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Yield what is set by the first Ctrl-C; a second one raises as usual.

    An exception would be lost where it is raised while Python calls back from within (a weak reference's end, say): one
    push in ten at its start went on to its end, whatever was pressed.
    """
    pressed = threading.Event()

    def hear(number: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed  # somebody else hears it
        return
    signal.signal(signal.SIGINT, hear)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _bars() -> Iterator[Progress]:
    """Progress on standard error, for people at a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=wants_json() or not console.is_terminal) as bars:
        yield bars


def _show(found: dict[str, Any]) -> None:
    """Print an image, and how scripts get it."""
    runs_in_vm = not found["format"].startswith(("WebAssembly", "WASI", "a file of another"))
    name = f'image_tag="{found["tags"][0]}"' if found["tags"] else f'image_hash="{found["sha3"]}"'
    found["task_package"] = f"hash:sha3:{found['sha3']}:{found['url']}"
    if runs_in_vm:
        found["yapapi"] = f'vm.repo({name}, repository_url="{found["registry"]}")'
        camel = name.replace("image_tag=", "imageTag: ").replace("image_hash=", "imageHash: ")
        found["golem-js"] = f"GOLEM_REGISTRY_URL={found['registry']}  {camel}"
    value(found if wants_json() else found | {"size": f"{found['size']} ({found['size'] / MIB:.1f} MiB)"})
