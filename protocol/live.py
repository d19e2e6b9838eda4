"""What is asked of a running exe-unit and answered at once: nothing of it is kept, and none of it is a message of a link.

The activity's requestor and the provider's node may ask; `Dial` is the provider's node's alone. Questions are MessagePack arrays
that begin with the question's name; fields go at the end, with defaults.

    ["usage"]                       -> UsageNow
    ["running"]                     -> the JSON text of the command that runs, or nil
    ["follow", batch, after, wait]  -> events of one batch with an id above `after`
    ["watch", after, wait]          -> events of all batches with a number above `after`
    ["dial", token]                 -> ["ok"], and the exe-unit opens a stream with the token, or ["error", code, text]
"""

from __future__ import annotations

import msgspec

from protocol.codec import MAX_FRAME_BYTES, Decoder

MAX_QUESTION_BYTES = 4096


class AskUsage(msgspec.Struct, frozen=True, array_like=True, tag="usage"):
    """What are the counters now?"""


class AskRunning(msgspec.Struct, frozen=True, array_like=True, tag="running"):
    """Which command runs?"""


class FollowBatch(msgspec.Struct, frozen=True, array_like=True, tag="follow"):
    """What has happened in a batch behind event `after` (-1: from the beginning)? `wait_s`: for something, in seconds."""

    batch_id: str
    after: int
    wait_s: float


class WatchAll(msgspec.Struct, frozen=True, array_like=True, tag="watch"):
    """What has happened in the activity behind event `after`? `wait_s` as with `FollowBatch`."""

    after: int
    wait_s: float


class Dial(msgspec.Struct, frozen=True, array_like=True, tag="dial"):
    """Open a stream to the node, and begin with this token: it counts once."""

    token: str


Question = AskUsage | AskRunning | FollowBatch | WatchAll | Dial


class UsageNow(msgspec.Struct, frozen=True, array_like=True):
    """Counters in the order of the agreement's usage vector; `at` in seconds since the epoch."""

    values: list[float]
    at: float


class LiveEvent(msgspec.Struct, frozen=True, array_like=True):
    """Something happened in a batch. `id` counts its events from 0, `index` is the command, `kind` is JSON."""

    id: int
    index: int
    at: float
    kind: str


class WatchedEvent(msgspec.Struct, frozen=True, array_like=True):
    """The same, as `number` counts in the whole activity."""

    number: int
    batch_id: str
    index: int
    at: float
    kind: str


class Dialling(msgspec.Struct, frozen=True, array_like=True, tag="ok"):
    """The exe-unit comes."""


class NotDialling(msgspec.Struct, frozen=True, array_like=True, tag="error"):
    """The exe-unit does not come; `code` is one of an interaction's faults, `text` for a person."""

    code: str
    text: str


Answer = UsageNow | str | list[LiveEvent] | list[WatchedEvent] | Dialling | NotDialling | None

decode_question = Decoder[Question](Question, MAX_QUESTION_BYTES)
decode_usage = Decoder[UsageNow](UsageNow, MAX_FRAME_BYTES)
decode_running = Decoder[str | None](str | None, MAX_FRAME_BYTES)
decode_followed = Decoder[list[LiveEvent]](list[LiveEvent], MAX_FRAME_BYTES)
decode_watched = Decoder[list[WatchedEvent]](list[WatchedEvent], MAX_FRAME_BYTES)
decode_dialled = Decoder[Dialling | NotDialling](Dialling | NotDialling, MAX_FRAME_BYTES)
