"""A service's redirections, followed by the clients that people use: none leads out of what belongs to the service.

The clients run for real against a server that stands for the node; each says what it was asked for.
"""

from __future__ import annotations

import http.cookiejar
import http.cookies
import io
import json
import os
import random
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urljoin
from urllib.response import addinfourl

import httpx
import pytest
import requests
import urllib3
from worlds.patience import patience

from golem.base.hosts import is_this_machine, read_authority
from golem.rest.proxy_rules import Target, has_key, returned

HERE = b"/activity-api/v1/activity/1/proxy-http"
START = HERE + b"/8080/sub/page"
KEY = "Bearer 0123456789abcdef"
HTTPX = httpx.Client(follow_redirects=True, trust_env=False, timeout=patience(30))
SEED = int(os.environ.get("SIM_SEED", "19"))

KNOWN = [
    b"//127.0.0.1:00%d/payment-api/v1/x", b"//127.0.0.%%31:%d/x", b"//127.1:%d/x", b"//0x7f000001:%d/x", b"//2130706433:%d/x",
    b"//0177.0.0.1:%d/x", b"//[::ffff:127.0.0.1]:%d/x", b"//[::ffff:7f00:1]:%d/x", b"//[0:0:0:0:0:0:0:1]:%d/x", b"//0:%d/x",
    b"//0.0.0.0:%d/x", b"//localhost.:%d/x", b"//LOCALHOST:%d/x", b"//a@127.0.0.1:%d/x", b"//a:b@127.0.0.1:%d/x",
    b"///127.0.0.1:%d/x",
    b"http://example.com\\@127.0.0.1:%d/x", b"http://example.com#@127.0.0.1:%d/x", b"http://example.com?@127.0.0.1:%d/x",
    b"http:/127.0.0.1:%d/x", b"http:127.0.0.1:%d/x", b"http:\\\\127.0.0.1:%d/x", b"http:///127.0.0.1:%d/x",
    b"\\\\127.0.0.1:%d\\x",
    b"/\\127.0.0.1:%d/x", b"\x01//127.0.0.1:%d/x", b"ht\ttp://127.0.0.1:%d/x", b"/\t/127.0.0.1:%d/x", b"//127.0.0.1\t:%d/x",
    b"HTTPS://127.0.0.1:%d/x", b"ws://127.0.0.1:%d/x", b"//127.0.0.1:%d\\x", b"//127.0.0.1:%d\xa0/x",
    b"//\xe2\x91\xa027.0.0.1:%d/x",
    b"http://127.0.0.1:%d", b"//127.0.0.1 :%d/x", b"//sub.localhost:%d/x", b"//127.0.0.2:%d/x", b"//[::7f00:1]:%d/x",
    b"//[64:ff9b::7f00:1]:%d/x", b"//[2002:7f00:1::]:%d/x", b"//[::1%%25lo]:%d/x", b"http://x, http://127.0.0.1:%d/x",
    b"/..;/..;/..;/..;/..;/x%d", b"/%%2e%%2e\x01/%%2e%%2e\x01/../../../../x%d", b"/%%252e%%252e/../../../../../../x%d",
    b"/..%%2f..%%2f..%%2f..%%2f..%%2f../x%d", b"/..%%5c..%%5c../../../../../../x%d", b"..\\..\\..\\..\\..\\..\\x%d",
    b"/. ./..%%20/../../../../../../x%d",
    b"/a/b/\xef\xbc\x8e\xef\xbc\x8e/../../../../../../../x%d", b"?/../../../../../../x%d", b"#/../../x%d",
    b"http://[::1]:%d/../../../../../../x",
    b"javascript:alert(%d)", b"file:///etc/passwd?%d", b"data:,%d", b"blob:http://127.0.0.1:%d/x",
    b"view-source:http://127.0.0.1:%d/x",
    b"ftp://127.0.0.1:%d/x", b"gopher://127.0.0.1:%d/x", b"x:y%d", b"//%d", b"", b"   ", b"http:", b"http://", b"//", b"/",
    b"//@", b"//:80",
]  # fmt: skip
PIECES = [
    b"http:", b"https:", b"HTTP:", b"ws:", b"//", b"/", b"\\", b"@", b":", b"?", b"#", b";", b"%2e", b"%2E%2e", b"..", b".",
    b"%", b"%00",
    b"%2f", b"%5c", b" ", b"\t", b"\x01", b"\x0b", b"\x7f", b"\xa0", b"\xff", b"[", b"]", b"[::1]", b"localhost",
    b"127.0.0.1", b"127.1",
    b"0x7f.1", b"node.lan", b"example.com", b":%d", b":0%d", b":0000000%d", b"x", b"payment-api", b"&", b"'", b'"', b"<",
    b"|", b"^", b"{", b"~",
]  # fmt: skip


def locations(port: int) -> list[bytes]:
    """Return what a service may say: the known tricks, and random compositions of their pieces."""
    dice = random.Random(SEED)
    made = [b"".join(dice.choices(PIECES, k=dice.randint(1, 9))) for _ in range(400)]
    made += [b"//" + b"".join(dice.choices(PIECES, k=dice.randint(1, 5))) for _ in range(200)]
    known = [one % port if b"%d" in one else one for one in KNOWN]
    return known + [one.replace(b"%d", b"%d" % port) for one in made]


class Node(ThreadingHTTPServer):
    """Stands for the node: under `START` it answers with the redirection of a number, and it notes every other request."""

    daemon_threads = True
    given: list[bytes]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Node

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        start, _, number = self.path.partition("?n=")
        if start.encode() == START and number.isdigit() and int(number) < len(self.server.given):
            self.send_response(307)
            self.send_header("Location", self.server.given[int(number)].decode("latin-1"))
        else:
            self.server.asked.append(self.path)
            self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    server = Node()
    port = server.server_address[1]
    target = Target(HERE, b"8080/sub/page", b"", b"127.0.0.1:%d" % port)
    answers = [returned([(b"location", one)], target) for one in locations(port)]
    server.given = [dict(answer)[b"location"] for answer in answers if b"location" in dict(answer)]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def by_requests(url: str) -> None:
    with requests.Session() as session:
        session.trust_env = False
        session.post(url, data=b"x", headers={"Authorization": KEY}, timeout=patience(30))


def by_httpx(url: str) -> None:
    HTTPX.post(url, content=b"x", headers={"Authorization": KEY})


def by_curl(url: str) -> None:
    told = ["-L", "--max-time", "30", "-H", f"Authorization: {KEY}", "-d", "x", "-o", os.devnull]
    subprocess.run(["curl", "-q", "-sS", "--noproxy", "*", *told, url], check=True, timeout=patience(60))


NODE_FETCH = """
const urls = JSON.parse(require('fs').readFileSync(0));
(async () => { for (const url of urls) {
  const answer = await fetch(url, {method: 'POST', body: 'x', headers: {Authorization: process.argv[1]}});
  await answer.arrayBuffer();
} })().catch(error => { console.error(error); process.exit(1); });
"""
NODE_URL = """
const read = JSON.parse(require('fs').readFileSync(0));
console.log(JSON.stringify(read.map(one => new URL(one, process.argv[1]).host)));
"""


def starts(node: Node, wanted: Callable[[bytes], bool]) -> list[str]:
    """Return the addresses that answer with the redirections that are `wanted`."""
    host, port = node.server_address[:2]
    return [f"http://{host!s}:{port}{START.decode()}?n={number}" for number, one in enumerate(node.given) if wanted(one)]


def is_within(one: bytes) -> bool:
    return one.startswith(b"/") and not one.startswith(b"//")


@pytest.mark.parametrize("client", ["requests", "httpx", "curl", "node"])
def test_no_redirection_leads_a_client_with_the_key_elsewhere(node: Node, client: str) -> None:
    """Whatever a service says to a request that has the key: each client is followed to where it ends."""
    target = Target(HERE, b"8080/sub/page", b"", b"127.0.0.1:%d" % node.server_address[1])
    said = [b"http://example.com/x", b"//example.com/x", b"https://10.1.2.3:8/", *locations(node.server_address[1])]
    kept, node.given = node.given, []
    for one in said:
        found = dict(returned([(b"location", one)], target, keyed=True))
        if b"location" in found:
            node.given.append(found[b"location"])
        away = found.get(b"x-golem-location")
        assert away is None or not is_within(away)
    try:
        follow(node, client, starts(node, lambda _: True))
    finally:
        node.given = kept


def test_what_leads_away_is_told_beside() -> None:
    target = Target(HERE, b"8080", b"")
    for location in (b"http://example.com/x", b"//example.com/x", b"mailto:x"):
        given = [(b"location", location), (b"x-golem-location", b"http://evil"), (b"refresh", b"0; url=" + location)]
        assert returned(given, target, keyed=True)[1:] == [(b"x-golem-location", location)]
        assert dict(returned(given, target))[b"location"] == location
    given = [(b"location", b"/x"), (b"refresh", b"5")]
    assert returned(given, target, keyed=True)[1:] == [(b"location", HERE + b"/8080/x"), (b"refresh", b"5")]
    assert has_key([(b"Authorization", b"Bearer x")])
    assert not has_key([(b"authorization", b"Basic x"), (b"x", b"Bearer y")])


@pytest.mark.parametrize("client", ["requests", "httpx", "curl", "node"])
def test_clients_stay_with_the_service(node: Node, client: str) -> None:
    follow(node, client, starts(node, is_within))


def follow(node: Node, client: str, urls: list[str]) -> None:
    if client in ("curl", "node") and shutil.which(client) is None:
        pytest.skip(f"no {client} on this machine (Debian: apt-get install {'nodejs' if client == 'node' else client})")
    node.asked.clear()
    if client == "node":
        subprocess.run(["node", "-e", NODE_FETCH, KEY], input=json.dumps(urls).encode(), check=True, timeout=patience(100))
    else:
        by = {"requests": by_requests, "httpx": by_httpx, "curl": by_curl}[client]
        for url in urls if client != "curl" else urls[:150]:
            by(url)
    assert len(node.asked) >= 90, "redirections were followed"
    service = re.compile(re.escape(HERE.decode()) + r"/[1-9]\d{0,4}(/|\Z)")
    assert [path for path in node.asked if not service.match(path)] == []
    assert [path for path in node.asked if ".." in path.partition("?")[0].split("/")] == []


def test_what_leads_elsewhere_is_read_by_all_alike(node: Node) -> None:
    """Every other redirection names a machine that is neither this one nor the node, and all clients read the same name."""
    base = f"http://127.0.0.1:{node.server_address[1]}{START.decode()}"
    away = [one.decode("ascii") for one in node.given if not is_within(one) and not one.startswith((b"mailto:", b"ws"))]
    assert len(away) > 10
    told = [""] * len(away)
    if shutil.which("node"):
        line = ["node", "-e", NODE_URL, base]
        done = subprocess.run(line, input=json.dumps(away).encode(), stdout=-1, check=True, timeout=patience(60))
        told = json.loads(done.stdout)
    for one, of_node in zip(away, told, strict=True):
        full = urljoin(base, one)
        host = urllib3.util.parse_url(full).host or ""
        assert host == httpx.URL(base).join(one).host, one
        assert not of_node or of_node.partition(":")[0] == host, one
        assert not is_this_machine(host.encode()), one
    urls = starts(node, lambda one: not is_within(one) and not one.startswith((b"mailto:", b"ws")))
    if shutil.which("curl"):
        for one, url in list(zip(away, urls, strict=True))[:60]:
            line = ["curl", "-q", "-sS", "--noproxy", "*", "-o", os.devnull, "-w", "%{redirect_url}", url]
            read = subprocess.run(line, capture_output=True, check=True, timeout=patience(60)).stdout.decode()
            assert urllib3.util.parse_url(read).host == urllib3.util.parse_url(urljoin(base, one)).host


@pytest.mark.parametrize(("authority", "read"), [
    (b"a.b:80", (b"a.b", 80)), (b"A-1.example", (b"a-1.example", 80)), (b"10.0.0.1:65535", (b"10.0.0.1", 65535)),
    (b"[2001:db8::1]:8", (b"[2001:db8::1]", 8)), (b"a:080", None), (b"a:", None), (b"a:0", None), (b"a:65536", None),
    (b"", None),
    (b"1.2.3", None), (b"1.2.3.04", None), (b"a.1", None), (b"a.0x1", None), (b"a..b", None), (b"a.", None), (b"-a", None),
    (b"[2001:DB8::1]", (b"[2001:db8::1]", 80)), (b"[2001:0db8::1]", None), (b"[::1", None), (b"u@a", None), (b"a%41", None),
    (b"a b", None),
])  # fmt: skip
def test_canonical_authorities(authority: bytes, read: tuple[bytes, int] | None) -> None:
    assert read_authority(authority, b"http") == read


ODD = [
    "a=b", "a=b; Path=/", "a=b;\xa0Path=/", "a=b;\x85Domain=.lan", "a=b;\u2003Path=/", "a=b Path=/ c=d",
    "a=b; Expires=x Path=/ c=d", "a=b, c=d; Path=/", 'a="b; Path=/"; c=d', "a=b;\xa0Path=/x/..",
    "a=b; Max-Age=5 Path=/ d=e", "a=b; SameSite=Lax\tPath=/",
    "a=b;Version=1; Path=/", "a=b; $Path=/", "$Version=1; a=b; Path=/", "Path=/; a=b", "a=b; secure=x Path=/ c=d",
    "a=b; Path=/ c=d; e=f", "a=b; Path=/x Domain=.lan", "a=b\xa0; Path=/", "a=b; Comment=x Path=/ c=d; Path=/", "path=/; Path=/",
]  # fmt: skip
PARTS = [
    "a=b", "Path=/", "Domain=.lan", "Domain=127.0.0.1", ";", ";", " ", ",", '"', "=", "\xa0", "\x85", "\t", "Expires=",
    "Max-Age=5", "Wed, 09 Jun 2100 10:18:14 GMT", "c", "$", "\\", "\x1f", "SameSite=", "Version=1", "Secure",
]  # fmt: skip


def test_no_cookie_is_for_more_than_its_service() -> None:
    """As the libraries of Python's clients read it: requests, httpx and urllib by one, aiohttp by the other."""
    dice = random.Random(f"{SEED} cookies")
    given = ODD + ["a=b" + "".join(dice.choices(PARTS, k=dice.randint(1, 9))) for _ in range(2000)]
    target = Target(HERE, b"8080/sub/page", b"", b"127.0.0.1:7465")
    within, read = f"{HERE.decode()}/8080", 0
    for one in given:
        answer = dict(returned([(b"set-cookie", one.encode("latin-1", "replace"))], target))
        if (value := answer.get(b"set-cookie")) is None:
            continue
        text = value.decode("latin-1")
        message = Message()
        message["Set-Cookie"] = text
        request = urllib.request.Request(f"http://127.0.0.1:7465{START.decode()}")
        found = http.cookiejar.CookieJar().make_cookies(addinfourl(io.BytesIO(), message, request.full_url), request)
        for cookie in found:
            assert cookie.path == within or cookie.path.startswith(within + "/"), (one, text)
            assert not cookie.domain_specified, (one, text)
        for morsel in http.cookies.SimpleCookie(text).values():
            assert morsel["path"] == within or morsel["path"].startswith(within + "/") or not morsel["path"], (one, text)
            assert not morsel["domain"], (one, text)
        read += len(found)
    assert read > 100, f"SIM_SEED={SEED}"
