"""The live log of an exe-unit, and what it reads of its agreement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.support import mock_trio_test

from golem.exeunit.live import MAX_KEPT_BYTES, MAX_REPLY_BYTES, LiveLog
from golem.exeunit.runtime import Limits
from golem.exeunit.terms import AgreementError, flat, read_terms
from golem.exeunit.usage import COUNTERS
from protocol.live import LiveEvent

R, P = "0x" + "1" * 40, "0x" + "2" * 40


def test_ids_count_from_zero_for_each_batch() -> None:
    log = LiveLog()
    for batch in ("a", "b", "a"):
        log.add(batch, 0, 1.0, {"stdout": batch})
    assert [event.id for event in log.read("a", -1)] == [0, 1]
    assert [event.id for event in log.read("a", 0)] == [1]
    assert [event.id for event in log.read("b", -1)] == [0]
    assert log.read("c", -1) == []


def test_replies_and_memory_are_bounded_and_the_oldest_goes_first() -> None:
    log = LiveLog()
    text = "x" * 60_000
    for number in range(1000):
        log.add("a", 0, 1.0, {"stdout": text})
        kept = log.read("a", number - 1)
        assert [event.id for event in kept] == [number]
    first = log.read("a", -1)
    assert 0 < sum(len(event.kind) for event in first) <= MAX_REPLY_BYTES
    assert first[0].id >= 1000 - MAX_KEPT_BYTES // 60_000 - 1
    log.add("b", 0, 1.0, {"stdout": "y" * (MAX_REPLY_BYTES * 2)})
    assert len(log.read("b", -1)) == 1, "one that is too long still gets through"


@mock_trio_test
async def test_a_reader_waits_for_news_of_its_batch() -> None:
    log = LiveLog()
    began = trio.current_time()
    assert await log.follow("a", -1, 7.0) == []
    assert trio.current_time() - began == 7.0
    assert await log.follow("a", -1, 1e9) == []  # nobody is held for ever
    found: list[Any] = []

    async def read() -> None:
        found.extend(await log.follow("a", -1, 20.0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.sleep(1)
        log.add("other", 0, 1.0, {})
        await trio.sleep(1)
        assert found == []
        log.add("a", 3, 2.0, {"finished": {"return_code": 0, "message": None}})
    assert found == [LiveEvent(0, 3, 2.0, '{"finished":{"return_code":0,"message":null}}')]


def agreement(demand: Any, offer: Any) -> dict[str, Any]:
    return {
        "agreementId": "a" * 64,
        "demand": {"requestorId": R.upper().replace("X", "x"), "properties": demand},
        "offer": {"providerId": P, "properties": offer},
    }


def test_terms_from_flat_and_nested_properties(tmp_path: Path) -> None:
    file = tmp_path / "agreement.json"
    flat_form = {"golem.inf.mem.gib": 2, "golem.inf.storage.gib": 3.5, "golem.inf.cpu.threads": 4}
    nested = {"golem": {"inf": {"mem": {"gib": 2}, "storage": {"gib": 3.5}, "cpu": {"threads": 4}}}}
    package = {"golem.srv.comp.task_package": "hash:sha3:00:http://x", "golem.srv.comp.expiration": 1_800_000_000_000}
    for form in (flat_form, nested):
        file.write_text(json.dumps(agreement(package, form)))
        terms = read_terms(file)
        assert terms.limits == Limits(cpu_threads=4, mem_gib=2.0, storage_gib=3.5)
        assert (terms.requestor, terms.provider) == (R, P)
        assert (terms.task_package, terms.expires_at) == ("hash:sha3:00:http://x", 1_800_000_000.0)
        assert terms.usage_vector == COUNTERS
    tagged = {"golem": {"com": {"pricing": {"model": {"@tag": "linear", "linear": {"coeffs": [0.0]}}}}}}
    assert flat(tagged) == {"golem.com.pricing.model": "linear", "golem.com.pricing.model.linear.coeffs": [0.0]}


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, json.dumps(agreement([], {})), '{"agreementId": 1}'])
def test_what_is_no_agreement_is_said(tmp_path: Path, text: str) -> None:
    file = tmp_path / "agreement.json"
    file.write_text(text)
    with pytest.raises(AgreementError, match="is not an agreement"):
        read_terms(file)
    with pytest.raises(AgreementError, match="cannot read"):
        read_terms(tmp_path / "none")
