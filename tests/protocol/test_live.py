"""Live questions are the arrays they have always been, and what is none of them is refused."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from protocol.codec import encode
from protocol.live import (
    AskRunning,
    AskUsage,
    Dial,
    Dialling,
    FollowBatch,
    LiveEvent,
    NotDialling,
    Question,
    UsageNow,
    WatchAll,
    WatchedEvent,
    decode_dialled,
    decode_followed,
    decode_question,
    decode_usage,
    decode_watched,
)
from protocol.types import Violation

QUESTIONS: list[tuple[Question, list[Any]]] = [
    (AskUsage(), ["usage"]),
    (AskRunning(), ["running"]),
    (FollowBatch("b", -1, 7.5), ["follow", "b", -1, 7.5]),
    (WatchAll(3, 20.0), ["watch", 3, 20.0]),
    (Dial("t"), ["dial", "t"]),
]


@pytest.mark.parametrize(("question", "array"), QUESTIONS)
def test_questions_are_arrays(question: Question, array: list[Any]) -> None:
    assert msgpack.unpackb(encode(question)) == array
    assert decode_question(msgpack.packb(array)) == question


def test_a_whole_number_of_seconds_will_do() -> None:
    assert decode_question(msgpack.packb(["follow", "b", 0, 1])) == FollowBatch("b", 0, 1.0)


@pytest.mark.parametrize("array", [
    [], ["password"], ["follow", "b"], ["follow", 1, 2, 3], ["watch", "a", 1.0], ["dial", None], "usage", {"usage": 1},
    ["follow", "b" * 5000, 0, 0.0],
])  # fmt: skip
def test_what_is_no_question(array: Any) -> None:
    with pytest.raises(Violation):
        decode_question(msgpack.packb(array))


def test_answers_are_arrays() -> None:
    assert decode_usage(msgpack.packb([[1.0, 2.0], 3.0])) == UsageNow([1.0, 2.0], 3.0)
    assert decode_followed(msgpack.packb([[0, 1, 2.0, "{}"]])) == [LiveEvent(0, 1, 2.0, "{}")]
    assert decode_watched(msgpack.packb([[0, "b", 1, 2.0, "{}"]])) == [WatchedEvent(0, "b", 1, 2.0, "{}")]
    assert msgpack.unpackb(encode(Dialling())) == ["ok"]
    assert decode_dialled(msgpack.packb(["error", "busy", "later"])) == NotDialling("busy", "later")
    with pytest.raises(Violation):
        decode_usage(msgpack.packb(["usage"]))
