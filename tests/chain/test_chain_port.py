"""The chain's actor in a running system: real kernel, real wallet, real dev chain; only the ledger is a recorder."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio
from chain_support import GLM, Client, address_of, key_of
from worlds.patience import patience, within
from worlds.support import trio_test

from actors.kernel.journal import Journal
from actors.kernel.machine import LinkDown, Meta, Reply, Rows, Send, Step
from actors.kernel.system import System
from actors.wallet.machine import Wallet
from golem.chain import networks, port
from golem.chain.claims import FEW, Claim, Claims
from golem.chain.devchain import stop_devchain, url_of
from golem.chain.port import Chain, open_chain
from golem.chain.rpc import RpcError
from golem.chain.verify import verify_transfer
from golem.chain.vouch import vouch_nothing
from protocol.types import Message, Undelivered, Violation
from protocol.wallet import (
    PaidOut,
    PayOut,
    PayOutDelayed,
    Transfer,
    TransferDelayed,
    TransferFailed,
    TransferRejected,
    TransferVerified,
    VerifyTransfer,
)

pytestmark = pytest.mark.integration

HOLESKY, HOODI = "erc20-holesky-tglm", "erc20-hoodi-tglm"


class Done(Message, frozen=True):
    pass


class Recorder:
    """Stands for the ledger: passes on what the test orders, and keeps every answer as a row."""

    name = "ledger"
    local: Any = PayOut | VerifyTransfer | PaidOut | PayOutDelayed | TransferVerified | TransferRejected | Undelivered
    peer: Any = None
    rows: Any = PaidOut | PayOutDelayed | TransferVerified | TransferRejected

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        if isinstance(message, PayOut):
            return Step({}, [Send("wallet", message), Reply(Done())])
        if isinstance(message, VerifyTransfer):
            return Step({}, [Send("chain", message), Reply(Done())])
        assert not isinstance(message, Undelivered), message
        number = sum(1 for _ in rows.prefix("heard/"))
        return Step({f"heard/{number:04}": message}, [])


class Nowhere:
    async def exchange(self, node: str, frame: bytes) -> bytes:
        raise LinkDown(node)


@dataclass
class Settings:
    data_dir: Path
    chain_dir: Path
    profile: str = "local"
    chain_url: str = ""


class Secret:
    """The key of the account `payer`."""

    def secret(self) -> bytes:
        from eth_hash.auto import keccak

        return bytes(keccak(b"test account payer"))


@dataclass
class World:
    system: System
    chain: Chain

    def heard(self, kind: type) -> list[Any]:
        return [row for _, row in self.system.rows("ledger").prefix("heard/") if isinstance(row, kind)]

    async def hears(self, kind: type, number: int = 1) -> list[Any]:
        with trio.move_on_after(patience(30)):
            while len(self.heard(kind)) < number:
                await trio.sleep(0.02)
            return self.heard(kind)
        rows = [row for _, row in self.system.rows("ledger").prefix("heard/")]
        raise AssertionError(f"no {number} {kind.__name__}: {rows} {self.chain.problems('local')}")


@asynccontextmanager
async def world(tmp_path: Path) -> AsyncIterator[World]:
    settings = Settings(tmp_path, tmp_path / "chain")
    me, traces = key_of("payer").address, count()
    journal = Journal(str(tmp_path / "node.db"), lambda: "epoch")
    system = System(me, journal, Nowhere(), clock=trio.current_time, new_trace=lambda: f"t{next(traces)}")
    system.add(Recorder())
    system.add(Wallet(me, default_interval_s=0.5))
    try:
        async with open_chain(settings, Secret(), system, vouch_nothing) as chain, trio.open_nursery() as nursery:
            await nursery.start(system.run)
            nursery.start_soon(chain.connect)
            yield World(system, chain)
            nursery.cancel_scope.cancel()
    finally:
        journal.close()


@trio_test
async def test_a_thousand_false_claims_do_not_hold_up_an_honest_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me, a, liar = key_of("payer").address, address_of("port a"), address_of("liar")
    looks: list[str] = []
    taken: dict[str, int] = {}  # how many looks there had been when a claim came
    add = Claims.add

    def noted(self: Claims, claim: Claim) -> None:
        taken[claim.claim_id] = len(looks)
        add(self, claim)

    async def look(rpc: Any, network: Any, tx_hash: str, *rest: Any) -> Any:
        looks.append(tx_hash)
        return await verify_transfer(rpc, network, tx_hash, *rest)

    monkeypatch.setattr(port, "verify_transfer", look)
    monkeypatch.setattr(Claims, "add", noted)
    try:
        async with world(tmp_path) as w:
            await w.chain.fund("holesky")
            await w.system.ask("ledger", PayOut("o1", HOLESKY, me, a, "1"))
            (paid,) = await w.hears(PaidOut)
            for i in range(1000):
                false = VerifyTransfer(f"f{i}", HOLESKY, f"0x{i:064x}", liar, a, "1", "0")
                assert not await w.chain.handle(false, Meta(f"{me}/ledger", 0.0, "t"))
            for number in range(3):  # before it, in the midst, and again
                claim = VerifyTransfer(f"c{number}", HOLESKY, paid.tx_hash, me, a, "1", "0")
                await w.system.ask("ledger", claim)
                await w.hears(TransferVerified, number + 1)
                later = looks[taken[claim.claim_id] :]
                assert later.index(paid.tx_hash) <= 2, "one look may be under way, and one is the liar's turn"
            assert len(set(looks)) <= FEW + 1, "of one payer only few are looked at in the same time"
            early = VerifyTransfer("old", HOLESKY, paid.tx_hash, me, a, "1", "0", not_before=4e9)
            await w.system.ask("ledger", early)
            (refused,) = await w.hears(TransferRejected)
            assert (refused.claim_id, "older than what it is to pay" in refused.reason) == ("old", True)
    finally:
        await stop_devchain(tmp_path / "chain")


@trio_test
async def test_orders_are_paid_once_and_claims_are_verified_over_a_restart(tmp_path: Path) -> None:
    me, a, b = key_of("payer").address, address_of("port a"), address_of("port b")
    try:
        async with world(tmp_path) as w:
            assert [row["network"] for row in w.chain.accounts()] == ["local", "holesky", "hoodi"]
            assert all(row["simulatedBy"] == "local dev chain" for row in w.chain.accounts())
            assert await w.chain.fund("holesky") == await w.chain.balances("hoodi"), "one chain under several names"
            assert (await w.chain.balances("local")).token_wei == 1000 * GLM
            for _ in range(2):  # a repeat changes nothing
                for order_id, platform, payee, glm in (
                    ("o1", HOLESKY, a, "1.5"), ("o2", HOLESKY, b, "2"), ("o3", HOODI, a, "0.25"), ("o4", HOLESKY, a, "1"),
                ):  # fmt: skip
                    await w.system.ask("ledger", PayOut(order_id, platform, me, payee, glm))
            paid = await w.hears(PaidOut, 3)
            assert {(p.order_ids, p.platform, p.payee, p.amount) for p in paid} == {
                (("o1", "o4"), HOLESKY, a, "2.5"), (("o2",), HOLESKY, b, "2"), (("o3",), HOODI, a, "0.25"),
            }  # fmt: skip
            assert (await w.chain.balances("local", a)).token_wei == 275 * GLM // 100
            assert (await w.chain.balances("local", b)).token_wei == 2 * GLM
            tx = {p.payee: p.tx_hash for p in paid if p.platform == HOLESKY}
            good = VerifyTransfer("c1", HOLESKY, tx[a], me, a, "2.5", "0")
            bad = VerifyTransfer("c2", HOLESKY, tx[a], me, a, "2.5", "0.1")
            for claim in (good, bad, VerifyTransfer("c3", "erc20-mumbai-tglm", tx[a], me, a, "1", "0")):
                await w.system.ask("ledger", claim)
            assert await w.hears(TransferVerified) == [TransferVerified("c1", tx[a])]
            refused = {row.claim_id: row.reason for row in await w.hears(TransferRejected, 2)}
            assert "settled before" in refused["c2"]
            assert "not served" in refused["c3"]
            late = await w.chain._rpcs["1337"].dev("dev_faucet", a)  # mined, but no token moves: never mind the answer
            await w.system.ask("ledger", VerifyTransfer("c4", HOLESKY, late, me, a, "1", "0"))
            for sender in (f"{me}/exeunit:{'e' * 32}", f"{me}/edge", f"{a}/wallet", f"{a}/ledger", me):
                for message in (Transfer("b0", HOLESKY, me, ((a, "1"),)), good):
                    with pytest.raises(Violation):
                        await w.chain.handle(message, Meta(sender, 0.0, "t"))
            meta = Meta(f"{me}/wallet", 0.0, "t")
            for wrong, end in (
                (Transfer("b1", HOLESKY, b, ((a, "1"),)), TransferDelayed), (Transfer("b2", HOLESKY, me, ()), TransferFailed),
                (Transfer("b3", "erc20-mumbai-tglm", me, ((a, "1"),)), TransferDelayed),
                (Transfer("b4", HOLESKY, me, ((a, "0"),)), TransferFailed),
            ):  # fmt: skip
                (answer,) = await w.chain.handle(wrong, meta)
                assert isinstance(answer.message, end), wrong
        async with world(tmp_path) as w:
            assert "c4" in {row.claim_id for row in await w.hears(TransferRejected, 3)}
            await w.system.ask("ledger", PayOut("o5", HOODI, me, b, "3"))
            await w.hears(PaidOut, 4)
            assert (await w.chain.balances("hoodi", b)).token_wei == 5 * GLM
            url = await url_of(tmp_path / "chain")
            assert url is not None
            client = Client(url)
            nonce = client.number("eth_getTransactionCount", me, "latest")
            assert nonce == 1 + 1 + 3, "create, approve, three batches"
    finally:
        await stop_devchain(tmp_path / "chain")


@trio_test
@pytest.mark.parametrize("missing", ["profile", "key", "contract"])
async def test_a_payment_under_way_has_not_failed_because_the_node_is_started_without(tmp_path: Path, missing: str) -> None:
    """...its profile, its key or its contract for many payees: what was sent may still be mined."""
    payees = ((address_of("port a"), "1"), (address_of("port b"), "2"))
    transfer = Transfer("b", HOODI, key_of("payer").address, payees, (("o1",), ("o2",)))

    async def told(settings: Settings, name: str) -> list[Any]:
        journal = Journal(str(tmp_path / "node.db"), lambda: "epoch")
        system = System(key_of("payer").address, journal, Nowhere(), clock=trio.current_time, new_trace=lambda: "t")
        chain = Chain(settings, key_of(name), system, vouch=vouch_nothing)
        try:
            return [send.message for send in await chain.handle(transfer, Meta(f"{system.node}/wallet", 0.0, "t"))]
        finally:
            await chain.aclose()
            journal.close()

    assert await told(Settings(tmp_path, tmp_path / "chain", "testnet"), "payer") == []
    if missing == "contract":
        row = next(row for row in networks.PUBLIC if row.name == "hoodi")
        extra = {"name": row.name, "chain_id": row.chain_id, "rpc_urls": list(row.rpc_urls), "token": row.token}
        (tmp_path / port.EXTRA_ROWS).write_text(json.dumps([extra]))
    profile, name = "mainnet" if missing == "profile" else "testnet", "another" if missing == "key" else "payer"
    answers = await told(Settings(tmp_path, tmp_path / "chain", profile), name)
    assert [type(answer) for answer in answers] == ([] if missing == "contract" else [TransferDelayed])


@trio_test
async def test_the_chain_comes_back_when_its_process_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "DEVCHAIN_LOOK_S", 1.0)
    me, payee = key_of("payer").address, address_of("port back")
    try:
        async with world(tmp_path) as w:
            await w.chain.fund("local")
            await stop_devchain(tmp_path / "chain")
            with pytest.raises(RpcError):
                await w.chain.balances("local")
            await w.system.ask("ledger", PayOut("o1", HOODI, me, payee, "1"))
            delayed = await w.hears(PayOutDelayed)
            assert delayed[0].order_ids == ("o1",)
            await w.hears(PaidOut)
            assert (await w.chain.balances("local", payee)).token_wei == GLM
    finally:
        await stop_devchain(tmp_path / "chain")


@trio_test
async def test_a_claim_that_grew_old_while_nobody_looked_is_not_unknown_at_the_first_look(tmp_path: Path) -> None:
    """The payee's machine slept for a night; its RPC answers again, and has not caught up."""
    try:
        async with world(tmp_path) as w:
            await w.chain.fund("holesky")
            me, a, night_s = key_of("payer").address, address_of("port a"), 8 * 3600.0
            claim = Claim("old", HOLESKY, "0x" + "12" * 32, me, a, GLM, 0, time.time() - night_s)
            w.chain._claims.add(claim)
            w.chain._claimed.set()
            with within(30):
                while "old" not in w.chain._unknown:
                    await trio.sleep(0.02)
            await w.system.ask("ledger", VerifyTransfer("false", HOLESKY, "0x12", me, a, "1", "0"))
            assert [row.claim_id for row in await w.hears(TransferRejected)] == ["false"]
            assert [each.claim_id for each in w.chain._claims.all()] == ["old"]
    finally:
        await stop_devchain(tmp_path / "chain")
