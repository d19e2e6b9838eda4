"""Where a service's answer may lead its client: `Location`, `Refresh` and `Set-Cookie`. Pure.

Clients follow a redirection with the app-key in hand, and 307 with method and body, and no two read an odd address in the
same way. So what a service says is never passed on as it is: it is parsed, and written anew in the one form that all
clients read alike, or dropped. Neighbour: `proxy_rules.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

from golem.base.hosts import WEB, is_this_machine, read_authority

_EDGES = bytes(range(0x21))  # what browsers take off both ends of an address
_INSIDE = re.compile(rb"[\t\r\n]")  # and what they take out of it
_SCHEME = re.compile(rb"([A-Za-z][A-Za-z0-9+.\-]*):(.*)\Z", re.DOTALL)
_ODD = re.compile(rb"[^A-Za-z0-9\-._~!$&'()*+,;=:@/?%]|%(?![0-9A-Fa-f]{2})")
_REFRESH = re.compile(rb"\s*([\d.]+)\s*[;,]\s*(?:url\s*=\s*)?([\"']?)(.*?)\2\s*\Z", re.DOTALL | re.IGNORECASE)
_SECONDS = re.compile(rb"\s*[\d.]+\s*\Z")
# Python's clients part a cookie at white space of any alphabet, some of them within a value: so neither has any.
_PAIR = re.compile(rb"(?!\$)[!#$%&'*+\-.^_`|~0-9A-Za-z]+=(?:\"[!#-+\--:<-\[\]-~]*\"|[!#-+\--:<-\[\]-~]*)\Z")
_MORE = {  # attributes of cookies that pass, in the one form that all clients read alike
    b"expires": re.compile(rb"[A-Za-z]{3,9}, [0-3]\d[ -][A-Za-z]{3}[ -](?:\d\d)?\d\d [0-2]\d:[0-5]\d:[0-6]\d GMT\Z"),
    b"max-age": re.compile(rb"-?\d{1,10}\Z"),
    b"samesite": re.compile(rb"(?:lax|strict|none)\Z", re.IGNORECASE),
    b"priority": re.compile(rb"(?:low|medium|high)\Z", re.IGNORECASE),
    b"secure": re.compile(rb"\Z"), b"httponly": re.compile(rb"\Z"), b"partitioned": re.compile(rb"\Z"),
}  # fmt: skip
_HARMLESS = (b"mailto", b"tel", b"sms")  # nothing that a client asks over a network


def split_address(address: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Return what browsers see in an address: scheme with its colon, authority with its slashes (of any number and kind
    behind a scheme of the web), path, and the rest.
    """
    text = _INSIDE.sub(b"", address).strip(_EDGES)
    scheme, text = (match[1].lower() + b":", match[2]) if (match := _SCHEME.match(text)) else (b"", text)
    end = min((at for at in (text.find(b"?"), text.find(b"#")) if at >= 0), default=len(text))
    path, rest = text[:end], text[end:]
    slashes = path[: len(path) - len(path.lstrip(b"/\\"))]
    if len(slashes) < 2 and scheme[:-1] not in WEB:
        return scheme, b"", path.replace(b"\\", b"/"), rest
    authority, slash, path = path[len(slashes) :].replace(b"\\", b"/").partition(b"/")
    return scheme, slashes + authority, slash + path, rest


def quoted(text: bytes) -> bytes:
    """Return a part of an address with every odd byte as `%xx`."""
    return _ODD.sub(lambda match: b"%%%02X" % match[0][0], text)


def without_dots(path: bytes) -> bytes:
    """Return a path that leads nowhere up, however a client reads it."""
    kept: list[bytes] = []
    parts = path.split(b"/")[1:] or [b""]
    for number, part in enumerate(parts):
        plain = re.split(rb"[/\\]", unquote_to_bytes(unquote_to_bytes(part)))
        words = {word.partition(b";")[0].strip(_EDGES + b"\x7f") for word in plain}
        if b".." in words:
            del kept[-1:]
        elif b"." not in words:
            kept.append(part)
            continue
        if number == len(parts) - 1:
            kept.append(b"")
    return b"/" + b"/".join(kept)


def led_back(location: bytes, prefix: bytes, root: bytes, port: int, here: bytes, origin: bytes) -> bytes | None:
    """Return a redirection as the client is to follow it: to a service of the activity as one through here, to
    elsewhere in canonical form. None for one to this node or machine, or that cannot be read in one way only.

    `prefix`: what leads to the service, which listens on `port`; `root`: to all services of the activity; `here`: the
    path that was asked for; `origin`: by which host and port the client knows this node.
    """
    scheme, authority, path, rest = split_address(location)
    name, rest = scheme[:-1], b"#".join(quoted(part) for part in rest.split(b"#", 1))
    if authority:
        usual = authority.startswith(b"//") and (not scheme or name in WEB)
        found = read_authority(authority[2:], name) if usual else None
        if found is None:
            return None
        host, to = found
        if host not in (b"localhost", b"127.0.0.1", b"[::1]") or name not in (b"", b"http"):
            known = origin.rpartition(b"@")[2].lower()
            if is_this_machine(host) or host == (read_authority(known, b"http") or (known,))[0]:
                return None
            return scheme + authority.lower() + quoted(without_dots(path)) + rest
        prefix = prefix if to == port else root + b"/%d" % to
    elif scheme:
        return scheme + quoted(path) + rest if name in _HARMLESS and not path.startswith(b"/") else None
    elif not path:
        path = here
    elif not path.startswith(b"/"):
        path = here.rpartition(b"/")[0] + b"/" + path
    return prefix + quoted(without_dots(path)) + rest


def refresh(value: bytes, back: Callable[[bytes], bytes | None]) -> bytes | None:
    """Return a `Refresh` that leads where a `Location` may (`back` says where), None for any other."""
    if _SECONDS.match(value):
        return value  # the same page once more
    match = _REFRESH.match(value)
    to = back(match[3]) if match else None
    return match[1] + b"; url=" + to if match and to is not None else None


def cookie(value: bytes, prefix: bytes) -> bytes | None:
    """Return a `Set-Cookie` of a service as one for what is below `prefix` alone; None for one that clients read differently."""
    first, *attributes = (part.strip(b" \t") for part in value.split(b";"))
    if not _PAIR.match(first):
        return None
    path, kept = b"/", [first]
    for attribute in attributes:
        name, _, given = (part.strip(b" \t") for part in attribute.partition(b"="))
        if (lower := name.lower()) == b"path":
            path = given if given.startswith(b"/") else b"/"
        elif lower in _MORE and _MORE[lower].match(given):
            kept.append(name + b"=" + given if given else name)
    path = without_dots(quoted(path))
    return b"; ".join([*kept, b"Path=" + prefix + (path if path != b"/" else b"")])
