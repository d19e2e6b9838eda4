"""The node's side of `golem image`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from golem.control.command import command
from golem.files.outgoing import FileIdentity
from golem.images.store import PushOrder, StoredImage, normal_hash, normal_tag
from protocol.types import timestamp_text

if TYPE_CHECKING:
    from golem.node.node import Node


# -- images
def _image(node: Node, image: StoredImage) -> dict[str, Any]:
    return {
        "sha3": image.sha3, "size": image.size, "format": image.format, "source": image.source, "tags": list(image.tags),
        "aliases": list(image.aliases), "created": timestamp_text(image.created), "url": image.url(node.node_id),
        "link": image.link(node.api_url), "registry": node.api_url,
    }  # fmt: skip


@command
async def image_store(node: Node, args: dict[str, Any]) -> Any:
    """Where images lie and how much room there is, in bytes. Names for an image to come are checked."""
    for tag in args.get("tags", ()):
        normal_tag(tag)
    for alias in args.get("aliases", ()):
        normal_hash(alias)
    return {"folder": str(node.registry.folder), "used": node.registry.total_bytes(), "limit": node.registry.max_bytes}


@command
async def image_push(node: Node, args: dict[str, Any]) -> Any:
    """Begin to take in a file; `image_progress` tells how it goes."""
    path = Path(args["path"])
    if not path.is_absolute():
        raise ValueError(f"not an absolute path: {path}")
    given = args.get("identity")
    identity = None if given is None else msgspec.convert(given, FileIdentity)
    order = PushOrder(path, tuple(args["tags"]), tuple(args["aliases"]), args["format"], args["source"], identity)
    node.registry.begin(order, args["push"])


@command
async def image_progress(node: Node, args: dict[str, Any]) -> Any:
    """How far a push is, in bytes, after a while; its image at the end."""
    push = node.registry.push(args["push"])
    with trio.move_on_after(min(args.get("wait_s", 0.0), 10.0)):
        await push.ended.wait()
    if push.failure:
        raise ValueError(push.failure)
    image = _image(node, push.image) if push.image else None
    return {"done": push.done_bytes, "total": push.total_bytes, "image": image}


@command
async def image_cancel(node: Node, args: dict[str, Any]) -> Any:
    """Give up a push; whether nothing of it stays."""
    return node.registry.cancel(args["push"])


@command
async def image_list(node: Node, args: dict[str, Any]) -> Any:
    """All images."""
    return [_image(node, image) for image in node.registry.images()]


@command
async def image_show(node: Node, args: dict[str, Any]) -> Any:
    """One image."""
    return _image(node, node.registry.named(args["name"]))


@command
async def image_remove(node: Node, args: dict[str, Any]) -> Any:
    """Remove a tag, or an image; the image as it was."""
    return _image(node, await node.registry.remove(args["name"]))
