"""Parts of the chain layer that need no chain: signer, call data, networks, shipped contracts."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import coincurve
import pytest
import rlp
from chain_support import address_of, key_of
from eth_account import Account
from eth_hash.auto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st
from web3 import Web3

from golem.chain import contracts, networks, token
from golem.chain.claims import FEW, Claim, Claims, Turns
from golem.chain.contracts import build
from golem.chain.devchain import genesis
from golem.chain.networks import Platform, parse_platform
from golem.chain.rows import TransferBatch
from golem.chain.schema import SCHEMA_NUMBER
from golem.chain.signer import Key, Transaction, address_bytes, checksum, sign
from golem.chain.store import Store

U64 = st.integers(0, 2**64 - 1)


@settings(max_examples=60, deadline=None)
@given(
    secret=st.integers(1, 2**250), chain_id=st.integers(1, 2**31), nonce=U64, gas=U64, value=st.integers(0, 2**128),
    max_fee=st.integers(0, 2**80), part=st.floats(0, 1), data=st.binary(max_size=200),
    to=st.none() | st.binary(min_size=20, max_size=20),
)  # fmt: skip
def test_what_is_signed_is_the_bytes_that_the_standard_says(
    secret: int,
    chain_id: int,
    nonce: int,
    gas: int,
    value: int,
    max_fee: int,
    part: float,
    data: bytes,
    to: bytes | None,
) -> None:
    key, priority_fee = secret.to_bytes(32, "big"), int(max_fee * part) // 2
    recipient = "0x" + to.hex() if to else None
    ours = sign(Key(key), Transaction(chain_id, nonce, gas, max_fee, priority_fee, recipient, data, value))
    body = [chain_id, nonce, priority_fee, max_fee, gas, to or b"", value, data, []]
    signature = coincurve.PrivateKey(key).sign_recoverable(keccak(b"\x02" + rlp.encode(body)), hasher=None)
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:64], "big")
    raw = b"\x02" + rlp.encode([*body, signature[64], r, s])
    assert (ours.raw, ours.hash) == (raw, "0x" + keccak(raw).hex())


def test_keys_and_addresses() -> None:
    key = key_of("someone")
    account = Account.from_key(keccak(b"test account someone"))
    assert checksum(key.address) == account.address
    assert bytes(account.key).hex() not in repr(key)
    for bad in ("", "0x12", "12" * 20, "0x" + "zz" * 20):
        with pytest.raises(ValueError):
            address_bytes(bad)
    with pytest.raises(ValueError, match="priority"):
        sign(key, Transaction(1, 0, 21_000, 1, 2, None))
    with pytest.raises(ValueError, match="negative"):
        sign(key, Transaction(1, -1, 21_000, 1, 1, None))


def test_call_data_is_what_the_abi_says() -> None:
    glm = Web3().eth.contract(abi=contracts.load("TestToken").abi)
    multi = Web3().eth.contract(abi=contracts.load("MultiTransfer").abi)
    a, b = checksum(key_of("a").address), checksum(key_of("b").address)
    assert "0x" + token.transfer_call(a, 7).hex() == glm.encode_abi("transfer", [a, 7])
    assert "0x" + token.approve_call(b).hex() == glm.encode_abi("approve", [b, 2**256 - 1])
    assert "0x" + token.CREATE.hex() == glm.encode_abi("create", [])
    words = [bytes.fromhex(a[2:]) + (5).to_bytes(12, "big"), bytes.fromhex(b[2:]) + (2**96 - 1).to_bytes(12, "big")]
    packed = token.packed_call(((a, 5), (b, 2**96 - 1)))
    assert "0x" + packed.hex() == multi.encode_abi("golemTransferDirectPacked", [words])
    assert "0x" + keccak(b"Transfer(address,address,uint256)").hex() == contracts.TRANSFER_TOPIC
    assert keccak(b"getL1Fee(bytes)")[:4] == token.GET_L1_FEE


def test_the_well_known_keys_and_addresses_belong_together() -> None:
    faucet, deployer = Key(genesis.FAUCET_SECRET), Key(genesis.DEPLOYER_SECRET)
    assert keccak(b"golem dev chain faucet") == genesis.FAUCET_SECRET
    assert (checksum(faucet.address), checksum(deployer.address)) == (genesis.FAUCET_ADDRESS, genesis.DEPLOYER_ADDRESS)
    made = [keccak(rlp.encode([address_bytes(deployer.address), nonce]))[12:] for nonce in (b"", 1)]
    assert [checksum("0x" + address.hex()) for address in made] == [
        genesis.TOKEN_ADDRESS, genesis.MULTI_TRANSFER_ADDRESS,
    ]  # fmt: skip


def test_the_shipped_bytecode_is_compiled_from_the_shipped_source() -> None:
    vyper = build.find_vyper()
    if vyper is None:
        pytest.skip(f"vyper {build.VERSION} is not installed (it needs an environment of its own)")
    for name in build.NAMES:
        shipped = json.loads((build.HERE / f"{name}.json").read_text())
        assert build.compile_contract(vyper, name) == shipped


def test_platform_strings() -> None:
    assert parse_platform("erc20-holesky-tglm") == Platform("erc20", "holesky", "tglm")
    assert str(Platform("erc20", "polygon", "glm")) == "erc20-polygon-glm"
    for bad in ("", "erc20-holesky", "erc20-holesky-tglm-x", "ERC20-holesky-tglm", "erc20--tglm", "a b-c-d"):
        with pytest.raises(ValueError, match="platform"):
            parse_platform(bad)


def test_the_public_table() -> None:
    table = networks.load("testnet", environ={"HOODI_GETH_ADDR": "http://a, http://b"})
    money = networks.load("mainnet", environ={})
    assert set(table.platforms) == {
        "erc20-holesky-tglm", "erc20-hoodi-tglm", "erc20-amoy-tglm", "erc20-sepolia-tglm",
    }  # fmt: skip
    assert set(money.platforms) == {"erc20-mainnet-glm", "erc20-polygon-glm"}
    assert table.by_name("hoodi").rpc_urls == ("http://a", "http://b")
    assert not money.by_platform("erc20-polygon-glm").is_test
    assert len({row.chain for row in [*table, *money]}) == 6
    for row in [*table, *money]:
        address_bytes(row.token)
        assert row.multi_transfer is None or address_bytes(row.multi_transfer)
        assert row.simulated_by is None
    with pytest.raises(KeyError, match="served: erc20-holesky-tglm"):
        table.by_platform("erc20-mumbai-tglm")
    with pytest.raises(KeyError, match="known: holesky"):
        table.by_name("mumbai")


def test_the_local_table_serves_the_agents_favourites_and_says_so() -> None:
    table = networks.load("local", dev_url="http://127.0.0.1:1")
    assert table.platforms == ("erc20-local-tglm", "erc20-holesky-tglm", "erc20-hoodi-tglm")
    assert {row.simulated_by for row in table} == {"local dev chain"}
    assert {row.chain for row in table} == {"1337"}
    with pytest.raises(ValueError, match="URL"):
        networks.load("local")


def test_rows_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "networks.json"
    row = {"name": "mine", "chain_id": 5, "rpc_urls": ["http://x"], "token": "0x" + "11" * 20, "fee_model": "zk"}
    path.write_text(json.dumps([row]))
    table = networks.load("local", dev_url="http://127.0.0.1:1", extra=path)
    assert table.by_platform("erc20-mine-tglm").fee_model == "zk"
    wrong_fields = ({"colour": 1}, {"fee_model": "free"}, {"name": "a-b"}, {"token": "0x12"})
    for wrong in (*(row | each for each in wrong_fields), {"name": "mine"}, 3):
        path.write_text(json.dumps([wrong]))
        with pytest.raises(ValueError):
            networks.read_rows(path)


def test_rows_of_one_chain_name_the_same_contracts(tmp_path: Path) -> None:
    path = tmp_path / "networks.json"
    twin = {"name": "mine", "chain_id": genesis.CHAIN_ID, "rpc_urls": ["http://x"], "token": genesis.TOKEN_ADDRESS.lower(),
            "multi_transfer": genesis.MULTI_TRANSFER_ADDRESS}  # fmt: skip
    path.write_text(json.dumps([twin]))
    assert "mine" in networks.load("local", dev_url="http://127.0.0.1:1", extra=path).rows
    for other in ({"token": "0x" + "12" * 20}, {"multi_transfer": None}):
        path.write_text(json.dumps([twin | other]))
        with pytest.raises(ValueError, match="local and mine are one chain and name different contracts"):
            networks.load("local", dev_url="http://127.0.0.1:1", extra=path)


def test_chain_db_of_another_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "chain.db"
    store = Store(path, "1337/0x1")
    store.add_batch(TransferBatch("b1", ((address_of("a"), 7),)))
    store.close()
    assert len(Store(path, "1337/0x1").queued()) == 1
    for number in (0, SCHEMA_NUMBER + 1):
        with sqlite3.connect(path) as db:
            db.execute(f"pragma user_version={number}")
        with pytest.raises(ValueError, match=rf"chain.db has schema {number}, this version .* works with schema {SCHEMA_NUMBER}"):
            Store(path, "1337/0x1")
        with pytest.raises(ValueError, match="has schema"):
            Claims(path)
    with sqlite3.connect(path) as db:
        db.execute(f"pragma user_version={SCHEMA_NUMBER}")
    assert len(Store(path, "1337/0x1").queued()) == 1
    (tmp_path / "none.db").write_text("no database, but long enough to be one" * 100)
    with pytest.raises(ValueError, match="cannot open"):
        Store(tmp_path / "none.db", "1337/0x1")


def test_a_damaged_claim_is_forgotten_and_asked_again(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "chain.db")
    good = Claim("c1", "erc20-local-tglm", "0x" + "1" * 64, address_of("a"), address_of("b"), 10**15, 0, 1.5)
    for name in ("c1", "c2"):
        claims.add(replace(good, claim_id=name))
    claims._sql.execute("update claim set amount_wei='1' where id='c2'")
    assert claims.all() == [good]
    assert claims.all() == [good]
    claims.add(replace(good, claim_id="c2"))
    assert len(claims.all()) == 2


def _claim(claim_id: str, payer: str, created: float = 0.0) -> Claim:
    return Claim(claim_id, "erc20-local-tglm", "0x" + "1" * 64, address_of(payer), address_of("b"), 10**15, 0, created)


def test_a_repeated_claim_keeps_its_age(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "chain.db")
    claims.add(_claim("c1", "liar", 100.0))
    for now in (160.0, 220.0, 1900.0):
        claims.add(replace(_claim("c1", "liar", now), claimed_wei=7))
    assert [(claim.created, claim.claimed_wei) for claim in claims.all()] == [(100.0, 7)]
    claims.add(replace(_claim("c1", "liar", 2000.0), tx_hash="0x" + "2" * 64))
    assert [claim.created for claim in claims.all()] == [2000.0], "another transaction is another claim"


@pytest.mark.parametrize("liars", [1, 7])
def test_a_thousand_false_claims_delay_an_honest_one_by_a_look_a_liar(tmp_path: Path, liars: int) -> None:
    """Time passes by looks alone: a look takes 0.2 s, and a false claim is unknown each time."""
    turns, now, look_s, poll_s, seen = Turns(), 0.0, 0.2, 4.0, 0
    claims = [_claim(f"f{i}", f"liar {i % liars}") for i in range(1000)]
    for _ in range(500):
        found = turns.next(claims, now)
        if not isinstance(found, Claim):
            now = found
            continue
        now, seen = now + look_s, seen + 1
        turns.rest(found, now, poll_s, now - found.created)
    assert seen <= 500
    for i in range(20):  # now an honest payer settles, twice a claim: not deep enough at first
        honest = _claim(f"h{i}", "honest", now)
        waits = 0
        for look in range(2):
            while (found := turns.next([*claims, honest], now)) != honest:
                assert isinstance(found, Claim | float)
                if isinstance(found, Claim):
                    waits, now = waits + 1, now + look_s
                    turns.rest(found, now, poll_s, now - found.created)
                else:
                    now = found
            now += look_s
            turns.rest(honest, now, poll_s, now - honest.created)
            assert waits <= (liars + 1) * (look + 1) + look * poll_s / look_s
        assert now - honest.created < 2 * poll_s + (2 * liars + 4) * look_s


def test_what_stays_unknown_is_asked_ever_more_rarely_and_few_of_a_payer() -> None:
    turns, now, poll_s = Turns(), 0.0, 1.0
    claims, looks = [_claim(f"f{i:04}", "liar") for i in range(1000)], dict[str, list[float]]()
    while now < 1800:
        found = turns.next(claims, now)
        if isinstance(found, Claim):
            looks.setdefault(found.claim_id, []).append(now)
            turns.rest(found, now, poll_s, now - found.created)
        else:
            now = found
    assert sorted(looks) == [f"f{i:04}" for i in range(FEW)], "the others wait for room"
    for times in looks.values():
        pauses = [late - early for early, late in pairwise(times)]
        assert pauses == sorted(pauses)
        assert len(times) < 40
    found = turns.next(claims[FEW:], now)
    assert isinstance(found, Claim), "those that are answered make room"


def test_nothing_to_look_at_is_never_due() -> None:
    assert Turns().next([], 5.0) == float("inf")
