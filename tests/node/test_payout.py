"""Where a node is paid: addresses of an operator's key, and what a start says of those that may be shared."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from worlds.market_world import OTHER_ID, OTHER_KEY, PROVIDER_ID, offer
from worlds.support import trio_test

from actors.market.rows import OfferRow
from golem.config import config_from
from golem.daemon import open_node
from golem.node.payout import OLD_KEY, Payout, _child, _read, payout_of, read_payout, warn, write_payout

NOW = 1_800_000_000.0
# the second test vector of BIP 32: m, and its child m/0
MASTER = "xpub661MyMwAqRbcFW31YEwpkMuc5THy2PSt5bDMsktWQcFF8syAmRUapSCGu8ED9W6oDMSgv6Zz8idoc4a6mr8BDzTJY47LJhkJ8UB7WEGuduB"
PRIVATE = "xprv9s21ZrQH143K31xYSDQpPDxsXRTUcvj2iNHm5NUtrGiGG5e2DtALGdso3pGz6ssrdK4PFmM8NSpSBHNqPqm55Qn3LqFtT2emdEXVYsCzC2U"
CHILD = "xpub69H7F5d8KSRgmmdJg2KhpAK8SR3DjMwAdkxj3ZuxV27CprR9LgpeyGmXUbC6wb7ERfvrnKZjXoUmmDznezpbZb7ap6r1D3tgFxHmwMkQTPH"


def test_children_are_those_of_the_published_vector() -> None:
    assert _child(*_read(MASTER), 0) == _read(CHILD)


def test_each_node_has_an_address_of_its_own() -> None:
    one, other = payout_of(MASTER, "0x" + "1" * 40), payout_of(MASTER, "0x" + "2" * 40)
    assert one.address != other.address
    assert one == payout_of(MASTER, "0x" + "1" * 40)
    assert payout_of(MASTER, PROVIDER_ID, 7).path == "0/7"
    assert payout_of(OTHER_ID.upper().replace("0X", "0x"), PROVIDER_ID) == Payout(OTHER_ID)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (PRIVATE, "private"),
        (MASTER[:-1] + "C", "checksum"), ("0x7", "0x7"), ("", "checksum"), (MASTER * 2, "too long"), ("xpub0", "base58"),
    ],
)  # fmt: skip
def test_what_is_no_key_is_refused(target: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        payout_of(target, PROVIDER_ID)


def test_the_choice_is_kept(tmp_path: Path) -> None:
    assert read_payout(tmp_path) is None
    write_payout(tmp_path, chosen := payout_of(MASTER, PROVIDER_ID))
    assert read_payout(tmp_path) == chosen
    write_payout(tmp_path, None)
    assert read_payout(tmp_path) is None
    (tmp_path / "payout.json").write_text(json.dumps({"address": "0x7"}))
    with pytest.raises(ValueError, match=r"payout\.json"):
        read_payout(tmp_path)


def test_a_start_says_what_may_have_old_transfers_taken_for_new_ones() -> None:
    own = payout_of(MASTER, PROVIDER_ID)
    assert warn(None, PROVIDER_ID, (), "") == warn(own, PROVIDER_ID, (), "") == []
    [said] = warn(None, PROVIDER_ID, (), OLD_KEY)
    assert "new journal under an old key" in said
    [said] = warn(Payout(OTHER_ID), PROVIDER_ID, (), "")
    assert "may be shared" in said
    _, document = offer(NOW, OTHER_KEY, **{"golem.com.payment.platform.erc20-local-tglm.address": own.address})
    row = OfferRow(document, OTHER_ID, NOW + 60, 1)
    [said] = warn(own, PROVIDER_ID, [("offer/x", row)], "")
    assert OTHER_ID in said
    assert warn(None, PROVIDER_ID, [("offer/x", row)], "") == []


@pytest.mark.parametrize("given", [True, False])
@trio_test
async def test_a_new_journal_is_told_of_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture, given: bool) -> None:
    """A key that comes by the environment may be older than the journal, too; nobody can know."""
    environment = {"YAGNA_AUTOCONF_ID_SECRET": "7" * 64} if given else {}
    settings = {"data_dir": tmp_path / "node", "chain_dir": tmp_path / "chain", "plain_key": not given, "mdns": False,
                "listen": ("127.0.0.1:0",), "network_name": "in-test"}  # fmt: skip
    said = []
    for start in range(3):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "golem.node"):
            async with open_node(config_from(environment, **settings)):
                pass
        said.append(sum("has a new journal under" in record.getMessage() for record in caplog.records))
        if start == 1:
            for path in (tmp_path / "node").glob("node.db*"):
                path.unlink()
    assert said == [int(given), 0, 1]
