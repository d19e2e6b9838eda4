"""Amounts and times: exact, there and back; ids and digests."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.types import (
    actor_of,
    address,
    amount,
    amount_text,
    digest,
    from_wei,
    node_id,
    node_of,
    timestamp,
    timestamp_text,
    to_wei,
)

exact = settings(max_examples=300, deadline=None, derandomize=True)


@exact
@given(st.integers(0, 10**40))
def test_wei_there_and_back(wei: int) -> None:
    assert to_wei(from_wei(wei)) == wei
    assert to_wei(amount(amount_text(from_wei(wei)))) == wei if wei < 10**40 else True


@exact
@given(st.integers(0, 10**22 - 1), st.integers(0, 18))
def test_amount_text_there_and_back(digits: int, places: int) -> None:
    value = Decimal(digits).scaleb(-places)
    text = amount_text(value)
    assert amount(text) == value
    assert "e" not in text.lower()
    assert text == "0" or not text.startswith("00")
    assert "." not in text or text[-1] not in "0."


@pytest.mark.parametrize(
    ("text", "wei"),
    [("0", 0), ("1", 10**18), ("0.00025", 25 * 10**13), ("1e-18", 1), ("2.5E-4", 25 * 10**13), ("+3", 3 * 10**18), ("1.", 10**18),
     ("0.100000000000000000000", 10**17), ("18.446744073709551616", 2**64), ("1e18", 10**36)],
)  # fmt: skip
def test_amounts(text: str, wei: int) -> None:
    assert to_wei(amount(text)) == wei


@pytest.mark.parametrize(
    "text",
    ["", "-1", "-0.5", "nan", "inf", "Infinity", "1e99", "1e-19", "0.0000000000000000001", "1,5", "0x10", "1 2", "1e999999999",
     "9" * 41, "1" + "0" * 40, "1_000", "٣", "１", ".5", "--1", "1e", "True", "None"],
)  # fmt: skip
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        amount(text)


def test_amounts_of_numbers() -> None:
    assert amount(1) == 1
    assert amount(0.1) == Decimal("0.1")
    for bad in (float("nan"), float("inf"), -1, Decimal("NaN"), Decimal("-1"), True):
        with pytest.raises(ValueError):
            amount(bad)


@exact
@given(st.text(max_size=60))
def test_any_text_is_an_amount_or_a_value_error(text: str) -> None:
    try:
        value = amount(text)
    except ValueError:
        return
    assert amount(amount_text(value)) == value
    assert from_wei(to_wei(value)) == value


MICROS = st.integers(0, 4_102_444_800 * 10**6)  # up to 2100


@exact
@given(MICROS)
def test_times_there_and_back(micros: int) -> None:
    """Text and number name the same instant, to the microsecond: readers of feeds come back with the text."""
    seconds = round(micros / 10**6, 6)
    text = timestamp_text(seconds)
    assert timestamp(text) == seconds
    assert datetime.fromisoformat(text) == datetime.fromtimestamp(micros // 10**6, UTC).replace(microsecond=micros % 10**6)


@exact
@given(MICROS, MICROS)
def test_texts_sort_as_times_do(a: int, b: int) -> None:
    assert (timestamp_text(a / 10**6) < timestamp_text(b / 10**6)) == (a < b)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1970-01-01T00:00:00Z", 0.0), ("1970-01-01t00:00:01z", 1.0), ("1970-01-01 01:00:00+01:00", 0.0),
     ("1969-12-31T23:00:00.5-0100", 0.5), ("2020-02-29T12:00:00.123456789Z", 1582977600.123456),
     ("1998-12-31T23:59:60Z", 915148800.0), ("  1970-01-01T00:00:00Z ", 0.0)],
)  # fmt: skip
def test_times(text: str, seconds: float) -> None:
    assert timestamp(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "now", "1970-01-01", "1970-01-01T00:00:00", "1970-13-01T00:00:00Z", "1970-02-30T00:00:00Z", "1970-01-01T24:00:00Z",
     "1970-01-01T00:60:00Z", "1970-01-01T00:00:61Z", "0000-01-01T00:00:00Z", "1970-01-01T00:00:00.Z",
     "1970-01-01T00:00:00.1234567890Z", "1970-01-01T00:00:00+99:00", "1970-01-01T00:00:00+00:60", "٢020-01-01T00:00:00Z"],
)  # fmt: skip
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        timestamp(text)


@exact
@given(st.text(alphabet="0123456789-:+.TZ ", max_size=40))
def test_any_text_is_a_time_or_a_value_error(text: str) -> None:
    try:
        timestamp_text(timestamp(text))
    except ValueError:
        pass


def test_addresses() -> None:
    node = node_id("0x" + "Ab" * 20)
    assert node == "0x" + "ab" * 20
    assert address(node, "market") == f"{node}/market"
    assert node_of(f"{node}/exeunit:1/2") == node
    assert actor_of(f"{node}/exeunit:1/2") == "exeunit:1/2"
    assert (node_of("market"), actor_of("market")) == ("market", "")


@pytest.mark.parametrize("text", ["", "0x", "ab" * 20, "0x" + "g" * 40, "0x" + "a" * 39, "0x" + "a" * 41, "0x" + "a" * 40 + "\n"])
def test_node_ids_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        node_id(text)


def test_digest_keeps_parts_apart() -> None:
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert digest("a") == digest(b"a")
    assert len(digest()) == 64
    rng = random.Random(1)
    seen = {digest(rng.randbytes(rng.randrange(4)), rng.randbytes(rng.randrange(4))) for _ in range(50)}
    assert len(seen) > 40
