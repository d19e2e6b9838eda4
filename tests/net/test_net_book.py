"""The address book and node records: what they keep, refuse and forget."""

from __future__ import annotations

import time
from pathlib import Path

import msgpack
import pytest
from eth_keys import keys

import golem.net.book as book_module
from golem.net.book import Book
from golem.net.peerid import (
    RECORD_LIFE_S,
    is_tcp_address,
    node_id_of,
    peer_id_of,
    pubkey_of,
    public_key,
    read_record,
    sign_record,
    split_address,
)

KEY = b"\x11" * 32
PEER = peer_id_of(public_key(KEY))
NODE = node_id_of(public_key(KEY))


def test_the_node_id_is_the_ethereum_address_of_the_key() -> None:
    assert keys.PrivateKey(KEY).public_key.to_address() == NODE
    assert pubkey_of(PEER) == public_key(KEY)


def test_the_peer_id_is_libp2ps() -> None:
    from golem.net.host import Libp2pHost
    from golem.net.types import Timing

    host = Libp2pHost(KEY, Timing())
    assert host.peer_id == PEER
    assert host.node_id == NODE


@pytest.mark.parametrize("text", ["", "Qm" + "a" * 44, "0" * 53, PEER[:-1], PEER + "1", PEER[:-1] + "O", "1" * 53, "é" * 53])
def test_other_peer_ids_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        pubkey_of(text)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("/ip4/127.0.0.1/tcp/4001", True),
        ("/ip6/::1/tcp/1", True),
        ("/dns4/node.example/tcp/65535", True),
        ("/ip4/127.0.0.1/udp/4001", False),
        ("/ip4/127.0.0.1/tcp/0", False),
        ("/ip4/127.0.0.1/tcp/65536", False),
        ("/ip4/127.0.0.1/tcp/4001/ws", False),
        ("/ip4//tcp/1", False),
        ("ip4/1.2.3.4/tcp/1", False),
        ("/ip4/" + "1" * 200 + "/tcp/1", False),
        ("/ip4/127.0.0.1/tcp/²", False),
    ],
)
def test_addresses(text: str, good: bool) -> None:
    assert is_tcp_address(text) is good
    if good:
        assert split_address(f"{text}/p2p/{PEER}") == (text, PEER)
    else:
        with pytest.raises(ValueError, match="expected /ip4"):
            split_address(f"{text}/p2p/{PEER}")


def test_records_are_signed_by_the_node_itself() -> None:
    record = sign_record(KEY, "golem", ["/ip4/10.0.0.1/tcp/4001"])
    assert read_record(record.raw, "golem") == record
    assert record.node_id == NODE
    body, signature = msgpack.unpackb(record.raw)
    network, pubkey, addresses, issued_at = msgpack.unpackb(body)
    forged = msgpack.packb([network, public_key(b"\x22" * 32), addresses, issued_at])
    moved = msgpack.packb([network, pubkey, ["/ip4/6.6.6.6/tcp/1"], issued_at])
    for raw in (
        msgpack.packb([forged, signature]),
        msgpack.packb([moved, signature]),
        msgpack.packb([body, signature[:-1]]),
        msgpack.packb([body]),
        b"",
        b"\xff" * 40,
        b"x" * 3000,
        "text",
        None,
    ):
        with pytest.raises(ValueError, match="node record"):
            read_record(raw, "golem")


def test_records_of_other_networks_and_times_are_refused() -> None:
    record = sign_record(KEY, "golem", [])
    with pytest.raises(ValueError, match="another network"):
        read_record(record.raw, "other")
    for shift, words in ((-1000, r"is 1000 s ahead of the clock here, and 300 s are tolerated"), (RECORD_LIFE_S + 10, "too old")):
        with pytest.raises(ValueError, match=words):
            read_record(record.raw, "golem", record.issued_at + shift)
    bad = sign_record(KEY, "golem", ["/ip4/1.2.3.4/udp/1"])
    with pytest.raises(ValueError, match="malformed"):
        read_record(bad.raw, "golem")


def test_the_book_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "peers.db"
    book = Book(path, "golem")
    book.add_record(sign_record(KEY, "golem", ["/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/2"], time.time() - 60))
    book.add_record(sign_record(KEY, "golem", ["/ip4/10.0.0.9/tcp/9"], time.time() - 120))  # older: ignored
    assert book.add_hint(PEER, "/ip4/10.0.0.3/tcp/3") == NODE
    book.add_hint(PEER, "/ip4/nonsense")
    book.mark_met(NODE, PEER, "/ip4/10.0.0.2/tcp/2")
    book.close()
    again = Book(path, "golem")
    assert again.addresses(NODE) == ["/ip4/10.0.0.2/tcp/2", "/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.3/tcp/3"]
    assert again.recent()[0].record is not None
    assert again.addresses("0x" + "0" * 40) == []


def test_the_book_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book_module, "MAX_PEERS", 5)
    book = Book(tmp_path / "peers.db", "golem")
    book.mark_met(NODE, PEER, "/ip4/10.0.0.1/tcp/1")
    for number in range(1, 20):
        book.add_hint(peer_id_of(public_key(bytes([number]) * 32)), "/ip4/10.0.0.1/tcp/1")
    for port in range(1, 50):
        book.add_hint(PEER, f"/ip4/10.0.0.1/tcp/{port}")
    assert len(book) == 5
    assert NODE in book  # the only one that we ever met
    assert len(book.addresses(NODE)) <= 16
    assert book._db.execute("SELECT count(*) FROM peers").fetchone()[0] == 5


def test_a_damaged_book_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "peers.db"
    path.write_bytes(b"this is no database" * 100)
    book = Book(path, "golem")
    book.add_hint(PEER, "/ip4/10.0.0.1/tcp/1")
    assert len(book) == 1
    assert path.with_suffix(".damaged").exists()
