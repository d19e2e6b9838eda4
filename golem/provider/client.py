"""The node's REST API as the provider agent uses it: bounded answers, typed failures, retries with back-off."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import trio

log = logging.getLogger("golem.provider")

MAX_ANSWER_BYTES = 16 * 1024 * 1024
REQUEST_S = 15.0
POLL_S = 20.0  # the node holds a poll that long
POLL_MARGIN_S = 10.0
FIRST_PAUSE_S, PAUSE_FACTOR, LAST_PAUSE_S = 0.25, 1.5, 30.0
PASSING = (408, 425, 429)  # besides 5xx: worth another try
MARKET, ACTIVITY, PAYMENT = "/market-api/v1", "/activity-api/v1", "/payment-api/v1"
T = TypeVar("T")


class NodeError(Exception):
    """The node cannot be used; the text says why."""


class NodeAway(NodeError):
    """The node does not answer (now)."""


class NodeApiError(NodeError):
    """The node says no."""

    def __init__(self, status: int, message: str, highest_amount: str = "") -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message
        self.highest_amount = highest_amount  # of a document that the payer refused: what it would take

    @property
    def passing(self) -> bool:
        """Return whether the same call may succeed later."""
        return self.status >= 500 or self.status in PASSING


class NodeClient:
    """Calls to one node. `url` is asked again whenever the node does not answer: it may be back on another port."""

    def __init__(self, url: Callable[[], str], app_key: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._find_url = url
        self._url = ""
        limits = httpx.Limits(max_connections=512, max_keepalive_connections=64, keepalive_expiry=60)
        headers = {"Authorization": f"Bearer {app_key}", "Accept": "application/json"}
        self._http = httpx.AsyncClient(headers=headers, limits=limits, trust_env=False, transport=transport)

    async def __aenter__(self) -> NodeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        with trio.move_on_after(2, shield=True):
            await self._http.aclose()

    async def call(
        self, method: str, path: str, *, params: Mapping[str, Any] | None = None, body: Any = ..., timeout_s: float = REQUEST_S
    ) -> Any:
        """Return the JSON of an answer (None for an empty one). Raises `NodeApiError`, `NodeAway`.

        `body` is sent as JSON (`None` as `null`); without it there is none.
        """
        self._url = self._url or self._find_url()
        content = None if body is ... else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            request = self._http.stream(
                method, self._url + path, params=params, content=content, headers=headers, timeout=timeout_s
            )
            async with request as response:
                data = await _read(response)
                if response.status_code == 401:  # not our node, perhaps: find it anew
                    self._url = ""
                return _answer(response.status_code, data)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            url, self._url = self._url, ""
            raise NodeAway(f"no answer from {url}: {type(error).__name__} {error}".strip()) from None

    async def poll(self, path: str, params: Mapping[str, Any]) -> list[Any]:
        """Return the events of a long poll, which may be none. Raises `NodeApiError`, `NodeAway`."""
        try:
            found = await self.call("GET", path, params={"timeout": POLL_S, **params}, timeout_s=POLL_S + POLL_MARGIN_S)
        except NodeApiError as error:
            if error.status == 408:
                return []
            raise
        return found if isinstance(found, list) else []

    async def persist(
        self,
        what: str,
        call: Callable[[], Awaitable[T]],
        *,
        first_s: float = FIRST_PAUSE_S,
        last_s: float = LAST_PAUSE_S,
        until: float | None = None,
        now: Callable[[], float] = trio.current_time,
    ) -> T:
        """Repeat `call` with growing pauses while the node is away or its no is a passing one.

        `until` (by the clock `now`) ends the patience: the last error is raised.
        """
        pause_s, tries = first_s, 0
        while True:
            try:
                return await call()
            except (NodeAway, NodeApiError) as error:
                if (isinstance(error, NodeApiError) and not error.passing) or (until is not None and now() >= until):
                    raise
                tries += 1
                if tries in (3, 30, 300):
                    log.warning("%s: %s (trying on)", what, error)
            await trio.sleep(pause_s if until is None else min(pause_s, max(0.05, until - now())))
            pause_s = min(pause_s * PAUSE_FACTOR, last_s)


async def _read(response: httpx.Response) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise NodeApiError(response.status_code, f"an answer of more than {MAX_ANSWER_BYTES} bytes")
    return bytes(data)


def _answer(status: int, data: bytes) -> Any:
    if 200 <= status < 300:
        try:
            return json.loads(data) if data.strip() else None
        except (ValueError, RecursionError):
            raise NodeApiError(status, "an answer that is not JSON") from None
    highest = ""
    try:
        found = json.loads(data)
        text = found["message"]
        highest = str(found.get("highestAmount") or "")[:100]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = data.decode("utf-8", "replace")
    raise NodeApiError(status, str(text)[:500], highest)


def part(text: str) -> str:
    """Return an id as a part of a path."""
    return quote(text, safe="")
