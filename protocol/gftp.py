"""What is said on byte streams named `gftp`.

Headers are MessagePack arrays behind their length (four bytes, big-endian, at most 4 KiB):

    ["stat", name]               -> ["ok", size]
    ["get", name, offset, size]  -> ["ok", size of the file], then the bytes asked for, as far as the file goes;
                                    a stream that ends early is a failure
    ["put", name, size]          -> ["ok", kept, digest, hash, key]: so much is there of an upload that broke off, with this
                                    digest by the hash that the receiver wants (sha256 or sha3_256)
        ["from", offset]            offset is `kept` when the digest fits the sender's file, else 0; then blocks, an end
                                    mark, and the 64 hex digits of the digest of the whole  -> ["ok", size]
    ["join", key]                   another stream that brings blocks to the same upload, and an end mark
                                    A slot that has its file takes it once more without its bytes, and no other one
    any                          -> ["error", variant, text]   variant: ReadError WriteError InternalError IntegrityError

A block is its offset (8 bytes), its length (4 bytes, big-endian) and its bytes; the end mark has length 0. A stream takes
one request after another, and a reader may send the next before it has read the answer. A stream brings no more than its
window in a round trip, so over long ways several are used at once.

Neighbours: `golem/files/wire.py` reads and writes; `golem/files/server.py` and `golem/files/uploads.py` serve,
`golem/files/client.py` is the client.
"""

from __future__ import annotations

import re

STREAM = "gftp"
BLOCK_BYTES = 1 << 20  # of a block, and of what is read at a time
MAX_HEADER_BYTES = 4096
_URL = re.compile(r"gftp://(0x[0-9a-fA-F]{40})/([A-Za-z0-9._\-]{1,200})\Z")
_FILE = re.compile(r"([0-9a-f]{64})(?:-[0-9a-f]{32})?\Z")
END = bytes(12)
HASHES = ("sha256", "sha3_256")
NOT_HERE = "no such file is published here"


class FileFault(Exception):
    """A file could not be read or written. `passing` failures are worth another try."""

    def __init__(self, variant: str, text: str, passing: bool = False) -> None:
        super().__init__(text)
        self.variant, self.passing = variant, passing


def parse_url(url: str) -> tuple[str, str]:
    """Return node id and name of a gftp URL. Raises `FileFault`."""
    match = _URL.match(url)
    if match is None:
        raise FileFault("InternalError", f"not a gftp URL: {url[:120]!r}")
    return match[1].lower(), match[2]


def sha3_of(name: str) -> str:
    """Return the SHA3-256 of the content that a name promises: its first part, where it is one of a published file."""
    match = _FILE.match(name)
    return match[1] if match else ""
