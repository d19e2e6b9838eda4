"""What of an HTTP request goes through to a service inside an activity, and what of its answer comes back. Pure.

Neighbours: `proxy.py` and `proxy_socket.py` do the talking.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from urllib.parse import parse_qsl, unquote_plus

from golem.rest.edge import ApiError
from golem.rest.redirects import cookie, led_back, refresh

Header = tuple[bytes, bytes]

SANDBOX = b"sandbox allow-scripts allow-forms allow-popups allow-downloads"
AWAY = b"x-golem-location"
_PORT = re.compile(rb"(\d{1,5})(?:/(.*))?\Z", re.DOTALL)
_URL = re.compile(rb"([A-Za-z]{1,10}):/{1,2}(\[[0-9A-Fa-f:]*\]|[^/:]*)(?::(\d{1,5}))?(?:/(.*))?\Z", re.DOTALL)
_LOCAL_HOSTS = (b"localhost", b"127.0.0.1", b"[::1]")
_OF_ONE_CONNECTION = frozenset((
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"upgrade", b"http2-settings", b"expect",
))  # fmt: skip
_OF_THE_NODE = frozenset((b"date", b"server", b"x-trace-id"))  # of an answer: the node says its own
_OF_THE_ORIGIN = frozenset((  # of an answer: a service cannot speak for all that a browser knows at this address
    b"clear-site-data", b"service-worker-allowed", b"strict-transport-security", b"alt-svc", b"nel", b"report-to",
    b"reporting-endpoints", b"set-cookie2",
))  # fmt: skip


class Target:
    """A service and what is asked of it. Raises `ApiError` for what cannot be reached.

    `port`: 0 is the image's own. `path`: with query, as the service sees it. `prefix`: what leads to the service here;
    `root`: to all services. `origin`: by which host and port the client knows this node.
    """

    def __init__(self, prefix: bytes, url: bytes, query: bytes, origin: bytes = b"") -> None:
        self.port, self.prefix, path = 0, prefix, url
        self.root, self.origin = prefix, origin
        if match := _URL.match(url):
            scheme, host, port, path = match.groups(b"")
            if scheme.lower() not in (b"http", b"ws") or host.lower() not in _LOCAL_HOSTS:
                raise ApiError(400, "only services of the activity itself can be reached: http://localhost:<port>/...")
            self.port = int(port or 80)
        elif match := _PORT.match(url):
            port, path = match.groups(b"")
            self.port = int(port)
        if match:
            if not 1 <= self.port <= 65535:
                raise ApiError(400, f"not a port: {self.port}")
            self.prefix = prefix + b"/%d" % self.port
        query = without_key(query)
        self.path = b"/" + path + (b"?" + query if query else b"")
        self.host = b"localhost:%d" % self.port if self.port else b"localhost"

    def back(self, location: bytes) -> bytes | None:
        """Return a redirection as the client is to follow it, None for one that it must not follow."""
        return led_back(location, self.prefix, self.root, self.port, self.path.partition(b"?")[0], self.origin)


def key_of(query: bytes) -> str:
    """Return the app-key that a query holds, "" if it holds none."""
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    return next((value for name, value in pairs if name == "authToken"), "")


def without_key(query: bytes) -> bytes:
    """Return a query without the app-key."""
    return b"&".join(
        one for one in query.split(b"&") if unquote_plus(one.partition(b"=")[0].decode("latin-1")) != "authToken"
    )  # fmt: skip


def header(headers: Sequence[Header], name: bytes) -> bytes:
    """Return the first value of a header, b"" if there is none."""
    return next((value for key, value in headers if key.lower() == name), b"")


def _passing(headers: Sequence[Header], kept: Collection[bytes] = ()) -> list[Header]:
    """Return the headers that are not of one connection only."""
    dropped = set(_OF_ONE_CONNECTION)
    for name, value in headers:
        if name.lower() == b"connection":
            dropped.update(word.strip().lower() for word in value.split(b","))
    dropped.difference_update(kept)
    return [(name.lower(), value) for name, value in headers if name.lower() not in dropped]


def is_from_browser(headers: Sequence[Header]) -> bool:
    """Return whether a browser sends a request.

    Browsers say so in `Sec-Fetch-Site` (a `Sec-Fetch-Mode` alone is Node.js), though not to every address and not with
    every websocket; all of them have called themselves Mozilla for decades.
    """
    return bool(header(headers, b"sec-fetch-site")) or header(headers, b"user-agent").startswith(b"Mozilla/")


def forwarded(headers: Sequence[Header], target: Target) -> list[Header]:
    """Return the headers of a request as the service gets them."""
    from_browser = is_from_browser(headers)
    found = [(b"host", target.host)]
    chunked = bool(header(headers, b"transfer-encoding"))
    for name, value in _passing(headers, (b"content-length", b"transfer-encoding")):
        if name == b"host" or name.startswith(b"sec-websocket-"):
            continue
        if name == b"authorization" and value.lstrip()[:6].lower() == b"bearer":
            continue  # the app-key
        if name == b"referer" and b"authtoken" in unquote_plus(value.decode("latin-1")).lower().encode("latin-1", "replace"):
            continue
        if name == b"cookie" and from_browser:
            continue
        if name == b"content-length" and chunked:
            continue  # it counts for nothing beside the other, and might to the service
        found.append((name, value))
    return [*found, (b"x-forwarded-prefix", target.prefix)]


def has_key(headers: Sequence[Header]) -> bool:
    """Return whether a request brings the app-key in a header, which its client takes along where a redirection leads."""
    return any(name.lower() == b"authorization" and value.lstrip()[:6].lower() == b"bearer" for name, value in headers)


def _leads_away(address: bytes) -> bool:
    return not address.startswith(b"/") or address.startswith(b"//")


def returned(headers: Sequence[Header], target: Target, *, to_browser: bool = False, keyed: bool = False) -> list[Header]:
    """Return the headers of an answer as the client gets them, apart from those of cross-origin rules.

    `to_browser`: its cookies would be those of every program at this address. `keyed`: the request has the app-key in a
    header. Its client is not led to other machines: some take the key there, and curl has it again where the next
    redirection leads back here. `X-Golem-Location` says where it would have gone, for who wants to go without a key.
    """
    found = [(b"content-security-policy", SANDBOX)]
    chunked = bool(header(headers, b"transfer-encoding"))
    for name, value in _passing(headers):
        if name in _OF_THE_NODE or name == AWAY or name in _OF_THE_ORIGIN or name.startswith(b"access-control-"):
            continue
        if name == b"transfer-encoding" or (name == b"content-length" and chunked):
            continue
        if name == b"location":
            checked = target.back(value) if all(kept != name for kept, _ in found) else None  # some clients join several
            if checked is not None and keyed and _leads_away(checked):
                found.append((AWAY, checked))
                continue
        elif name == b"refresh":
            checked = refresh(value, target.back)
            if checked is not None and keyed and _leads_away(checked.partition(b"; url=")[2] or b"/"):
                continue
        elif name == b"set-cookie":
            checked = None if to_browser else cookie(value, target.prefix)
        else:
            checked = value
        if checked is not None:
            found.append((name, checked))
    return found


def cross_origin(headers: Sequence[Header], allowed: Collection[str]) -> list[Header]:
    """Return the headers that let a page of an allowed origin read an answer."""
    origin = header(headers, b"origin")
    if not origin or not ({"*", origin.decode("latin-1")} & set(allowed)):
        return []
    return [
        (b"access-control-allow-origin", origin), (b"vary", b"Origin"), (b"access-control-allow-credentials", b"true"),
    ]  # fmt: skip
