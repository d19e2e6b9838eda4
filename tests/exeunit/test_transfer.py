"""Transfers over a real loopback HTTP server, real directories, and a gftp client in memory."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import ssl
import stat
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from worlds.patience import within
from worlds.support import trio_test

import golem.exeunit.transfer.web
from golem.exeunit.runtime import Volume
from golem.exeunit.transfer.spool import Write
from golem.exeunit.transfer.transfers import HashMismatch, TransferError, TransferPolicy, Transfers, find_volume, parse_location
from golem.exeunit.transfer.web import refusal
from golem.files.outgoing import OutgoingFile

CONTENT = bytes(range(256)) * 1000
SHA = hashlib.sha3_224(CONTENT).hexdigest()


@dataclass
class WebServer:
    """A tiny HTTP/1.1 server: one connection a request, everything recorded."""

    port: int = 0
    files: dict[str, bytes] = field(default_factory=lambda: {"/f": CONTENT})
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    cut_after: list[int] = field(default_factory=list)  # body bytes after which the next answers break off
    statuses: list[int] = field(default_factory=list)  # of the next answers, instead of serving
    redirects: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    announce: bool = True  # the length of a body

    def url(self, path: str = "/f", user: str = "") -> str:
        return f"http://{user}127.0.0.1:{self.port}{path}"

    async def serve(self, stream: trio.abc.Stream) -> None:
        async with stream:
            data = b""
            while b"\r\n\r\n" not in data:
                chunk = await stream.receive_some()
                if not chunk:
                    return
                data += chunk
            head, _, body = data.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            method, path, _ = first.split(" ")
            headers = {key.lower(): value for key, value in (line.split(": ", 1) for line in lines)}
            self.requests.append((f"{method} {path}", headers))
            while len(body) < int(headers.get("content-length", 0)):
                body += await stream.receive_some()
            try:
                await stream.send_all(self.answer(method, path, headers, body))
            except trio.BrokenResourceError:
                pass  # the client had enough

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        if self.statuses:
            return _response(self.statuses.pop(0), b"sorry")
        if path in self.redirects:
            return _response(302, b"", Location=self.redirects[path])
        if method == "PUT":
            self.files[path] = body
            return _response(201, b"")
        if path not in self.files:
            return _response(404, b"nothing here")
        content, start = self.files[path], 0
        fits = headers.get("if-range", '"v1"') == '"v1"'
        if self.ranges and "range" in headers and fits:
            start = int(headers["range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return _response(416, b"", **{"Content-Range": f"bytes */{len(content)}"})
            extra = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}", "ETag": '"v1"'}
            response = _response(206, content[start:], **extra)
        else:
            response = _response(200, content, ETag='"v1"')
        if not self.announce:
            response = response.replace(b"Content-Length: ", b"X-Length: ")
        if self.cut_after:
            response = response[: response.index(b"\r\n\r\n") + 4 + self.cut_after.pop(0)]
        return response


def _response(status: int, body: bytes, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{key}: {value}" for key, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


@asynccontextmanager
async def web_server() -> AsyncIterator[WebServer]:
    server = WebServer()
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            trio.serve_tcp,
            server.serve,
            0,
        )
        server.port = listeners[0].socket.getsockname()[1]
        yield server
        nursery.cancel_scope.cancel()


@dataclass
class MemoryGftp:
    """The client's contract over a dict; breaks off as often as told."""

    files: dict[str, bytes] = field(default_factory=dict)
    failures: int = 0
    offsets: list[int] = field(default_factory=list)

    async def size(self, url: str) -> int:
        if url not in self.files:
            raise TransferError(f"{url}: not found")
        return len(self.files[url])

    async def download(self, url: str, offset: int, write: Write) -> None:
        self.offsets.append(offset)
        data = self.files[url]
        for at in range(offset, len(data), 40960):
            await write(data[at : at + 40960])
            if self.failures:
                self.failures -= 1
                raise TransferError("link lost", passing=True)

    async def upload(self, url: str, file: OutgoingFile, progress: Callable[[int, int], None] | None) -> None:
        if self.failures:
            self.failures -= 1
            raise TransferError("link lost", passing=True)
        self.files[url] = os.pread(file.descriptor, file.size, 0)


@dataclass
class Place:
    """Two volumes, a gftp client, transfers that record their waits instead of waiting."""

    root: Path
    policy: TransferPolicy = field(default_factory=TransferPolicy.local)

    def __post_init__(self) -> None:
        self.gftp = MemoryGftp()
        self.waits: list[float] = []
        self.notices: list[str] = []
        self.progress: list[tuple[int, int | None]] = []
        for name in ("in", "out"):
            (self.root / name).mkdir()
        self.volumes = (
            Volume("/golem/in", self.root / "in", read_only=True),
            Volume("/golem", self.root / "out"),
            Volume("/secret", self.root / "out", private=True),
        )

        async def sleep(seconds: float) -> None:
            self.waits.append(seconds)

        self.transfers = Transfers(self.policy, self.gftp, sleep)

    async def move(self, source: str, target: str, max_bytes: int | None = None) -> int:
        with within(20):
            return await self.transfers.transfer(
                source,
                target,
                self.volumes,
                progress=lambda done, total: self.progress.append((done, total)),
                notice=self.notices.append,
                max_bytes=max_bytes,
            )

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if not path.is_dir())


# -- URLs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scheme", "rest"),
    [
        ("container:/golem/in/x", "container", "/golem/in/x"),
        ("container:///golem/x", "container", "/golem/x"),
        ("/golem/x y", "container", "/golem/x y"),
        ("http://h/x?q", "http", "http://h/x?q"),
        ("HTTPS://h/x", "https", "HTTPS://h/x"),
        ("gftp://0xabc/def", "gftp", "gftp://0xabc/def"),
        ("file:///a%20b", "file", "/a b"),
    ],
)
def test_locations(text: str, scheme: str, rest: str) -> None:
    assert (parse_location(text).scheme, parse_location(text).rest, parse_location(text).digest) == (scheme, rest, None)


@pytest.mark.parametrize("prefix", ["hash:sha3:{}:", "hash://sha3:{}:", "hash:sha3:0x{}:", "HASH:SHA3:{}:"])
@pytest.mark.parametrize("bits", [224, 256, 384, 512])
def test_hashed_locations(prefix: str, bits: int) -> None:
    found = parse_location(prefix.format("Ab" * (bits // 8)) + "http://h:80/x:y")
    assert found.digest is not None
    assert (found.digest.bits, found.digest.hex, found.rest) == (bits, "ab" * (bits // 8), "http://h:80/x:y")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ftp://h/x", "unsupported transfer protocol 'ftp'"),
        ("hash:sha3:abcd:http://h/x", "unsupported hash sha3 of 16 bits"),
        (f"hash:md5:{SHA}:http://h/x", "unsupported hash md5"),
        (f"hash:sha3:{SHA}", "malformed hash URL"),
        ("http:///x", "no host"),
        ("http://[::1/x", "no host"),
        ("container:/a\0b", "NUL"),
        ("http://h/" + "x" * 9000, "too long"),
    ],
)
def test_bad_locations(text: str, reason: str) -> None:
    with pytest.raises(TransferError, match=reason):
        parse_location(text)


# -- HTTP ---------------------------------------------------------------------------------------------------------


@trio_test
async def test_http_download_with_hash_auth_and_progress(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with web_server() as web:
        size = await place.move(f"hash:sha3:{SHA}:" + web.url(user="me:secret@"), "container:/golem/in/deep/f")
        assert web.requests[0][1]["authorization"] == "Basic " + b64encode(b"me:secret").decode()
        assert web.requests[0][1]["host"] == f"127.0.0.1:{web.port}"
    assert size == len(CONTENT)
    assert (tmp_path / "in/deep/f").read_bytes() == CONTENT
    assert place.progress[-1] == (len(CONTENT), len(CONTENT))
    assert place.files() == ["in/deep/f"]


def certificate(folder: Path, *names: str) -> ssl.SSLContext:
    """Make a self-signed certificate for these names (`folder/ca.pem`); return the server's side of it."""
    key, today = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    found: list[x509.GeneralName] = [x509.DNSName(name) for name in names if name != "127.0.0.1"]
    if "127.0.0.1" in names:
        found.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    made = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(1).not_valid_before(today - datetime.timedelta(days=1)).not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(found), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "ca.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.pem", folder / "key.pem")
    return context


@pytest.mark.parametrize(
    ("names", "trusted", "error"),
    [
        (("localhost",), True, None),
        (("localhost",), False, "certificate verify failed"),
        (("127.0.0.1", "elsewhere.example"), True, "certificate verify failed"),  # good for the address, not for the name
    ],
)
@trio_test
async def test_https_is_checked_against_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], trusted: bool, error: str | None
) -> None:
    place, server = Place(tmp_path), WebServer()
    context = certificate(tmp_path, *names)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))

    async def serve(stream: trio.SSLStream[trio.SocketStream]) -> None:
        with suppress(trio.BrokenResourceError):  # a client that does not trust us
            await server.serve(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_ssl_over_tcp, serve, 0, context, host="127.0.0.1"))
        url = f"hash:sha3:{SHA}:https://localhost:{listeners[0].transport_listener.socket.getsockname()[1]}/f"
        if error is None:
            assert await place.move(url, "container:/golem/in/f") == len(CONTENT)
            assert (tmp_path / "in/f").read_bytes() == CONTENT
        else:
            with pytest.raises(TransferError, match=error):
                await place.move(url, "container:/golem/in/f")
            assert server.requests == []
        nursery.cancel_scope.cancel()


@trio_test
async def test_http_download_is_resumed(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with web_server() as web:
        web.cut_after = [100_000, 50_000]
        await place.move(f"hash:sha3:{SHA}:" + web.url(), "container:/golem/f")
        assert [headers.get("range") for _, headers in web.requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert (tmp_path / "out/f").read_bytes() == CONTENT
    assert place.waits == [2, 4]
    assert place.notices[0].startswith("Retry in 2s because of error: ")


@trio_test
async def test_server_without_ranges_starts_over(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with web_server() as web:
        web.cut_after, web.ranges = [100_000], False
        await place.move(f"hash:sha3:{SHA}:" + web.url(), "container:/golem/f")
        assert web.requests[1][1]["range"] == "bytes=100000-"
    assert (tmp_path / "out/f").read_bytes() == CONTENT


@trio_test
async def test_file_that_changed_meanwhile_is_not_mixed(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with web_server() as web:
        web.cut_after, web.statuses = [100_000], []
        answer = web.answer

        def changing(method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
            web.files["/f"] = CONTENT if "range" not in headers else b"new"
            # The server honours If-Range: another version means the whole of it.
            return answer(method, path, {key: value for key, value in headers.items() if key != "range"}, body)

        web.answer = changing  # type: ignore[method-assign]
        await place.move(web.url(), "container:/golem/f")
    assert (tmp_path / "out/f").read_bytes() == b"new"


@trio_test
async def test_third_failure_is_final(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with web_server() as web:
        web.statuses = [503, 503, 503]
        with pytest.raises(TransferError, match="answered 503"):
            await place.move(web.url(), "container:/golem/f")
        assert len(web.requests) == 3
    assert place.files() == []


@trio_test
async def test_missing_file_is_told_at_once(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with web_server() as web:
        with pytest.raises(TransferError, match="answered 404") as caught:
            await place.move(web.url("/gone?token=t", user="me:secret@"), "container:/golem/f")
    assert place.waits == []
    assert "secret" not in str(caught.value)
    assert "token" not in str(caught.value)


@trio_test
async def test_wrong_hash_leaves_the_old_file(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "out/f").write_text("old")
    async with web_server() as web:
        with pytest.raises(TransferError, match="hash mismatch"):
            await place.move(f"hash:sha3:{'0' * 56}:" + web.url(), "container:/golem/f")
    assert (tmp_path / "out/f").read_text() == "old"
    assert place.files() == ["out/f"]


@trio_test
async def test_size_limit_holds_with_and_without_an_announcement(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with web_server() as web:
        with pytest.raises(TransferError, match="too large: 256000 bytes, at most 1000"):
            await place.move(web.url(), "container:/golem/f", max_bytes=1000)
        web.announce = False
        with pytest.raises(TransferError, match="too large: more than 1000 bytes"):
            await place.move(web.url(), "container:/golem/f", max_bytes=1000)
        assert await place.move(web.url(), "container:/golem/f") == len(CONTENT)
        (tmp_path / "out/f").unlink()
    with pytest.raises(TransferError, match="too large"):
        await place.move(_put(place, b"12345"), "container:/golem/f", max_bytes=4)
    assert place.files() == []


@trio_test
async def test_the_room_in_the_volumes_does_not_limit_what_leaves_them(tmp_path: Path) -> None:
    place = Place(tmp_path, TransferPolicy(allow_loopback=True, max_bytes=len(CONTENT)))
    (tmp_path / "out/f").write_bytes(CONTENT)
    assert await place.move("container:/golem/f", "gftp://0x1/b", max_bytes=0) == len(CONTENT)
    with pytest.raises(TransferError, match="too large"):
        await place.move("gftp://0x1/b", "gftp://0x1/c", max_bytes=len(CONTENT) - 1)  # it lies on our disk meanwhile
    (tmp_path / "out/f").write_bytes(CONTENT + b"x")
    with pytest.raises(TransferError, match="too large"):
        await place.move("container:/golem/f", "gftp://0x1/b")


def _put(place: Place, data: bytes) -> str:
    place.gftp.files["gftp://0x1/a"] = data
    return "gftp://0x1/a"


@pytest.mark.parametrize("code", ["", "-" + "7" * 32])
@trio_test
async def test_a_name_of_gftp_begins_with_the_hash_of_the_content(tmp_path: Path, code: str) -> None:
    place = Place(tmp_path)
    right, wrong = (f"gftp://0x1/{one}{code}" for one in (hashlib.sha3_256(CONTENT).hexdigest(), "0" * 64))
    place.gftp.files[right] = place.gftp.files[wrong] = CONTENT
    assert await place.move(right, "container:/golem/f") == len(CONTENT)
    with pytest.raises(TransferError, match="hash mismatch"):
        await place.move(wrong, "container:/golem/g")


@trio_test
async def test_redirects(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with web_server() as web:
        web.redirects = {f"/{n}": f"/{n + 1}" for n in range(30)}
        web.files["/30"] = b"end"
        await place.move(web.url("/20"), "container:/golem/f")
        assert (tmp_path / "out/f").read_bytes() == b"end"
        with pytest.raises(TransferError, match="redirect"):
            await place.move(web.url("/19"), "container:/golem/f")
        web.redirects["/away"] = "file:///etc/passwd"
        with pytest.raises(TransferError):
            await place.move(web.url("/away"), "container:/golem/f")


ODD_HOSTS = (
    "xn--a", "xn--", "xn--zzzzzzzz--", "a.xn--0", "\u00df\u200d", "\u0640", "a" * 64, "...", "\U000e0041", "[::1", "%31", "-",
    "a..b", "127.0.0.1:99999", "127.0.0.1:x",
)  # fmt: skip


@pytest.mark.parametrize("host", ODD_HOSTS)
@trio_test
async def test_hosts_that_are_none_fail_their_transfer_alone(tmp_path: Path, host: str) -> None:
    """In an URL, and where a redirection leads; nothing else than a fault of the transfer comes of it."""
    place = Place(tmp_path)
    (tmp_path / "out/f").write_bytes(CONTENT)
    async with web_server() as web:
        web.redirects["/odd"] = f"http://{host}/x"
        for url in (web.url("/odd"), f"http://{host}/x"):
            with pytest.raises(TransferError):
                await place.move(url, "container:/golem/g")
        with pytest.raises(TransferError):
            await place.move("container:/golem/f", f"http://{host}/x")


@trio_test
async def test_upload(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "out/f").write_bytes(CONTENT)
    async with web_server() as web:
        web.statuses = [500]
        assert await place.move(f"hash:sha3:{SHA}:container:/golem/f", web.url("/up")) == len(CONTENT)
        assert web.files["/up"] == CONTENT
        assert web.requests[0][1]["content-length"] == str(len(CONTENT))
        with pytest.raises(TransferError, match="hash mismatch"):
            await place.move(f"hash:sha3:{'0' * 56}:container:/golem/f", web.url("/up2"))
        assert "/up2" not in web.files


@trio_test
async def test_private_addresses_are_out_of_reach(tmp_path: Path) -> None:
    place = Place(tmp_path, TransferPolicy())
    async with web_server() as web:
        for host in ("127.0.0.1", "localhost", "[::1]", "2130706433", "[::ffff:127.0.0.1]"):
            with pytest.raises(TransferError, match="loopback"):
                await place.move(f"http://{host}:{web.port}/f", "container:/golem/f")
        assert web.requests == []


@trio_test
async def test_redirect_to_a_private_address_is_refused(tmp_path: Path) -> None:
    place = Place(tmp_path, TransferPolicy(allow_loopback=True))
    async with web_server() as web:
        web.redirects["/r"] = "http://10.0.0.1/"
        with pytest.raises(TransferError, match="private"):
            await place.move(web.url("/r"), "container:/golem/f")


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("1.1.1.1", True), ("2606:4700::1111", True), ("127.8.8.8", False), ("10.1.1.1", False), ("192.168.0.1", False),
        ("172.16.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False),
        ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False), ("fe80::1%eth0", False),
        ("fd00::1", False), ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False), ("2002:a00:1::", False),
        ("::127.0.0.1", False), ("::ffff:0:127.0.0.1", False), ("::ffff:1.1.1.1", True), ("64:ff9b:1::1", False),
        ("fec0::1", False), ("ff02::1", False), ("0.1.2.3", False), ("192.0.0.192", False), ("198.18.0.1", False),
        ("240.0.0.1", False), ("168.63.129.16", False), ("2001:db8::1", False), ("100.127.255.255", False),
    ],
)  # fmt: skip
def test_address_policy(address: str, allowed: bool) -> None:
    assert (refusal(address, TransferPolicy()) is None) is allowed


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "::ffff:169.254.169.254", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "0.0.0.0"]
)
def test_metadata_services_stay_out_of_reach_even_locally(address: str) -> None:
    assert refusal(address, TransferPolicy.local()) is not None


@trio_test
async def test_a_name_is_looked_up_once_and_every_address_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, TransferPolicy(allow_loopback=True))
    answers = [["127.0.0.1"], ["10.0.0.1"], ["127.0.0.1", "10.0.0.1"], ["10.0.0.1"]]
    asked: list[str] = []

    async def lookup(host: str, port: int, **how: object) -> list[tuple[object, ...]]:
        asked.append(host)
        return [(0, 0, 0, "", (address, port)) for address in answers.pop(0)]

    async with web_server() as web:
        monkeypatch.setattr(trio.socket, "getaddrinfo", lookup)  # trio's own connections ask it only for names
        url = f"http://rebinds.example:{web.port}/f"
        assert await place.move(url, "container:/golem/f") == len(CONTENT)  # connected to what was checked
        assert web.requests[0][1]["host"] == f"rebinds.example:{web.port}"
        assert asked[0] == "rebinds.example"
        assert asked.count("rebinds.example") == 1
        del answers[0:1]
        with pytest.raises(TransferError, match="private"):
            await place.move(url, "container:/golem/f")
        assert len(web.requests) == 1


@trio_test
async def test_credentials_go_to_their_host_only(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with web_server() as web, web_server() as other:
        web.redirects["/away"] = other.url()
        web.redirects["/here"] = web.url()
        web.redirects["/named"] = f"http://you:hidden@127.0.0.1:{other.port}/f"
        await place.move(web.url("/here", user="me:secret@"), "container:/golem/f")
        assert "authorization" in web.requests[1][1]
        for path in ("/away", "/named"):
            await place.move(web.url(path, user="me:secret@"), "container:/golem/f")
            assert "cookie" not in other.requests[-1][1]
            assert b64encode(b"me:secret").decode() not in other.requests[-1][1].get("authorization", "")
        web.redirects["/up"] = other.url("/up")
        with pytest.raises(TransferError, match="answered 302"):
            await place.move("container:/golem/f", web.url("/up", user="me:secret@"))
        assert "/up" not in other.files


@trio_test
async def test_error_pages_are_not_content(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with web_server() as web:
        for status in (400, 401, 403, 404, 410, 451, 501):
            web.statuses = [status]
            with pytest.raises(TransferError, match=f"answered {status}"):
                await place.move(web.url(), "container:/golem/f")
        assert place.waits == []
        assert place.files() == []


@trio_test
async def test_servers_that_never_end_or_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)
    monkeypatch.setattr(golem.exeunit.transfer.web, "IDLE_TIMEOUT_S", 0.1)

    async def endless(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                await stream.send_all(bytes(1 << 16))

    async def silent(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.receive_some()

    async def garbage(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        with suppress(trio.BrokenResourceError):
            await stream.send_all(b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 20))

    for handler, text in ((endless, "too large: more than 5000000"), (silent, "nothing came for 0.1 s"), (garbage, "f: ")):
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
            port = listeners[0].socket.getsockname()[1]
            with pytest.raises(TransferError, match=text):
                await place.move(f"http://127.0.0.1:{port}/f", "container:/golem/f", max_bytes=5_000_000)
            nursery.cancel_scope.cancel()
    assert place.files() == []


@trio_test
async def test_a_transfer_has_a_time_limit(tmp_path: Path) -> None:
    place = Place(tmp_path, TransferPolicy(allow_loopback=True, max_time_s=0.1))

    class Stuck(MemoryGftp):
        async def download(self, url: str, offset: int, write: Write) -> None:
            await trio.sleep_forever()

    place.transfers = Transfers(place.policy, Stuck({"gftp://0x1/a": CONTENT}))
    with pytest.raises(TransferError, match=r"longer than 0\.1 s"):
        await place.move("gftp://0x1/a", "container:/golem/f")
    assert place.files() == []


# -- gftp ---------------------------------------------------------------------------------------------------------


@trio_test
async def test_gftp_both_ways(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.gftp.files["gftp://0x1/a"] = CONTENT
    place.gftp.failures = 2
    await place.move("gftp://0x1/a", "container:/golem/f")
    assert place.gftp.offsets == [0, 40960, 81920]  # taken up where it broke off
    place.gftp.failures = 1
    await place.move("container:/golem/f", "gftp://0x1/b")
    assert place.gftp.files["gftp://0x1/b"] == CONTENT
    with pytest.raises(TransferError, match="not found"):
        await place.move("gftp://0x1/none", "container:/golem/g")


@trio_test
async def test_remote_to_remote(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with web_server() as web:
        await place.move(f"hash:sha3:{SHA}:{web.url()}", "gftp://0x1/b")
    assert place.gftp.files["gftp://0x1/b"] == CONTENT


@trio_test
async def test_without_gftp_it_says_so(tmp_path: Path) -> None:
    transfers = Transfers(TransferPolicy())
    with pytest.raises(TransferError, match="not available"):
        await transfers.transfer("gftp://0x1/a", "container:/x", (Volume("/", tmp_path),))


# -- volumes ------------------------------------------------------------------------------------------------------


def test_longest_prefix_wins(tmp_path: Path) -> None:
    volumes = Place(tmp_path).volumes
    assert find_volume(volumes, "/golem/in/a/b") == (volumes[0], "a/b")
    assert find_volume(volumes, "/golem/inner") == (volumes[1], "inner")
    assert find_volume((Volume("/", tmp_path),), "/any/thing")[1] == "any/thing"
    for path in ("/elsewhere", "/secret/f", "/golemx"):
        with pytest.raises(TransferError, match="path not found in container"):
            find_volume(volumes, path)
    for path in ("/golem/a/", "/golem/in/"):
        with pytest.raises(TransferError, match="directory"):
            find_volume(volumes, path)
    with pytest.raises(TransferError, match=r"\.\."):
        find_volume(volumes, "/golem/../etc/passwd")


@trio_test
async def test_copy_within_the_container(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "in/f").write_bytes(CONTENT)
    await place.move(f"hash:sha3:{SHA}:container:/golem/in/f", "container:/golem/a/b/c")
    assert (tmp_path / "out/a/b/c").read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["link", "dir/f", "fifo", "up/x"])
@trio_test
async def test_planted_traps_are_not_stepped_into(tmp_path: Path, path: str) -> None:
    place = Place(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("secret")
    (tmp_path / "out/link").symlink_to(outside / "f")
    (tmp_path / "out/dir").symlink_to(outside)
    (tmp_path / "out/up").symlink_to("..")
    os.mkfifo(tmp_path / "out/fifo")
    with pytest.raises(TransferError, match=r"cannot read|symbolic link|regular"):
        await place.move(f"container:/golem/{path}", "gftp://0x1/b")
    assert place.gftp.files == {}
    place.gftp.files["gftp://0x1/a"] = b"new"
    if "/" in path:
        with pytest.raises(TransferError, match="cannot write"):
            await place.move("gftp://0x1/a", f"container:/golem/{path}")
    else:
        await place.move("gftp://0x1/a", f"container:/golem/{path}")  # replaces the trap itself
        assert (tmp_path / "out" / path).read_bytes() == b"new"
    assert (outside / "f").read_text() == "secret"
    assert sorted(item.name for item in outside.iterdir()) == ["f"]


LINKS = {  # below a volume that the guest knows as /golem -> where it leads
    "beside": "f",
    "deep/up": "../f",
    "chain": "beside",
    "whole": "/golem/f",
    "whole-chain": "/golem/whole",
    "by-dir": "deep/again/f",
    "deep/again": "..",
}


@pytest.mark.parametrize("path", LINKS)
@trio_test
async def test_links_that_stay_in_the_volume_are_followed(tmp_path: Path, path: str) -> None:
    place = Place(tmp_path)
    (tmp_path / "out/deep").mkdir()
    (tmp_path / "out/f").write_bytes(CONTENT)
    for name, target in LINKS.items():
        (tmp_path / "out" / name).symlink_to(target)
    if path == "deep/again":
        await place.move(_put(place, b"x"), "container:/golem/deep/again/deep/new/g")
        assert (tmp_path / "out/deep/new/g").read_bytes() == b"x"
    else:
        await place.move(f"container:/golem/{path}", "gftp://0x1/b")
        assert place.gftp.files["gftp://0x1/b"] == CONTENT


@pytest.mark.parametrize(("target", "words"), [
    ("/golem/loop", "leads out"),
    ("loop", "lead nowhere"),
    ("/golem/../etc/passwd", "leads out"),
    ("/golem/deep/../../../etc/passwd", "leads out"),
    ("/golem", "leads out"),
    ("/golems/f", "leads out"),
    ("/proc/self/root/etc/passwd", "leads out"),
    ("missing", "No such file"),
    ("/golem/missing", "No such file"),
    (".", "not a regular file"),
])  # fmt: skip
@trio_test
async def test_links_that_lead_nowhere_or_out_are_told(tmp_path: Path, target: str, words: str) -> None:
    place = Place(tmp_path)
    (tmp_path / "out/deep").mkdir()
    (tmp_path / "out/loop").symlink_to(target)
    with pytest.raises(TransferError, match=words):
        await place.move("container:/golem/loop", "gftp://0x1/b")
    assert place.gftp.files == {}


@trio_test
async def test_directory_in_the_way(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "out/d").mkdir()
    (tmp_path / "out/f").write_text("x")
    for target in ("container:/golem/d", "container:/golem/f/g"):
        with pytest.raises(TransferError, match="cannot write"):
            await place.move(_put(place, b"x"), target)
    assert place.files() == ["out/f"]


@pytest.mark.root
@pytest.mark.parametrize(("volume", "directory", "file"), [(0o755, 0o755, 0o644), (0o777, 0o777, 0o666), (0o2775, 0o775, 0o664)])
@trio_test
async def test_what_is_brought_in_belongs_to_the_guest(tmp_path: Path, volume: int, directory: int, file: int) -> None:
    place = Place(tmp_path)
    os.chown(tmp_path / "out", 54321, 54322)
    (tmp_path / "out").chmod(volume)
    mask = os.umask(0o077)
    try:
        await place.move(_put(place, b"x"), "container:/golem/a/b")
    finally:
        os.umask(mask)
    for path, mode in (("out/a", directory), ("out/a/b", file)):
        found = (tmp_path / path).stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode) & 0o777) == (54321, 54322, mode)


@trio_test
async def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "out/script").touch(0o755)
    (tmp_path / "out/script").chmod(0o4755)
    await place.move(_put(place, b"x"), "container:/golem/script")
    assert stat.S_IMODE((tmp_path / "out/script").stat().st_mode) == 0o755


@pytest.mark.root
@trio_test
async def test_a_volume_may_be_a_mount_but_may_not_hold_others(tmp_path: Path) -> None:
    place = Place(tmp_path)
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,nosuid,nodev", "none"]
    async with AsyncExitStack() as stack:
        for path in (tmp_path / "out", tmp_path / "out/inner"):
            path.mkdir(exist_ok=True)
            if (await trio.run_process([*mount, str(path)], check=False, capture_stderr=True)).returncode:
                pytest.skip("no mounts here")
            stack.push_async_callback(trio.run_process, ["umount", str(path)])
        assert await place.move(_put(place, b"x"), "container:/golem/a/b") == 1
        assert await place.move("container:/golem/a/b", "gftp://0x1/back") == 1
        (tmp_path / "out/inner/secret").write_text("s")
        with pytest.raises(TransferError, match="leads out of the volume"):
            await place.move("container:/golem/inner/secret", "gftp://0x1/b")
        with pytest.raises(TransferError, match="leads out of the volume"):
            await place.move("gftp://0x1/a", "container:/golem/inner/x")
        place.gftp.files["gftp://0x1/a"] = bytes(3 << 20)
        with pytest.raises(TransferError, match="No space left on device"):
            await place.move("gftp://0x1/a", "container:/golem/big")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "inner"]


@trio_test
async def test_file_urls_are_for_packages_only(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for source, target in (("file:///etc/passwd", "container:/golem/f"), ("container:/golem/f", "file:///tmp/x")):
        with pytest.raises(TransferError, match="file: URLs are not supported"):
            await place.move(source, target)
    with pytest.raises(TransferError, match="belongs to the source"):
        await place.move("container:/golem/f", f"hash:sha3:{SHA}:gftp://0x1/b")


# -- what an earlier fetch left -----------------------------------------------------------------------------------


async def fetch_into(place: Place, url: str, path: Path, resume: bool = True) -> int:
    with path.open("r+b") as file, within(20):
        return await place.transfers.fetch(
            parse_location(url), file.fileno(), max_bytes=1 << 30, resume=resume, notice=place.notices.append
        )


@pytest.mark.parametrize("kept", [0, 1, 100_000, len(CONTENT)])
@trio_test
async def test_a_fetch_goes_on_after_what_is_there(tmp_path: Path, kept: int) -> None:
    place, part = Place(tmp_path), tmp_path / "part"
    place.gftp.files["gftp://0x1/a"] = CONTENT
    async with web_server() as web:
        for url in (web.url(), "gftp://0x1/a"):
            part.write_bytes(CONTENT[:kept])
            assert await fetch_into(place, f"hash:sha3:{SHA}:{url}", part) == len(CONTENT)
            assert part.read_bytes() == CONTENT
        assert web.requests[0][1].get("range") == (f"bytes={kept}-" if kept else None)
        assert place.gftp.offsets == [kept]
        await fetch_into(place, web.url(), part)  # without a hash nothing tells whether it fits
        assert "range" not in web.requests[1][1]
    assert place.notices == []


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * len(CONTENT), b"x" * (len(CONTENT) + 1)])
@trio_test
async def test_a_beginning_that_does_not_fit_is_fetched_anew(tmp_path: Path, left: bytes) -> None:
    place, part = Place(tmp_path), tmp_path / "part"
    place.gftp.files["gftp://0x1/a"] = CONTENT
    async with web_server() as web:
        for url in (web.url(), "gftp://0x1/a"):
            part.write_bytes(left)
            assert await fetch_into(place, f"hash:sha3:{SHA}:{url}", part) == len(CONTENT)
            assert part.read_bytes() == CONTENT
        part.write_bytes(left)
        with pytest.raises(HashMismatch):
            await fetch_into(place, f"hash:sha3:{'0' * 56}:{web.url()}", part)


@trio_test
async def test_a_cancelled_fetch_leaves_a_beginning(tmp_path: Path) -> None:
    place, part = Place(tmp_path), tmp_path / "part"
    content = CONTENT * 10
    part.touch()
    with trio.CancelScope() as scope:

        class Stuck(MemoryGftp):
            async def download(self, url: str, offset: int, write: Write) -> None:
                await write(content[: 1 << 20])
                scope.cancel()
                await trio.sleep_forever()

        place.gftp = Stuck({"gftp://0x1/a": content})
        place.transfers = Transfers(place.policy, place.gftp)
        await fetch_into(place, f"hash:sha3:{SHA}:gftp://0x1/a", part)
    assert part.read_bytes() == content[: 1 << 20]
