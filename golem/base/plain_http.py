"""TLS for HTTP clients that never speak it: an own one reads all certificate authorities of the system, 30 ms each time."""

from __future__ import annotations

import ssl
from collections.abc import Iterable


def trust_nobody() -> ssl.SSLContext:
    """Return a context that knows no authority, for clients of plain HTTP: an https URL fails."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def trust_for(urls: Iterable[str]) -> ssl.SSLContext | bool:
    """Return what httpx takes as `verify`: the system's authorities where one of the URLs needs TLS."""
    return trust_nobody() if all(url.startswith("http://") for url in urls) else True
