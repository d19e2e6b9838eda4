"""What every REST module uses: the caller, parsing with clear errors, asking actors, long-polls, answers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import trio
from quart import Response, after_this_request, g, request
from quart.typing import ResponseTypes
from werkzeug.exceptions import RequestEntityTooLarge

from actors.kernel.machine import ActorFailed, AskTimeout, Busy
from protocol import strict_json
from protocol.types import Message, Refused, Violation, timestamp

if TYPE_CHECKING:
    from golem.node.node import Node

BODY_LIMIT = 4 * 1024 * 1024
MAX_TIMEOUT_S = 3600.0
DAMAGED = "X-Damaged-Rows"  # left out of a list, since they cannot be read (`golem status` says why)
MAX_NAMED, MAX_NAMED_CHARS = 20, 2000
T = TypeVar("T")
logger = logging.getLogger(__name__)

REFUSAL_STATUS = {
    "bad_request": 400,
    "unknown": 404,
    "forbidden": 403,
    "conflict": 409,
    "gone": 410,
    "unfunded": 400,
    "unreachable": 500,
    "busy": 503,
}


class ApiError(Exception):
    """An answer other than success: status, the text for people, further members of the body."""

    def __init__(self, status: int, message: str | None, extra: Mapping[str, Any] | None = None,
                 content_type: str = "application/json") -> None:  # fmt: skip
        super().__init__(message or "")
        self.status, self.message, self.content_type = status, message, content_type
        self.extra = dict(extra or {})

    def response(self) -> Response:
        body = json.dumps({"message": self.message, **self.extra})
        return Response(body, status=self.status, content_type=self.content_type)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the identity behind the app-key."""

    identity: str
    name: str
    role: str
    allow_origins: tuple[str, ...] = field(default=())


def listed(node: Node, actor: str, prefix: str, form: Callable[[Any], Any] = lambda row: row) -> list[Any]:
    """Return the forms of an actor's rows for a list; what cannot be read is left out, and the answer names it in a header.

    A row whose content `form` cannot show (`Violation`, `ValueError`) is damaged as well: one bad row never fails a list.
    """
    rows, damaged = node.system.listed(actor, prefix)
    found = []
    for key, row in rows:
        try:
            found.append(form(row))
        except (Violation, ValueError, LookupError) as error:
            logger.warning("%s/%s cannot be shown: %s", actor, key, error)
            damaged.append(key)
    if damaged:
        names = ", ".join(f"{actor}/{key}" for key in damaged[:MAX_NAMED])[:MAX_NAMED_CHARS]

        @after_this_request
        async def name_them(response: ResponseTypes) -> ResponseTypes:
            if isinstance(response, Response):
                response.headers.add(DAMAGED, quote(names, safe="/, :-._~"))
            return response

    return found


def caller() -> Caller:
    """Return who sends the request at hand."""
    found: Caller = g.caller
    return found


# -- parsing
async def json_body(default: Any = ..., *, exact: bool = False) -> Any:
    """Return the request's JSON body, with `exact` fractions as `Decimal`; `default` (if given) for an empty one.

    Raises `ApiError` 400 or 413.
    """
    try:
        raw = await request.get_data()
    except RequestEntityTooLarge:
        raise ApiError(413, f"the body is larger than {BODY_LIMIT} bytes") from None
    if not raw.strip():
        if default is ...:
            raise ApiError(400, "expected a JSON body, got none")
        return default
    try:
        return strict_json.loads(raw, exact=exact)
    except ValueError as error:
        raise ApiError(400, f"malformed JSON body: {str(error)[:300]}") from None


async def object_body(default: Any = ..., *, exact: bool = False) -> dict[str, Any]:
    """Return the request's JSON object, as `json_body`. Raises `ApiError` 400 or 413."""
    value = await json_body(default, exact=exact)
    if not isinstance(value, dict):
        raise ApiError(400, "expected a JSON object")
    return value


def member(body: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
    """Return member `name` of a body, of JSON type `kind`; null counts as missing. Raises `ApiError` 400."""
    value = body.get(name)
    if value is None:
        if default is ...:
            raise ApiError(400, f"missing field `{name}`")
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise ApiError(400, f"field `{name}`: expected {' or '.join(_JSON_NAMES.get(k, k.__name__) for k in kinds)}")
    return value


_JSON_NAMES = {str: "a text", dict: "an object", list: "an array", int: "an integer", float: "a number", bool: "a boolean"}


def query_text(name: str, default: str | None = None, limit: int = 1024) -> str | None:
    """Return a text of the query. Raises `ApiError` 400 when it is too long."""
    value = request.args.get(name)
    if value is not None and len(value) > limit:
        raise ApiError(400, f"query parameter {name} is longer than {limit} characters")
    return default if value is None else value


def query_float(name: str, default: float, low: float = 0.0, high: float = MAX_TIMEOUT_S) -> float:
    """Return a number of the query, clamped to `high`. Raises `ApiError` 400."""
    text = query_text(name)
    if text is None or text == "":
        return default
    try:
        value = float(text)
    except ValueError:
        raise ApiError(400, f"query parameter {name}={text[:40]!r}: expected a number") from None
    if math.isnan(value) or value < low:
        raise ApiError(400, f"query parameter {name}={text[:40]!r}: expected at least {low:g}")
    return min(value, high)


def query_int(name: str, default: int, low: int, high: int) -> int:
    """Return an integer of the query between `low` and `high`. Raises `ApiError` 400."""
    text = query_text(name)
    if text is None or text == "":
        return default
    try:
        value = int(text)
    except ValueError:
        raise ApiError(400, f"query parameter {name}={text[:40]!r}: expected an integer") from None
    if not low <= value <= high:
        raise ApiError(400, f"Invalid {name} '{value}', should be between {low} and {high}.")
    return value


def query_time(name: str) -> float | None:
    """Return a time of the query in seconds since the epoch. Raises `ApiError` 400."""
    text = query_text(name)
    if not text:
        return None
    try:
        return timestamp(text.replace(" ", "+"))  # an unescaped + of an offset arrives as a space
    except (ValueError, OverflowError) as error:
        raise ApiError(400, f"query parameter {name}: {error}") from None


# -- asking
def refusal(refused: Refused, statuses: Mapping[str, int] | None = None) -> ApiError:
    """Return the error that says what a machine refused."""
    status = (statuses or {}).get(refused.code) or REFUSAL_STATUS.get(refused.code, 500)
    return ApiError(status, refused.message)


async def ask(
    node: Node, actor: str, message: Message, timeout_s: float = 10.0, statuses: Mapping[str, int] | None = None
) -> Any:
    """Return the reply of an actor. Raises `ApiError` for everything that is not one."""
    try:
        reply = await node.system.ask(actor, message, timeout_s, trace=g.trace)
    except Busy as error:
        raise ApiError(503, f"busy, try again later: {error}") from None
    except Violation as error:
        raise ApiError(400, str(error)) from None
    except (AskTimeout, ActorFailed) as error:
        raise ApiError(500, str(error)) from None
    if isinstance(reply, Refused):
        raise refusal(reply, statuses)
    return reply


async def until(node: Node, feeds: Sequence[str], probe: Callable[[], T | None], timeout_s: float) -> T | None:
    """Return what `probe` finds, now or after news on one of `feeds`; `None` at the deadline."""
    with trio.move_on_after(max(timeout_s, 0.0)):
        while True:
            news = node.system.feeds.watch(*feeds)
            try:
                if (found := probe()) is not None or node.system.feeds.closed:
                    return found
                await news.wait()
            finally:
                node.system.feeds.unwatch(news, *feeds)
    return probe()


# -- answers
def respond_json(value: Any, status: int = 200) -> Response:
    """Return `value` as JSON."""
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Response(body, status=status, content_type="application/json")


def created(value: Any) -> Response:
    """201 with JSON."""
    return respond_json(value, 201)


def null() -> Response:
    """200 with the literal `null`, the body of every successful payment action."""
    return respond_json(None)


def no_content() -> Response:
    """204: JavaScript clients try to parse a JSON content type without a body, so there is none."""
    response = Response(b"", status=204)
    response.headers.pop("Content-Type", None)
    return response


def empty() -> Response:
    """200 without body and content type."""
    response = Response(b"", status=200)
    response.headers.pop("Content-Type", None)
    return response
