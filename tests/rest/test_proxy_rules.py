"""What of an HTTP request reaches a service inside an activity, and what of its answer comes back."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from worlds.support import trio_test
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, Ping
from wsproto.frame_protocol import CloseReason

from golem.interaction.broker import ServiceStream
from golem.rest.edge import ApiError
from golem.rest.proxy_rules import SANDBOX, Target, cross_origin, forwarded, key_of, returned, without_key
from golem.rest.proxy_socket import _Relay

HERE = b"/activity-api/v1/activity/1/proxy-http"
KEY = b"0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(("url", "port", "path", "prefix"), [
    (b"8080", 8080, b"/", b"/8080"),
    (b"8080/", 8080, b"/", b"/8080"),
    (b"8080/a//b%2Fc/", 8080, b"/a//b%2Fc/", b"/8080"),
    (b"http://localhost:8080/a", 8080, b"/a", b"/8080"),
    (b"http:/127.0.0.1:81/a", 81, b"/a", b"/81"),  # some clients take one of two slashes away
    (b"http://[::1]/x", 80, b"/x", b"/80"),
    (b"ws://LocalHost:9/x", 9, b"/x", b"/9"),
    (b"", 0, b"/", b""),
    (b"v1/chat", 0, b"/v1/chat", b""),
    (b"123456/x", 0, b"/123456/x", b""),
])  # fmt: skip
def test_the_place_of_the_port(url: bytes, port: int, path: bytes, prefix: bytes) -> None:
    target = Target(HERE, url, b"")
    assert (target.port, target.path, target.prefix) == (port, path, HERE + prefix)


@pytest.mark.parametrize(
    "url", [b"0/x", b"70000", b"http://10.0.0.1:80/", b"https://localhost/", b"http://example.com/a", b"ftp://localhost/"]
)
def test_what_cannot_be_reached(url: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        Target(HERE, url, b"")
    assert caught.value.status == 400


def test_the_key_stays_here() -> None:
    assert without_key(b"a=1&authToken=" + KEY + b"&b=%20&auth%54oken=x&c") == b"a=1&b=%20&c"
    assert key_of(b"a=1&auth%54oken=ab+c") == "ab c"
    assert key_of(b"a=1") == ""
    assert Target(HERE, b"80", b"authToken=" + KEY).path == b"/"
    target = Target(HERE, b"80/x", b"q=1&authToken=" + KEY)
    sent = forwarded([
        (b"Host", b"127.0.0.1:7465"), (b"authorization", b"Bearer " + KEY), (b"Authorization", b"bEARER\t" + KEY),
        (b"authorization", b"Basic dTpw"), (b"referer", b"http://x/?authToken=" + KEY),
        (b"referer", b"http://x/?auth%54oken=" + KEY),
        (b"cookie", b"a=b"), (b"connection", b"keep-alive, X-Hop"), (b"x-hop", b"1"), (b"te", b"trailers"),
        (b"upgrade", b"h2c"), (b"proxy-authorization", b"Basic x"), (b"expect", b"100-continue"), (b"content-length", b"3"),
        (b"x-mine", b"\xe4"),
    ], target)  # fmt: skip
    assert sent == [
        (b"host", b"localhost:80"), (b"authorization", b"Basic dTpw"), (b"cookie", b"a=b"), (b"content-length", b"3"),
        (b"x-mine", b"\xe4"), (b"x-forwarded-prefix", HERE + b"/80"),
    ]  # fmt: skip
    assert not any(KEY in value for _, value in sent)
    for sign in ((b"sec-fetch-site", b"none"), (b"user-agent", b"Mozilla/5.0 (X11)")):  # one of them with a websocket
        assert b"cookie" not in dict(forwarded([sign, (b"cookie", b"of=another-program")], target))
    assert b"cookie" in dict(forwarded([(b"sec-fetch-mode", b"cors"), (b"cookie", b"its=own")], target)), "Node.js"
    browser = forwarded([(b"sec-fetch-site", b"none"), (b"cookie", b"of=another-program")], target)
    assert b"cookie" not in dict(browser)


def test_the_answer() -> None:
    target = Target(HERE, b"8080", b"")
    found = returned([
        (b"date", b"x"), (b"server", b"x"), (b"connection", b"close, x-hop"), (b"x-hop", b"1"), (b"keep-alive", b"x"),
        (b"transfer-encoding", b"chunked"), (b"content-type", b"text/html"), (b"access-control-allow-origin", b"*"),
        (b"content-security-policy", b"default-src 'none'"), (b"location", b"/login?a=1"),
    ], target)  # fmt: skip
    assert found == [
        (b"content-security-policy", SANDBOX), (b"content-type", b"text/html"),
        (b"content-security-policy", b"default-src 'none'"), (b"location", HERE + b"/8080/login?a=1"),
    ]  # fmt: skip
    for there, here in (
        (b"http://localhost:8080/x", HERE + b"/8080/x"), (b"http://localhost:8080", HERE + b"/8080/"),
        (b"http://localhost:81/x", HERE + b"/81/x"), (b"//example.com/x", b"//example.com/x"),
        (b"https://example.com/", b"https://example.com/"), (b"x/y", HERE + b"/8080/x/y"), (b"?b=1#c", HERE + b"/8080/?b=1#c"),
        (b"mailto:x", b"mailto:x"), (b"//localhost:8080/x", HERE + b"/8080/x"), (b"/a/./b/", HERE + b"/8080/a/b/"),
    ):  # fmt: skip
        assert target.back(there) == here


def test_pages_of_other_origins() -> None:
    asked = [(b"Origin", b"http://mine")]
    assert dict(cross_origin(asked, {"http://mine"}))[b"access-control-allow-origin"] == b"http://mine"
    assert cross_origin(asked, {"*"})
    assert cross_origin(asked, {"http://yours"}) == []
    assert cross_origin([], {"*"}) == []


@pytest.mark.parametrize("location", [
    b"/../../../../../../payment-api/v1/x", b"../../../../../../../payment-api/v1/x", b"/a/%2e%2E/.%2e/../payment-api",
    b"/a\\..\\..\\..\\payment-api", b"/.\t./../payment-api", b"http://localhost:8080/../../payment-api", b"/..",
    b"http://127.0.0.1:7465/payment-api", b"//127.0.0.1:7465/payment-api", b"http://[::1]:7465/../payment-api",
])  # fmt: skip
def test_no_redirection_leads_to_the_node(location: bytes) -> None:
    """Clients follow redirections with the app-key, and 307 with the method and the body."""
    for origin in (b"", b"somewhere:7465"):
        back = Target(HERE, b"8080/sub/page", b"", origin).back(location)
        assert back is not None
        assert back.startswith((HERE + b"/8080/", HERE + b"/7465/"))
        assert not {b"..", b"%2e%2e"} & set(back.lower().split(b"/"))


@pytest.mark.parametrize("location", [
    b"http://node.lan:7465/payment-api", b"//node.lan:7465/x", b"HTTP://user@NODE.lan:7465", b"http:\\\\node.lan:7465/x",
    b"http:/node.lan:7465/x", b"ht\ttp://node.lan:7465/x", b"///node.lan:7465/x",
])  # fmt: skip
def test_no_redirection_names_the_node(location: bytes) -> None:
    target = Target(HERE, b"8080/sub/page", b"", b"node.lan:7465")
    assert returned([(b"location", location)], target) == [(b"content-security-policy", SANDBOX)]


def test_a_service_does_not_speak_for_the_whole_address() -> None:
    target = Target(HERE, b"8080", b"")
    given = [(b"clear-site-data", b'"*"'), (b"service-worker-allowed", b"/"), (b"set-cookie", b"a=1")]
    cookie = b"a=1; Path=" + HERE + b"/8080"
    assert returned(given, target) == [(b"content-security-policy", SANDBOX), (b"set-cookie", cookie)]
    assert returned(given, target, to_browser=True) == [(b"content-security-policy", SANDBOX)]


@pytest.mark.parametrize(("given", "path"), [
    (b"a=1", b""), (b"a=1; Path=/", b""), (b"a=1; PATH = /sub/", b"/sub/"), (b"a=1; path=/a;Path=/b", b"/b"),
    (b"a=1; path=../../..", b""), (b"a=1; path=/../../..", b""), (b"a=1; path=/x/%2e%2e/%2e%2e/payment-api", b"/payment-api"),
    (b"a=1; path=/x/..%2f../payment-api", b"/payment-api"), (b"a=1; path=", b""), (b"a=1; domain=127.0.0.1; Domain=.lan", b""),
])  # fmt: skip
def test_a_cookie_is_of_its_service(given: bytes, path: bytes) -> None:
    found = dict(returned([(b"set-cookie", given)], Target(HERE, b"8080", b"")))
    assert found[b"set-cookie"] == b"a=1; Path=" + HERE + b"/8080" + path
    plain = b"a=1; HttpOnly; Max-Age=5; Expires=Wed, 09 Jun 2100 10:18:14 GMT"
    assert returned([(b"set-cookie", plain)], Target(HERE, b"80", b""))[1][1] == plain + b"; Path=" + HERE + b"/80"


@pytest.mark.parametrize("given", [b"", b";path=/", b"a=1\x01; path=/", b"a=1 path=/ b=2", b"a", b"=1", b"a=1, b=2"])
def test_what_is_no_cookie(given: bytes) -> None:
    assert len(returned([(b"set-cookie", given)], Target(HERE, b"8080", b""))) == 1


def test_a_page_that_opens_another() -> None:
    target = Target(HERE, b"8080", b"", b"node.lan:7465")
    for given, back in (
        (b"5", b"5"), (b"0; url=/x", b"0; url=" + HERE + b"/8080/x"), (b"1;URL='../../../me'", b"1; url=" + HERE + b"/8080/me"),
        (b"0, http://localhost:81", b"0; url=" + HERE + b"/81/"), (b"0;url=http://node.lan:7465/me", None),
        (b"0; url=//127.1:7465/me", None), (b"x", None), (b"0 //127.0.0.1:7465/me", None),
    ):  # fmt: skip
        assert dict(returned([(b"refresh", given)], target)).get(b"refresh") == back
    two = returned([(b"location", b"/a"), (b"location", b"/b")], target)
    assert [value for name, value in two if name == b"location"] == [HERE + b"/8080/a"]


def test_two_ways_to_tell_a_length_are_one() -> None:
    target = Target(HERE, b"8080", b"")
    both = [(b"content-length", b"5"), (b"transfer-encoding", b"chunked")]
    assert (b"content-length", b"5") not in returned(both, target)
    assert (b"content-length", b"5") not in forwarded(both, target)
    assert (b"content-length", b"5") in returned(both[:1], target)
    assert (b"content-length", b"5") in forwarded(both[:1], target)


# -- websockets
class Wire(ServiceStream):
    """A service's end: what it says, and what it is told, in pieces of one byte."""

    def __init__(self, *says: bytes) -> None:
        self.says, self.told = list(says), b""
        self.may_end = trio.Event()

    async def receive_some(self) -> bytes:
        if not self.says:
            await self.may_end.wait()
            return b""
        return self.says.pop(0)

    async def send_all(self, data: bytes) -> None:
        for at in range(len(data)):
            await trio.lowlevel.checkpoint()
            self.told += data[at : at + 1]


def relay(wire: Wire, receive: Any, sent: list[Any]) -> _Relay:
    """A relay after its handshake."""

    async def send(message: Any) -> None:
        sent.append(message)

    made = _Relay(wire, receive, send)
    made._service = Connection(ConnectionType.CLIENT)  # type: ignore[assignment]
    return made


@trio_test
async def test_pieces_of_nothing_do_not_fill_memory() -> None:
    wire = Wire(b"\x01\x00", *(b"\x00\x00" * 10_000 for _ in range(3)), b"\x00\x02ab", b"\x80\x00", b"\x88\x02\x03\xe8")
    sent: list[Any] = []
    made = relay(wire, None, sent)
    held = 0

    class Watched(list[str]):
        def append(self, piece: str) -> None:
            nonlocal held
            held += 1
            super().append(piece)

    made._text = Watched()
    await made._from_service()
    assert sent == [
        {"type": "websocket.send", "text": "ab"}, {"type": "websocket.close", "code": CloseReason.NORMAL_CLOSURE, "reason": ""},
    ]  # fmt: skip
    assert held == 1


@trio_test
async def test_an_answer_to_a_ping_does_not_get_into_a_message() -> None:
    wire, content = Wire(*(Connection(ConnectionType.SERVER).send(Ping(b"?")) for _ in range(5))), b"x" * 1000
    messages = [{"type": "websocket.receive", "bytes": content}, {"type": "websocket.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    await relay(wire, receive, []).run()
    service, got = Connection(ConnectionType.SERVER), b""
    service.receive_data(wire.told)
    for event in service.events():
        if isinstance(event, BytesMessage):
            got += event.data
    assert got == content
