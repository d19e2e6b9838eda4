"""A pool of JSON-RPC endpoints of one network. Every failure is an `RpcError`.

`Pool` sends one call to the best endpoint: in the given order, those that failed lately or lag behind last, none whose
chain id is another one. What an endpoint refuses is asked of the others, and a transaction goes to all of them: none is
believed alone when it says no, and where two contradict each other `Pool.contradictions` names both.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import trio

from golem.base.plain_http import load_httpx, trust_for
from golem.chain.credentials import Fault, NoAnswer, fault_of
from golem.chain.networks import Network

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 10.0
ANSWER_LIMIT = 16 << 20  # bytes
BACKOFF_S = (0.5, 60.0)  # first and longest rest of an endpoint that failed
LAG_BLOCKS = 5
SURVEY_S = 30.0  # heads are compared this often when there are several endpoints
BUSY_CODES = (-32005, 429)  # rate limits: no answer to the question, and somebody else may have one
BUSY_WORDS = ("rate limit", "too many requests")
HAVE_IT = ("already known", "already imported", "known transaction")  # a refusal of a transaction which is none
RANGE_WORDS = ("range", "results", "logs", "block limit")  # a request that is too wide: the question's fault, not the hour's
SILENT_S = 120.0  # an endpoint that has not answered for so long is named
CONTRADICTION_S = 600.0  # so long two endpoints that contradicted each other are shown

Kind = Literal["down", "chain_id", "token", "answer"]


class RpcError(Exception):
    """A call had no result.

    `kind`: "down" (nobody answered), "chain_id" (wrong chain), "token" (wrong contracts), "answer" (the node said no).

    `refusals` are the words of each endpoint that said no.
    """

    def __init__(
        self, message: str, kind: Kind = "answer", code: int = 0, data: Any = None, refusals: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.kind, self.code, self.data = kind, code, data
        self.refusals = refusals or (message,)


class Endpoint:
    """One URL and what we know of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_right = False  # it has shown that it serves the network
        self.fault: Fault | None = None  # why it does not
        self.head = 0
        self.failures = 0
        self.rests_until = 0.0
        self.trouble = ""
        self.silent_since: float | None = None  # its first failure since it last answered
        self.silent_s = 0.0  # and how long after it the last one was
        self.genesis = ""  # as it said since it last failed
        self.log_span = 0  # blocks that it takes in one request for logs, where that is known to be few
        self.stranger = False  # it serves another chain of the same id: nothing is asked of it but whether it still does

    @property
    def host(self) -> str:
        return _host(self.url)

    def failed(self, trouble: str) -> None:
        first, longest = BACKOFF_S
        self.rests_until = trio.current_time() + min(first * 2**self.failures, longest)
        self.failures = min(self.failures + 1, 20)
        self.trouble, self.genesis = trouble, ""
        now = trio.current_time()
        self.silent_since = now if self.silent_since is None else self.silent_since
        self.silent_s = now - self.silent_since

    def worked(self) -> None:
        self.failures, self.rests_until, self.trouble = 0, 0.0, ""
        self.silent_since, self.silent_s = None, 0.0


class Answer(NamedTuple):
    """What one endpoint said: a result, or the error with which it (or the way to it) refused."""

    host: str
    result: Any
    error: RpcError | None


class Pool:
    """Calls with failover. Close with `aclose`."""

    def __init__(self, network: Network, *, timeout_s: float = TIMEOUT_S, transport: Any = None) -> None:
        if not network.rpc_urls:
            raise ValueError(f"network {network.name} has no RPC URL")
        self.network = network
        self.endpoints = [Endpoint(url) for url in network.rpc_urls]
        self._timeout_s, self._transport = timeout_s, transport
        self._http: httpx.AsyncClient | None = None
        self._ids = itertools.count(1)
        self._surveyed = -SURVEY_S
        self._surveying = trio.Lock()
        self._pin: ContextVar[Endpoint | None] = ContextVar("pin", default=None)
        self._contradictions: dict[str, tuple[float, str]] = {}  # by question: when, and both stories

    async def aclose(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def _client(self) -> httpx.AsyncClient:
        """Return the client, made when it is first needed: a node answers before it imports the library."""
        if self._http is None:
            await load_httpx()
        if self._http is None:  # still, after the wait
            import httpx

            urls = self.network.rpc_urls
            local = all("//127.0.0.1" in url or "//localhost" in url for url in urls) or self.network.dev_faucet
            headers = {"content-type": "application/json"}
            verify = trust_for(urls) if local else True  # else there may be a proxy that speaks TLS
            self._http = httpx.AsyncClient(
                timeout=self._timeout_s, transport=self._transport, headers=headers, trust_env=not local, verify=verify
            )
        return self._http

    def repoint(self, urls: tuple[str, ...]) -> bool:
        """Use other URLs from now on (the dev chain came up on another port). The same ones change nothing: False."""
        if urls == tuple(endpoint.url for endpoint in self.endpoints):
            return False
        self.endpoints = [Endpoint(url) for url in urls]
        return True

    async def call(self, method: str, params: list[Any] | tuple[Any, ...] = ()) -> Any:
        """The result of one JSON-RPC call. RpcError otherwise."""
        if len(self.endpoints) > 1:
            await self._survey()
        answers: list[Answer] = []
        for endpoint in self._ranked():
            answers.append(await self._ask(endpoint, method, params))
            if answers[-1].error is None:
                self._compare(method, answers)
                return answers[-1].result
        raise self._no_result(answers)

    async def call_all(self, method: str, params: list[Any] | tuple[Any, ...] = ()) -> list[Answer]:
        """What each endpoint says to one call, at once; those that rest are left out unless all do."""
        now = trio.current_time()
        ranked = self._ranked()
        asked = [endpoint for endpoint in ranked if endpoint.rests_until <= now] or ranked
        answers: dict[int, Answer] = {}

        async def ask(index: int, endpoint: Endpoint) -> None:
            answers[index] = await self._ask(endpoint, method, params)

        async with trio.open_nursery() as nursery:
            for index, endpoint in enumerate(asked):
                nursery.start_soon(ask, index, endpoint)
        return [answers[index] for index in sorted(answers)]

    async def send(self, raw: bytes) -> str:
        """Give a transaction to every endpoint; its hash once one has it. RpcError when none does.

        All of them, since one may take it and never pass it on.
        """
        answers = [_taken(answer) for answer in await self.call_all("eth_sendRawTransaction", ["0x" + raw.hex()])]
        self._compare("eth_sendRawTransaction", answers)
        for answer in answers:
            if answer.error is None:
                return str(answer.result)
        raise self._no_result(answers)

    def contradictions(self) -> list[str]:
        """Where endpoints contradicted each other lately, naming both."""
        now = trio.current_time()
        return [words for at, words in self._contradictions.values() if now - at < CONTRADICTION_S]

    def note(self, question: str, words: str | None) -> None:
        """Remember that two endpoints tell different stories about `question`; None: they agree (again)."""
        if words is None:
            self._contradictions.pop(question, None)
        else:
            self._contradictions[question] = (trio.current_time(), words)

    def _compare(self, method: str, answers: list[Answer]) -> None:
        """Note whether an endpoint took what another refused."""
        refused = [answer for answer in answers if answer.error is not None and answer.error.kind == "answer"]
        taken = [answer for answer in answers if answer.error is None]
        if refused and taken:
            said = "; ".join(f"{answer.host} refuses {method}: {answer.error}" for answer in refused)
            self.note(method, f"{said}; {', '.join(answer.host for answer in taken)} took it")
        elif len(taken) > 1 or (taken and len(self.endpoints) == 1):
            self.note(method, None)

    def _no_result(self, answers: list[Answer]) -> RpcError:
        """The error that stands for those of all endpoints: what was answered counts before silence."""
        errors = [(answer.host, answer.error) for answer in answers if answer.error is not None]
        refused = [(host, error) for host, error in errors if error.kind == "answer"]
        if not refused:
            kind: Kind = next((error.kind for _, error in errors if error.kind != "down"), "down")
            return RpcError(f"{self.network.name}: " + "; ".join(str(error) for _, error in errors)[:500], kind)
        words = tuple(str(error) for _, error in refused)
        text = words[0] if len(set(words)) == 1 else "; ".join(f"{host}: {error}" for host, error in refused)[:500]
        first = refused[0][1]
        return RpcError(text, "answer", first.code, first.data, words)

    async def _ask(self, endpoint: Endpoint, method: str, params: Any) -> Answer:
        host = endpoint.host
        try:
            await self._check_chain(endpoint)
            answer = await self._post(endpoint, method, params)
        except RpcError as error:
            return Answer(host, None, error)
        endpoint.worked()
        if (error_object := answer.get("error")) is None:
            return Answer(host, answer.get("result"), None)
        code, message, data = _error_parts(error_object)
        busy = code in BUSY_CODES and not any(words in message.lower() for words in RANGE_WORDS)
        if busy or any(words in message.lower() for words in BUSY_WORDS):
            endpoint.failed(message)
            return Answer(host, None, RpcError(f"{host}: {message}", "down"))
        return Answer(host, None, RpcError(message, "answer", code, data))

    @contextmanager
    def pinned(self, endpoint: Endpoint | None = None) -> Iterator[None]:
        """Inside, the calls of this task all go to one endpoint, today's best unless one is given, and fail with it.

        For conclusions from several answers: two nodes may stand at different heads.
        """
        before = self._pin.set(endpoint or self._ranked()[0])
        try:
            yield
        finally:
            self._pin.reset(before)

    def _ranked(self) -> list[Endpoint]:
        if (pin := self._pin.get()) is not None:
            return [pin]
        now, best = trio.current_time(), max(endpoint.head for endpoint in self.endpoints)
        return sorted(
            (each for each in self.endpoints if not each.stranger),
            key=lambda each: (each.rests_until > now, bool(each.head) and each.head < best - LAG_BLOCKS),
        )

    async def _check_chain(self, endpoint: Endpoint) -> None:
        """Whoever does not serve this network is not used; asked once, and again while it is so."""
        if endpoint.is_right:
            return

        async def ask(method: str, params: list[Any]) -> dict[str, Any]:
            return await self._post(endpoint, method, params)

        try:
            endpoint.fault = await fault_of(self.network, ask)
        except NoAnswer as unclear:
            endpoint.failed(f"{endpoint.host}: {unclear}")
            raise RpcError(endpoint.trouble, "down") from None
        if endpoint.fault is not None:
            endpoint.failed(f"{endpoint.host} {endpoint.fault.words}")
            raise RpcError(endpoint.trouble, endpoint.fault.kind)
        endpoint.is_right = True

    def faults(self) -> list[Fault]:
        """Which endpoints do not serve this network, and why."""
        found = [(endpoint.host, endpoint.fault) for endpoint in self.endpoints if endpoint.fault is not None]
        return [Fault(fault.kind, f"{host} {fault.words}") for host, fault in found]

    def troubled(self) -> bool:
        """Has one not answered when it was last asked?"""
        return any(endpoint.silent_since is not None for endpoint in self.endpoints)

    def silent(self) -> list[tuple[str, str]]:
        """Endpoints that do not answer, since the start or for minutes: words, and what was the matter last."""
        found = []
        for endpoint in self.endpoints:
            if endpoint.silent_since is None or endpoint.fault is not None:
                continue
            if endpoint.silent_s >= SILENT_S:
                found.append((f"{endpoint.host} has not answered for {endpoint.silent_s / 60:.0f} minutes", endpoint.trouble))
            elif not endpoint.is_right:
                found.append((f"{endpoint.host} has not answered since this node started", endpoint.trouble))
        return found

    async def check(self) -> bool:
        """Look at every endpoint; False while one has not answered or does not serve this network."""
        async with trio.open_nursery() as nursery:
            for endpoint in self.endpoints:
                nursery.start_soon(self._look, endpoint)
        return all(endpoint.is_right for endpoint in self.endpoints)

    async def _survey(self) -> None:
        """Ask every endpoint for its head, so that one that fell behind comes last."""
        if self._surveying.locked() or trio.current_time() - self._surveyed < SURVEY_S:
            return
        async with self._surveying, trio.open_nursery() as nursery:
            self._surveyed = trio.current_time()
            for endpoint in self.endpoints:
                nursery.start_soon(self._look, endpoint)

    async def _look(self, endpoint: Endpoint) -> None:
        try:
            await self._check_chain(endpoint)
            answer = await self._post(endpoint, "eth_blockNumber", ())
            endpoint.head = _quantity(answer.get("result"), endpoint)
            endpoint.worked()
        except RpcError:
            endpoint.head = 0  # unknown; its rest ranks it last already

    async def _post(self, endpoint: Endpoint, method: str, params: Any) -> dict[str, Any]:
        body = {"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": list(params)}
        received = bytearray()
        client = await self._client()
        import httpx

        try:
            async with client.stream("POST", endpoint.url, json=body) as response:
                async for chunk in response.aiter_bytes():
                    received += chunk
                    if len(received) > ANSWER_LIMIT:
                        raise ValueError("answer too large")
                if response.status_code >= 400 and not received.startswith(b"{"):
                    raise ValueError(f"HTTP status {response.status_code}")
            answer = json.loads(received)
            if not isinstance(answer, dict) or not ("result" in answer or "error" in answer):
                raise ValueError("not a JSON-RPC answer")
        except (httpx.HTTPError, ValueError, OSError) as error:
            trouble = f"{endpoint.host}: {type(error).__name__} {str(error)[:120]}".rstrip()
            endpoint.failed(trouble)
            raise RpcError(trouble, "down") from error
        return answer


def _taken(answer: Answer) -> Answer:
    """An endpoint's answer to a transaction: one that it has already is taken, and what it calls a hash has to be one."""
    if answer.error is not None and any(words in str(answer.error).lower() for words in HAVE_IT):
        return Answer(answer.host, "", None)
    if answer.error is None and not (isinstance(answer.result, str) and answer.result.startswith("0x")):
        return Answer(answer.host, None, RpcError(f"{answer.host} answered a transaction with no hash", "down"))
    return answer


def _quantity(value: Any, endpoint: Endpoint) -> int:
    try:
        return int(value, 16)
    except (TypeError, ValueError):
        trouble = f"{endpoint.host}: a quantity was expected"
        endpoint.failed(trouble)
        raise RpcError(trouble, "down") from None


def _error_parts(error: Any) -> tuple[int, str, Any]:
    if not isinstance(error, dict):
        return 0, str(error)[:500], None
    code = error.get("code")
    return code if isinstance(code, int) else 0, str(error.get("message", "error"))[:500], error.get("data")


def _host(url: str) -> str:
    """Host and port only: paths of RPC URLs carry access keys."""
    return urlsplit(url).netloc.rpartition("@")[2].lower()
