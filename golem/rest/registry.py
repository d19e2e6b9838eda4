"""The registry that scripts ask for images: tags and hashes to URLs, and the images over HTTP. No app-key is asked for.

`http` and `https` of an answer are the same `gftp://` URL: SDKs hand it on as it is, and providers on any machine fetch
the image through the network of the nodes, although REST listens on loopback. The image is there over HTTP too, for
scripts that give an URL themselves and for people. A link and an image are found by their own hash alone: with an alias
they would not pass the provider's check.
"""

from __future__ import annotations

import email.utils
import ipaddress
import logging
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakSet

import trio
from quart import Blueprint, Response, request
from quart.wrappers.response import ResponseBody

from golem.images.store import RegistryError, StoredImage, is_tag
from golem.rest.edge import ApiError, query_text, respond_json

if TYPE_CHECKING:
    from golem.node.node import Node

log = logging.getLogger("golem.rest")

CHUNK_BYTES = 1 << 20
MAX_DOWNLOADS = 64  # at a time
DOWNLOADS_OF_ONE = 16  # the share of an address: nobody who reads slowly keeps all others out
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def blueprint(node: Node) -> Blueprint:
    """Return the registry of `node`."""
    api = Blueprint("registry", __name__)
    downloads: WeakSet[_FileBody] = WeakSet()  # also of those whose reader left before the first byte

    @api.get("/v1/image/info")
    async def info() -> Response:
        image = _asked_for(node)
        url = image.url(node.node_id)
        return respond_json({
            "sha3": image.sha3, "size": image.size, "http": url, "https": url, "link": image.link(request.host_url),
            "tags": list(image.tags), "format": image.format,
        })  # fmt: skip

    @api.get("/image.<sha3>.link")
    async def link(sha3: str) -> Response:
        return Response(_exactly(node, sha3).url(node.node_id), content_type="text/plain; charset=utf-8")

    @api.get("/v1/image/<sha3>")
    async def image(sha3: str) -> Response:
        found = _exactly(node, sha3)
        return await _respond_file(node.registry.path(found), found, downloads)

    return api


def _asked_for(node: Node) -> StoredImage:
    """Return the image that the query names. Raises `ApiError` 400 and 404."""
    tag, digest = query_text("tag"), query_text("hash")
    if bool(tag) == bool(digest):
        raise ApiError(400, "expected one of the query parameters tag and hash")
    try:
        image = node.registry.by_tag(tag) if tag else node.registry.by_hash(digest or "")
    except RegistryError as error:
        raise ApiError(400, str(error)) from None
    if image is None:
        _not_here(f"tagged {tag}" if tag else f"with hash {digest}", tag or "")
    return image


def _exactly(node: Node, sha3: str) -> StoredImage:
    image = node.registry.exactly(sha3)
    if image is None:
        _not_here(f"with SHA3-224 {sha3[:128]}", "")
    return image


def _not_here(which: str, tag: str) -> NoReturn:
    example = tag if is_tag(tag) else "IMAGE"
    hint = "golem image list shows those that are there"
    raise ApiError(404, f"this node has no image {which}; push one with: golem image push {example} ({hint})")


# -- the image itself
class _FileBody(ResponseBody):
    """Bytes of a file from `first` on to before `end`, open while they are sent. It counts as a download from now on.

    A file that is cut short meanwhile ends them: the answer is shorter than it said, which whoever reads it sees.
    """

    def __init__(self, path: Path, first: int, end: int, downloads: WeakSet[_FileBody]) -> None:
        """Raises `ApiError` 503 where all places are taken, or those of this reader."""
        self._path, self._first, self._end, self._downloads = path, first, end, downloads
        self._descriptor, self.reader = -1, reader_of(request.remote_addr or "")
        if len(downloads) >= MAX_DOWNLOADS:
            raise ApiError(503, f"{MAX_DOWNLOADS} images are being downloaded already: try again later")
        if sum(one.reader == self.reader for one in downloads) >= DOWNLOADS_OF_ONE:
            raise ApiError(503, f"{DOWNLOADS_OF_ONE} images are being downloaded from {self.reader} already: try again later")
        downloads.add(self)

    async def __aenter__(self) -> AsyncIterator[bytes]:
        self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        return self._chunks()

    async def __aexit__(self, *_: Any) -> None:
        os.close(self._descriptor)
        self._downloads.discard(self)

    async def _chunks(self) -> AsyncIterator[bytes]:
        offset = self._first
        while offset < self._end:
            data = await trio.to_thread.run_sync(os.pread, self._descriptor, min(CHUNK_BYTES, self._end - offset), offset)
            if not data:
                log.warning("%s was cut short while it was sent", self._path.name)
                return
            offset += len(data)
            yield data

    async def make_conditional(self, begin: int, end: int | None) -> int:
        """Quart's own way to ranges, which this module does not take."""
        return self._end - self._first


def reader_of(address: str) -> str:
    """Return who counts as one reader: an address, or the network of 64 bits that one customer of IPv6 has."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


async def _respond_file(path: Path, image: StoredImage, downloads: WeakSet[_FileBody]) -> Response:
    """Answer with the file, or with the part of it that was asked for."""
    try:
        status = await trio.to_thread.run_sync(os.stat, path)
    except FileNotFoundError:
        raise ApiError(404, f"image {image.sha3} was removed just now") from None
    tag = f'"{image.sha3}"'
    changed = email.utils.formatdate(status.st_mtime, usegmt=True)
    headers = {"Accept-Ranges": "bytes", "ETag": tag, "Last-Modified": changed}
    first, last, code = 0, image.size - 1, 200
    asked = _RANGE.fullmatch(request.headers.get("Range", ""))
    if tag in request.headers.get("If-None-Match", ""):
        code = 304
    elif asked is not None and request.headers.get("If-Range", tag) in (tag, changed):
        first, last, code = _range(asked[1], asked[2], image.size)
    if code == 416:
        answer = ApiError(416, f"the image has {image.size} bytes").response()
        answer.headers.update(headers | {"Content-Range": f"bytes */{image.size}"})
        return answer
    if code == 206:
        headers["Content-Range"] = f"bytes {first}-{last}/{image.size}"
    sends = request.method != "HEAD" and code != 304
    body = _FileBody(path, first, last + 1, downloads) if sends else b""
    response = Response(body, status=code, headers=headers, content_type="application/octet-stream")
    if code == 304:
        response.headers.pop("Content-Length", None)
    else:
        response.headers["Content-Length"] = str(last - first + 1)
    return response


def _range(first: str, last: str, size: int) -> tuple[int, int, int]:
    """Return first byte, last byte and status for a range's two numbers, each of which may be empty."""
    if first:
        begin, end = int(first), min(int(last), size - 1) if last else size - 1
        if last and int(last) < int(first):
            return 0, size - 1, 200  # malformed, hence ignored
        return (begin, end, 206) if begin < size else (0, 0, 416)
    if not last:
        return 0, size - 1, 200
    return (max(0, size - int(last)), size - 1, 206) if int(last) else (0, 0, 416)
