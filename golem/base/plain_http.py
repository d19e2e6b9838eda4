"""TLS for HTTP clients that never speak it: an own one reads all certificate authorities of the system, 30 ms each time."""

from __future__ import annotations

import importlib
import ssl
from collections.abc import Iterable

import trio


async def load_httpx() -> None:
    """Import httpx in a thread, so that `import httpx` costs nothing after it: a node answers REST before it needs a client."""
    await trio.to_thread.run_sync(importlib.import_module, "httpx")


def trust_nobody() -> ssl.SSLContext:
    """Return a context that knows no authority, for clients of plain HTTP: an https URL fails."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def trust_for(urls: Iterable[str]) -> ssl.SSLContext | bool:
    """Return what httpx takes as `verify`: the system's authorities where one of the URLs needs TLS."""
    return trust_nobody() if all(url.startswith("http://") for url in urls) else True
