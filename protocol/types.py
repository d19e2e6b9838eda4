"""The words all other protocol modules are made of: ids, amounts, times, the message base and the envelope.

Amounts travel as decimal strings, never as numbers: MessagePack integers stop at 2**64-1, which is 18.4 GLM in wei.
Times are float seconds since the Unix epoch, rounded to whole microseconds, so that text and number name the same instant.
Messages are arrays on the wire (tag first), so there are no keys to repeat; new fields go last and have defaults.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from decimal import Context, Decimal, Inexact, InvalidOperation

import msgspec

WEI_DIGITS = 18
MAX_AMOUNT_DIGITS = 40
MAX_CLOCK_SKEW_S = 300.0  # how far the clocks of two nodes may be apart; discovery and agreements tolerate the same
END_OF_TIME_S = 253402300800.0  # the year 10000, which no date can say
_EXACT = Context(prec=120, traps=[Inexact, InvalidOperation])
_NODE_ID = re.compile(r"0x[0-9a-f]{40}\Z")
_ROUGH = Context(prec=120, traps=[InvalidOperation])
_WEI = Decimal(1).scaleb(-WEI_DIGITS)
_AMOUNT = re.compile(r"\+?(\d{1,40})(?:\.(\d{0,80}))?(?:[eE]([+-]?\d{1,2}))?\Z", re.ASCII)
_DATE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:([Zz])|([+-])(\d\d):?(\d\d))\Z",
    re.ASCII,
)


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages and rows: immutable, tagged with the class name, an array on the wire."""


class Violation(Exception):
    """The other side broke the protocol: its fault, so the message is dropped and said so, never retried."""


class Done(Message, frozen=True):
    """The command is carried out (or was before), and committed."""


class Refused(Message, frozen=True):
    """An expected no. `code` is one of the words of `REFUSALS`; `message` is for a person."""

    code: str
    message: str


#: Codes of `Refused`, and what they mean to a caller.
REFUSALS = (
    "bad_request",  # the request cannot be right, whatever the state
    "unknown",  # no such object (or none that the caller may see)
    "forbidden",  # the object is somebody else's
    "conflict",  # the state of the object does not allow it
    "gone",  # it was there and is over
    "unfunded",  # not enough money set aside
    "unreachable",  # the peer or the exe-unit cannot be reached
    "busy",  # over quota; try again later
)


class Undelivered(Message, frozen=True):
    """To the sender of a message that nobody acknowledged before its deadline. It may or may not have arrived."""

    to: str
    body: bytes  # the encoded message
    reason: str = "no acknowledgement before the deadline"


class PeerLost(Message, frozen=True):
    """To the sender of a link whose two sides no longer remember the same: one of the disks went back in time.

    Messages `first` to `last` of the link are the ones that one side does not know any more: the recipient, or, where
    `here` is true, the sender itself. Whatever else waits is sent as if nothing had happened; what was done with the
    peer since is to be gone through again.
    """

    to: str
    first: int
    last: int
    here: bool = False


def node_id(text: str) -> str:
    """Return `text` as a node id (0x + 40 lower-case hex). Raises `ValueError`."""
    lowered = text.lower()
    if not _NODE_ID.match(lowered):
        raise ValueError(f"not a node id (0x and 40 hex digits): {text[:64]!r}")
    return lowered


def address(node: str, actor: str) -> str:
    """Return the address of an actor on a node: `0x…/market`."""
    return f"{node}/{actor}"


def node_of(actor_address: str) -> str:
    """Return the node part of an actor's address."""
    return actor_address.partition("/")[0]


def actor_of(actor_address: str) -> str:
    """Return the actor part of an actor's address."""
    return actor_address.partition("/")[2]


def amount(value: str | int | float | Decimal, rounding: str = "") -> Decimal:
    """Return an exact, non-negative GLM amount with at most 18 decimal places. Raises `ValueError`.

    `rounding`: what becomes of one that is finer than a wei (`ROUND_CEILING` and the like of `decimal`); "": refused.
    """
    text = str(value).strip()
    match = _AMOUNT.match(text)
    if not match:
        raise ValueError(f"not an amount: {text[:64]!r}")
    try:
        number = Decimal(text)
    except InvalidOperation as error:  # pragma: no cover - the pattern allows nothing that Decimal refuses
        raise ValueError(f"not an amount: {text[:64]!r}") from error
    if number.adjusted() >= MAX_AMOUNT_DIGITS:
        raise ValueError(f"amount too large: {text[:64]!r}")
    exponent = number.normalize(_EXACT).as_tuple().exponent
    if isinstance(exponent, int) and exponent < -WEI_DIGITS:
        if rounding:
            return number.quantize(_WEI, rounding, context=_ROUGH)
        raise ValueError(f"amount has more than {WEI_DIGITS} decimal places: {text[:64]!r}")
    return number


def amount_text(value: Decimal) -> str:
    """Return the plain decimal text of an amount, without exponent or trailing zeros (`0.00025`)."""
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def to_wei(value: Decimal) -> int:
    """Return an amount in wei (10**-18)."""
    return int(value.scaleb(WEI_DIGITS, context=_EXACT).to_integral_exact(context=_EXACT))


def from_wei(wei: int) -> Decimal:
    """Return wei as an amount."""
    return Decimal(wei).scaleb(-WEI_DIGITS, context=_EXACT)


def timestamp(text: str) -> float:
    """Parse RFC 3339 with a zone and 0 to 9 fraction digits; digits past the microsecond are cut.

    Raises `ValueError`, also for what lies outside 1970 to 9999 in UTC: `timestamp_text` can write all that this reads.
    """
    match = _DATE.match(text.strip())
    if not match:
        raise ValueError(f"not an RFC 3339 time with a zone: {text[:64]!r}")
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    fraction, _, sign, off_hour, off_minute = match.groups()[6:]
    if second > 60 or int(off_hour or 0) > 23 or int(off_minute or 0) > 59:
        raise ValueError(f"no such time: {text[:64]!r}")
    micros = int((fraction or "").ljust(6, "0")[:6])
    seconds = datetime(year, month, day, hour, minute, min(second, 59), tzinfo=UTC).timestamp() + (second == 60)
    if sign:
        offset = int(off_hour) * 3600 + int(off_minute) * 60
        seconds += -offset if sign == "+" else offset
    moment = round(seconds + micros / 1_000_000, 6)
    if not 0 <= moment < END_OF_TIME_S:
        raise ValueError(f"a time outside the years 1970 to 9999 (UTC): {text[:64]!r}")
    return moment


def timestamp_text(seconds: float) -> str:
    """Return seconds since the epoch as RFC 3339 UTC with six fraction digits and `Z`."""
    whole, micros = divmod(round(seconds * 1_000_000), 1_000_000)
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%dT%H:%M:%S}.{micros:06d}Z"


def digest(*parts: str | bytes) -> str:
    """Return 64 hex digits that name `parts` in this order (sha3-256 over length-prefixed parts)."""
    sha = hashlib.sha3_256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        sha.update(len(raw).to_bytes(8, "big"))
        sha.update(raw)
    return sha.hexdigest()
