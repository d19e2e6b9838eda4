"""HTTP transfers: range resume, redirects, PUT, basic auth from the URL, and an address policy that cannot be dodged.

A requestor chooses the URLs, so without care a provider would fetch from its own network on a stranger's behalf. Names
are therefore resolved here, every address is checked, and the connection goes to a checked address, also after each
redirect; proxies from the environment are not used. Neighbours: `spool`, `transfer`.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import httpcore
import httpx
import trio

from golem.exeunit.transfer.nearby import is_neighbour, is_own
from golem.exeunit.transfer.spool import BLOCK_BYTES, CHUNK_BYTES, Progress, Spool, TransferError, TransferPolicy, redacted
from golem.files.outgoing import OutgoingFile
from protocol.property_names import TRANSFER_REACH

CONNECT_TIMEOUT_S = 15.0
IDLE_TIMEOUT_S = 60.0
HEAD_S = 120.0  # from the first connection to the head of the last answer, and from the end of an upload to its answer
PACE_S, LEAST_BYTES = 60.0, 64 << 10  # a body moves so many bytes in so many seconds, and its last ones end in them
_PASSING = {408, 425, 429, 500, 502, 503, 504}
# IPv6 networks whose addresses end in an IPv4 address: mapped, compatible, translated, NAT64
_WITH_IPV4 = [ipaddress.ip_network(text) for text in ("::ffff:0:0/96", "::/96", "::ffff:0:0:0/96", "64:ff9b::/96")]
# not to be reached from outside, though not all of them count as private: IETF assignments, NAT64 of one's own, site-local
_INNER = [ipaddress.ip_network(text) for text in ("192.0.0.0/24", "64:ff9b:1::/48", "fec0::/10")]
# where clouds tell a machine its own secrets, beside the link-local 169.254.169.254
_METADATA = [ipaddress.ip_address(text) for text in ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")]


def refusal(address: str, policy: TransferPolicy) -> str | None:
    """Why the policy forbids an IP address, or None."""
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip not in (ipaddress.IPv6Address("::"), ipaddress.IPv6Address("::1")):
        if any(ip in network for network in _WITH_IPV4):
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip.sixtofour is not None:
            ip = ip.sixtofour
    if ip in _METADATA:
        return "an address of cloud metadata"
    if ip.is_loopback:
        return None if policy.allow_loopback else "a loopback address"
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        return "a link-local, multicast or unspecified address"
    if not ip.is_global or any(ip in network for network in _INNER):
        return None if policy.allow_private else "a private address"
    if not policy.allow_loopback and is_own(ip):
        return "an address of this machine"
    if not policy.allow_private and is_neighbour(ip):
        return "an address of this machine's own network"
    return None


def out_of_reach(host: str, reason: str) -> str:
    """Say why a transfer is refused, and what would help."""
    return (
        f"{host} is {reason}, which this provider does not let transfers reach: those do whose offers say "
        f"{TRANSFER_REACH}=local, for requestors of the same machine or network; "
        "to any provider, publish the file with the node (gftp:)"
    )


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Makes connections, and looks at both ends of each before a byte is sent.

    Between the look at an address and the connection this machine may have taken it, or have been led to itself.
    """

    def __init__(self, policy: TransferPolicy) -> None:
        self._policy = policy
        self._inner = httpcore.TrioBackend()

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None, socket_options: Any = None
    ) -> httpcore.AsyncNetworkStream:
        stream = await self._inner.connect_tcp(host, port, timeout, local_address, socket_options)
        ours, theirs = stream.get_extra_info("client_addr"), stream.get_extra_info("server_addr")
        reason = refusal(theirs[0], self._policy)
        if ours[:2] == theirs[:2]:
            reason = "itself the other end of its connection"
        elif ours[0] == theirs[0] and not self._policy.allow_loopback:
            reason = "an address of this machine"
        if reason is not None:
            with trio.CancelScope(shield=True):
                await stream.aclose()
            raise TransferError(out_of_reach(host, reason))
        return stream

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class _PinnedTransport(httpx.AsyncBaseTransport):
    """Resolves, checks, and connects to the address that was checked."""

    def __init__(self, policy: TransferPolicy) -> None:
        self._policy = policy
        context = httpx.create_ssl_context()
        self._inner = httpx.AsyncHTTPTransport(verify=context)
        # Pools are keyed by address here: a connection kept alive could serve another name than it was made for.
        self._inner._pool = httpcore.AsyncConnectionPool(
            ssl_context=context, max_keepalive_connections=0, network_backend=_CheckedBackend(policy)
        )  # fmt: skip

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        request.extensions["sni_hostname"] = host  # certificates are checked against the name, not the address
        error: httpx.TransportError = httpx.ConnectError("the name has no address")
        for address in await self._addresses(host, request.url.port or 0):
            request.url = request.url.copy_with(host=address)
            try:
                return await self._inner.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as failed:
                error = failed
        raise error

    async def _addresses(self, host: str, port: int) -> list[str]:
        try:
            found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
        except (OSError, UnicodeError) as failed:
            raise httpx.ConnectError(f"cannot resolve {host}: {failed}") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            reason = refusal(address, self._policy)
            if reason is not None:
                raise TransferError(out_of_reach(host, reason))
        return addresses

    async def aclose(self) -> None:
        await self._inner.aclose()


class Web:
    """Downloads and uploads over HTTP; see `transfer.Remote`."""

    def __init__(self, policy: TransferPolicy, nearness: Callable[[], Awaitable[str]] | None = None) -> None:
        """`nearness` tells how near the requestor is, each time that it matters: see `TransferPolicy.for_requestor`."""
        self._policy, self._nearness = policy, nearness

    async def _client(self) -> httpx.AsyncClient:
        policy = self._policy
        if self._nearness is not None and (policy.allow_loopback or policy.allow_private):
            policy = policy.for_requestor(await self._nearness())
        return httpx.AsyncClient(
            transport=_PinnedTransport(policy),
            timeout=httpx.Timeout(IDLE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            max_redirects=policy.max_redirects,
            trust_env=False,
            headers={"Accept-Encoding": "identity", "User-Agent": "golem-exe-unit"},
        )

    async def download(self, url: str, spool: Spool) -> None:
        headers = {}
        if spool.size and (spool.validator or spool.digest):  # without either, two versions might be mixed
            headers = {"Range": f"bytes={spool.size}-"} | ({"If-Range": spool.validator} if spool.validator else {})
        try:
            async with await self._client() as client, _in_time(url, "GET") as pace:
                async with _follow(client, client.build_request("GET", url, headers=headers)) as response:
                    if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and headers:
                        if response.headers.get("Content-Range", "") == f"bytes */{spool.size}":
                            return  # all of it was there
                        spool.restart()
                        raise TransferError(f"{redacted(url)}: cannot be resumed", passing=True)
                    _check_status("GET", url, response)
                    offset = _offset(response)
                    if offset != spool.size:
                        spool.restart()
                        if offset:
                            raise TransferError(f"{redacted(url)}: the server sent another range", passing=True)
                    spool.expect(_total(response, offset))
                    spool.validator = _validator(response)
                    pace.begin()
                    async for chunk in response.aiter_raw():
                        await spool.write(chunk)
                        pace.moved(len(chunk))
                    if spool.total is not None and spool.size != spool.total:
                        raise TransferError(f"{redacted(url)}: got {spool.size} bytes of {spool.total}", passing=True)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # the last: what is no name
            raise _translated("GET", url, error) from None

    async def upload(self, url: str, file: OutgoingFile, progress: Progress | None) -> None:
        size = file.size

        async def body() -> AsyncIterator[bytes]:
            sent = 0
            while sent < size:
                block = await trio.to_thread.run_sync(os.pread, file.descriptor, min(BLOCK_BYTES, size - sent), sent)
                if not block:
                    raise TransferError("the file became shorter while it was sent")
                for at in range(0, len(block), CHUNK_BYTES):
                    pace.moved(len(block[at : at + CHUNK_BYTES]))
                    yield block[at : at + CHUNK_BYTES]
                sent += len(block)
                if progress is not None:
                    progress(sent, size)
            pace.begin(HEAD_S)

        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        try:
            async with await self._client() as client, _in_time(url, "PUT") as pace:
                async with client.stream("PUT", url, content=body(), headers=headers) as response:
                    _check_status("PUT", url, response)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # the last: what is no name
            raise _translated("PUT", url, error) from None


class _Pace:
    """Ends a transfer of which less than `LEAST_BYTES` move in `PACE_S`: by a byte a minute a server would hold it for hours."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope(deadline=trio.current_time() + HEAD_S)
        self._moved, self._window_s = 0, HEAD_S

    def begin(self, window_s: float | None = None) -> None:
        """Count anew from now on."""
        self._moved, self._window_s = 0, PACE_S if window_s is None else window_s
        self.scope.deadline = trio.current_time() + self._window_s

    def moved(self, size: int) -> None:
        self._moved += size
        if self._moved >= LEAST_BYTES:
            self.begin()

    @property
    def text(self) -> str:
        if self._window_s == HEAD_S:
            return f"no answer within {HEAD_S:g} s"
        return f"too slow: {self._moved} bytes in {PACE_S:g} s, at least {LEAST_BYTES} are expected"


@asynccontextmanager
async def _in_time(url: str, method: str) -> AsyncIterator[_Pace]:
    """Yield the pace of a transfer. Raises `TransferError` where it is too slow."""
    pace = _Pace()
    with pace.scope:
        yield pace
    if pace.scope.cancelled_caught:
        raise TransferError(f"{method} {redacted(url)}: {pace.text}", passing=True)


@asynccontextmanager
async def _follow(client: httpx.AsyncClient, request: httpx.Request) -> AsyncIterator[httpx.Response]:
    """Send a request, and go where redirections lead; their bodies are not read: httpx would inflate them without a bound."""
    for _ in range(client.max_redirects + 1):
        response = await client.send(request, stream=True)
        try:
            if response.next_request is None:
                yield response
                return
            request = response.next_request
        finally:
            with trio.CancelScope(shield=True):
                await response.aclose()
    raise httpx.TooManyRedirects(f"more than {client.max_redirects} redirections", request=request)


def _check_status(method: str, url: str, response: httpx.Response) -> None:
    if not response.is_success:
        text = f"{method} {redacted(url)} answered {response.status_code} {response.reason_phrase}".rstrip()
        raise TransferError(text, passing=response.status_code in _PASSING)


def _offset(response: httpx.Response) -> int:
    """Where the body starts in the file."""
    if response.status_code != HTTPStatus.PARTIAL_CONTENT:
        return 0
    match = re.match(r"bytes (\d{1,18})-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else 0


def _validator(response: httpx.Response) -> str | None:
    """What tells this version of the file from another: a strong ETag, or else the date of its last change."""
    tag = str(response.headers.get("ETag", ""))
    changed = str(response.headers.get("Last-Modified", ""))
    return (tag if not tag.startswith("W/") else "") or changed or None


def _total(response: httpx.Response, offset: int) -> int | None:
    length = response.headers.get("Content-Length", "")
    return offset + int(length) if re.fullmatch(r"\d{1,18}", length) else None


def _translated(method: str, url: str, error: Exception) -> TransferError:
    """httpx errors as ours. A URL that cannot be used will not get better; everything on the way may."""
    passing = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)
    if isinstance(error, httpx.ConnectTimeout):
        return TransferError(f"{method} {redacted(url)}: no connection within {CONNECT_TIMEOUT_S:g} s", passing)
    if isinstance(error, httpx.TimeoutException):
        what = "nothing was taken" if isinstance(error, httpx.WriteTimeout) else "nothing came"
        return TransferError(f"{method} {redacted(url)}: {what} for {IDLE_TIMEOUT_S:g} s", passing)
    cause: BaseException | None = error
    while cause is not None and not str(cause):  # failed handshakes have their reason at the bottom only
        cause = cause.__cause__ or cause.__context__
    return TransferError(f"{method} {redacted(url)}: {cause or type(error).__name__}", passing)
