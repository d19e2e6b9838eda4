"""The actor `chain`: what the wallet wants sent and what the ledger wants verified, done by engines and `verify`.

`Chain` is the port (a mailbox of the node's kernel) and the face of the chain layer to REST and command line: networks,
accounts, balances, problems, test money. One engine serves all networks that are one chain. On the local profile the
dev chain is started when nobody serves it, and again when it dies, unless the node was given another machine's
(`chain_url`); everything here answers before it is up.

Both kinds of work are on disk before the mailbox moves on (batches and claims in `chain.db`), and their ends are posted
through the kernel's links before they are struck off: nothing is lost, and a repeat is recognised by its id.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import trio

from actors.kernel.machine import Meta, Send
from golem.chain import desk, faucet, token
from golem.chain import networks as table
from golem.chain.claims import Claim, Claims, Turns
from golem.chain.devchain import DevChainError, ensure_devchain
from golem.chain.engine import FAULTS, Engine
from golem.chain.networks import DRIVER, SIMULATED, Network, Networks, NotServed
from golem.chain.problem import Problem
from golem.chain.purse import MAX_AGE_S, Held, Purses
from golem.chain.rows import TransferBatch
from golem.chain.rpc import Head, Rpc, RpcError
from golem.chain.schema import OwnDisk
from golem.chain.signer import Key
from golem.chain.store import OrdersTaken
from golem.chain.totals import totals
from golem.chain.verify import NotYet, Rejected, verify_transfer
from golem.chain.vouch import Vouch, told, voucher
from golem.chain.watch import Vigil
from protocol.types import Message, Violation, address, amount, amount_text, from_wei, to_wei
from protocol.wallet import (
    KnownBatch,
    OrdersKnown,
    Transfer,
    TransferDelayed,
    TransferFailed,
    TransferNews,
    TransferRejected,
    TransferVerified,
    VerifyTransfer,
)

if TYPE_CHECKING:
    from actors.kernel.system import System

log = logging.getLogger("golem.chain")

UNSTARTED = "http://127.0.0.1:9"  # stands for the dev chain until it is up: nothing listens on the discard port
UNKNOWN_S = 1800.0  # a claimed transaction that no RPC has heard of for so long, while all answered, does not exist
CHECK_FIRST_S, CHECK_LAST_S = 5.0, 300.0  # between looks at endpoints that were not right at start, and at all of them
TROUBLE_S = 60.0  # between looks while one does not answer
PATIENCE_S = 5.0  # for a balance, where one is known from before
DEVCHAIN_LOOK_S = 5.0
DEVCHAIN_IDLE_S = 900.0  # it ends so long after the last node that looked; its blocks stay
START_WAIT_S = 60.0
NAME_WAIT_S = 10.0  # for the dev chain's name: somebody waits for an answer to an HTTP request
NAME_PAUSE_S = 0.2
NAME_DIGITS = 16
EXTRA_ROWS = "networks.json"  # in the data directory: rows of the user's own


class ChainSettings(Protocol):
    """The part of the node's configuration that is read here."""

    @property
    def data_dir(self) -> Path: ...
    @property
    def profile(self) -> str: ...
    @property
    def chain_dir(self) -> Path: ...
    @property
    def chain_url(self) -> str: ...


class Secret(Protocol):
    """The node's identity, as far as the signer needs it."""

    def secret(self) -> bytes: ...


class Chain:
    """See the module. `connect` does the work until cancelled."""

    name = "chain"
    local: Any = Transfer | VerifyTransfer
    peer: Any = None

    def __init__(
        self, config: ChainSettings, key: Key, system: System, clock: Callable[[], float] = time.time, vouch: Vouch | None = None
    ) -> None:
        self.address, self._system, self._clock = key.address, system, clock
        self._dev_url = config.chain_url if config.profile == "local" else ""  # given, not ours to start
        self._dev_dir = config.chain_dir if config.profile == "local" and not self._dev_url else None
        self.networks: Networks = table.load(
            config.profile,
            dev_url=self._dev_url or UNSTARTED,
            simulated_by=f"dev chain at {self._dev_url}" if self._dev_url else SIMULATED,
            extra=config.data_dir / EXTRA_ROWS,
        )
        self._claims = Claims(config.data_dir / "chain.db")
        self._purses = Purses(config.data_dir / "chain.db")
        self.watch = Vigil(config.data_dir / "chain.db", clock)
        self._claimed, self._turns = trio.Event(), Turns()
        self._disk = OwnDisk("looking at payments to this node")
        self._unknown: dict[str, float] = {}  # claim -> since when all RPCs have answered that they know of no such thing
        self._up = trio.Event()
        self._rpcs: dict[str, Rpc] = {}
        self._engines: dict[str, Engine] = {}
        for row in self.networks:
            if row.chain not in self._rpcs:
                self._rpcs[row.chain] = rpc = Rpc(row)
                look = vouch or voucher(system, self.networks, row)
                self._engines[row.chain] = Engine(
                    row, rpc, key, config.data_dir / "chain.db", self._heard, vouch=look, told=partial(told, system)
                )
        if not self._dev_dir:
            self._up.set()

    # -- life

    async def connect(self) -> None:
        """Send and verify until cancelled."""
        async with trio.open_nursery() as nursery:
            if self._dev_dir:
                nursery.start_soon(self._keep_devchain, self._dev_dir)
            nursery.start_soon(self._verify_claims)
            nursery.start_soon(self._watch)
            for row in {row.chain: row for row in self.networks}.values():
                nursery.start_soon(self._check, row)
            for engine in self._engines.values():
                nursery.start_soon(engine.run)

    async def aclose(self) -> None:
        for rpc in self._rpcs.values():
            await rpc.pool.aclose()
        for engine in self._engines.values():
            engine.close()
        self._claims.close()
        self._purses.close()
        self.watch.close()

    async def _watch(self) -> None:
        await self._up.wait()
        await self.watch.run(self.networks, self._rpcs)

    async def _check(self, row: Network) -> None:
        """See at start whether each endpoint serves its network, and what we hold there; again until it is so. From then on
        now and then whether they answer, so that one that is gone is named before it is needed."""
        await self._up.wait()
        rpc, pause_s, is_held = self._rpcs[row.chain], CHECK_FIRST_S, False
        while True:
            before = rpc.pool.faults()
            is_right = await rpc.pool.check()
            for fault in set(rpc.pool.faults()) - set(before):
                log.error("%s: %s", row.name, fault.words)
            with suppress(RpcError, sqlite3.Error):
                if not is_held:
                    await self.balances(row.name)
                    is_held = True
            pause_s = min(pause_s * 2, CHECK_LAST_S)
            if is_right and is_held:
                pause_s = TROUBLE_S if rpc.pool.troubled() else CHECK_LAST_S
            await trio.sleep(pause_s)

    async def _keep_devchain(self, directory: Path) -> None:
        """Start the dev chain if nobody serves it; again whenever it is gone."""
        while True:
            try:
                url = await ensure_devchain(directory, "--idle-exit", f"{DEVCHAIN_IDLE_S:g}")
            except (DevChainError, OSError) as error:
                log.error("the dev chain does not run: %s", error)
            else:
                for row in self.networks:
                    if row.simulated_by and self._rpcs[row.chain].pool.repoint((url,)):
                        self._engines[row.chain].wake()
                self._up.set()
            await trio.sleep(DEVCHAIN_LOOK_S)

    # -- the port

    async def handle(self, message: Message, meta: Meta) -> Sequence[Send]:
        """Take a transfer or a claim, durably. What cannot be done at all is answered at once.

        Raises `Violation` for whoever is not the wallet, or not the ledger, of this node.
        """
        source = "wallet" if isinstance(message, Transfer) else "ledger"
        if meta.sender != address(self._system.node, source):
            raise Violation(f"a {type(message).__name__} from {meta.sender}, which is not the {source}")
        if isinstance(message, Transfer):
            try:
                await self._submit(message)
            except OrdersTaken as taken:
                batches = tuple(
                    KnownBatch(
                        batch.batch_id, tuple((payee, amount_text(from_wei(wei))) for payee, wei in batch.payees), batch.orders
                    )
                    for batch in taken.batches
                )
                return [Send("wallet", OrdersKnown(message.batch_id, batches))]
            except NotServed as error:  # it may be under way, known to the profile, row or key of the time that took it
                text = f"{_words(error)}: this payment waits until this node is started with that again"
                return [Send("wallet", TransferDelayed(message.batch_id, text))]
            except ValueError as error:
                return [Send("wallet", TransferFailed(message.batch_id, _words(error)))]
        elif isinstance(message, VerifyTransfer):
            try:
                self._claim(message)
            except (ValueError, NotServed) as error:
                return [Send("ledger", TransferRejected(message.claim_id, _words(error)))]
        return []

    async def _submit(self, transfer: Transfer) -> None:
        network = self.networks.by_platform(transfer.platform)
        if transfer.payer.lower() != self.address:
            raise NotServed(f"this node holds no key of {transfer.payer[:50]}")
        payees = tuple((payee, to_wei(amount(text))) for payee, text in transfer.payees)
        batch = TransferBatch(transfer.batch_id, payees, transfer.orders)
        await self._engines[network.chain].submit(batch)

    def _claim(self, claim: VerifyTransfer) -> None:
        self.networks.by_platform(claim.platform)
        c, now = claim, self._clock()
        amounts = to_wei(amount(c.amount)), to_wei(amount(c.already_claimed))
        self._claims.add(Claim(c.claim_id, c.platform, c.tx_hash, c.payer, c.payee, *amounts, now, c.not_before))
        self._claimed.set()

    async def _heard(self, news: TransferNews) -> None:
        """What an engine tells, to the wallet."""
        await self._system.post(self.name, [Send("wallet", news)])

    async def _verify_claims(self) -> None:
        """Look at one claim after the other; what comes meanwhile has its turn after the look that is under way."""
        while True:
            self._claimed = trio.Event()
            try:
                until = await self._verify_next()
            except (sqlite3.Error, OSError) as error:
                await self._disk.wait(error)
                continue
            self._disk.well()
            if until:
                with trio.move_on_at(until):
                    await self._claimed.wait()

    async def _verify_next(self) -> float:
        """Look at one claim; return 0, or until when there is none to look at."""
        # those that were taken under another profile wait until that is back
        claims = [claim for claim in self._claims.all() if claim.platform in self.networks.platforms]
        open_ids = {claim.claim_id for claim in claims}
        self._unknown = {claim_id: at for claim_id, at in self._unknown.items() if claim_id in open_ids}
        found = self._turns.next(claims, trio.current_time())
        if isinstance(found, Claim):
            await self._verify(found)
            return 0.0
        return found

    async def _verify(self, claim: Claim) -> None:
        network = self.networks.by_platform(claim.platform)
        found = await verify_transfer(
            self._rpcs[network.chain],
            network,
            claim.tx_hash,
            claim.payer,
            claim.payee,
            claim.amount_wei,
            claim.claimed_wei,
            claim.not_before,
        )
        answer: Message
        if isinstance(found, NotYet):
            age_s, now = self._clock() - claim.created, trio.current_time()
            # a night in which nobody asked, or an RPC was silent, says nothing
            since = self._unknown.setdefault(claim.claim_id, now) if found.unknown else self._unknown.pop(claim.claim_id, now)
            if not found.unknown or now - since < UNKNOWN_S:
                self._turns.rest(claim, now, network.poll_s, age_s)
                return
            answer = TransferRejected(claim.claim_id, found.reason)
        elif isinstance(found, Rejected):
            answer = TransferRejected(claim.claim_id, found.reason)
        else:
            self.watch.add(claim, found)
            answer = TransferVerified(claim.claim_id, claim.tx_hash)
        await self._system.post(self.name, [Send("ledger", answer)])
        self._claims.remove(claim.claim_id)
        self._unknown.pop(claim.claim_id, None)

    # -- for REST and command line; networks by name, NotServed for an unknown one

    @property
    def default_network(self) -> str:
        return self.networks.default

    def accounts(self) -> list[dict[str, Any]]:
        """Every platform of the profile, as the payment API lists accounts. Test stand-ins carry `simulatedBy`."""
        return [
            {
                "platform": row.platform,
                "address": self.address,
                "driver": DRIVER,
                "network": row.name,
                "token": row.symbol.lower(),
                "send": True,
                "receive": True,
            }
            | ({"simulatedBy": row.simulated_by} if row.simulated_by else {})
            for row in self.networks
        ]

    def release(self, network: str) -> bool:
        """Sign payments again after a restore: a person says that it is known what was paid. False if nothing was held."""
        return self._engines[self.networks.by_name(network).chain].resume()

    def batch_sizes(self) -> dict[str, int]:
        """Payees that one transaction takes, by platform."""
        return {row.platform: self._engines[row.chain].max_payees for row in self.networks}

    @property
    def dev_url(self) -> str | None:
        """Where the dev chain answers; None until it is up, and on real networks."""
        row = self._simulated()
        return self._rpcs[row.chain].pool.endpoints[0].url if row and self._up.is_set() else None

    async def local_chain(self) -> str | None:
        """The dev chain's name: the first 16 hex digits of its genesis hash. None on real networks. RpcError.

        Two dev chains have the same platforms, and money on one is nothing on the other: offers and demands name it.
        """
        row = self._simulated()
        if row is None:
            return None
        until = trio.current_time() + NAME_WAIT_S
        while True:  # asked each time: a chain that was gone for a while may be another one
            try:
                _, rpc = await self._reach(row.name, NAME_WAIT_S)
                return (await rpc.genesis_hash()).removeprefix("0x")[:NAME_DIGITS]
            except RpcError as error:
                if error.kind != "down" or trio.current_time() >= until:
                    raise
            await trio.sleep(NAME_PAUSE_S)

    def _simulated(self) -> Network | None:
        return next((row for row in self.networks if row.simulated_by), None)

    async def balances(self, network: str, address: str | None = None) -> token.Balances:
        """Coins and tokens of an address (default: this node's). RpcError."""
        row, rpc = await self._reach(network)
        found = await token.balances(rpc, row, address or self.address)
        if address in (None, self.address):
            with suppress(sqlite3.Error):  # it spares a look when no endpoint answers, and no more
                self._purses.note(row.chain, self.address, found, self._clock())
        return found

    async def held(self, network: str) -> Held:
        """What this node's account holds, or last held where no endpoint says so in time. RpcError when nobody knows."""
        row = self.networks.by_name(network)
        last = self._purses.last(row.chain, self.address)
        try:
            with trio.fail_after(PATIENCE_S if last else float("inf")):
                return Held(await self.balances(network), self._clock())
        except trio.TooSlowError:
            trouble = f"{network}: no endpoint answers within {PATIENCE_S:g} s"
        except RpcError as error:
            if error.kind in FAULTS or last is None:
                raise
            trouble = str(error)
        assert last is not None, "without a last balance nothing is too slow"
        balances, at = last
        age_s = max(self._clock() - at, 0.0)
        if age_s > MAX_AGE_S:
            raise RpcError(f"{trouble}; the last known balance is {age_s / 3600:.0f} hours old", "down")
        return Held(balances, at, trouble)

    async def head(self, network: str) -> Head:
        """The newest block. RpcError."""
        _, rpc = await self._reach(network)
        return await rpc.head()

    async def fund(self, network: str) -> token.Balances:
        """Get test coins and tokens; what the account holds then. RpcError says why not."""
        row, _ = await self._reach(network)
        found = await faucet.fund(self._engines[row.chain])
        with suppress(sqlite3.Error):
            self._purses.note(row.chain, self.address, found, self._clock())
        return found

    def problems(self, network: str) -> tuple[Problem, ...]:
        """Why payments wait on a network, what is wrong with its endpoints, and what was paid to this node and is lost; empty
        is healthy."""
        row = self.networks.by_name(network)
        return (*self._engines[row.chain].problems(), *self.watch.problems(row))

    def fault(self) -> str | None:
        """Say which network nothing can be paid on: no endpoint serves it as its row says, or our own disk is at fault. None is
        healthy."""
        for row in self.networks:
            endpoints = self._rpcs[row.chain].pool.endpoints
            if trouble := self._engines[row.chain].disk_trouble or self._disk.trouble or self.watch.disk.trouble:
                return trouble
            if all(endpoint.fault for endpoint in endpoints):
                return f"{row.name}: " + "; ".join(fault.words for fault in self._rpcs[row.chain].pool.faults())
        return None

    def death(self) -> str | None:
        """Say that no endpoint of the default network answers, since the start or for minutes. None is healthy."""
        pool = self._rpcs[self.networks.by_name(self.default_network).chain].pool
        silent = [f"{words} ({trouble})" for words, trouble in pool.silent()]
        return f"{self.default_network}: {'; '.join(silent)}" if 0 < len(silent) == len(pool.endpoints) else None

    def silence(self) -> str | None:
        """Say which endpoints do not answer. None is healthy."""
        if not self._up.is_set():
            return f"the dev chain is not up (yet): see devchain.log in {self._dev_dir}"
        silent = {f"{words} ({trouble})": None for rpc in self._rpcs.values() for words, trouble in rpc.pool.silent()}
        return "; ".join(silent) or None

    def story(self, platform: str, batch_id: str) -> dict[str, Any] | None:
        """What this node and the RPCs said of a batch; None when the chain port never had it. See `golem.chain.desk`."""
        return desk.story(self._engines[self.networks.by_platform(platform).chain], batch_id)

    def lost(self, platform: str) -> dict[str, str]:
        """Transactions, paid by this node or to it, whose blocks the chain has lost, and what is done about that."""
        row = self.networks.by_platform(platform)
        again = "its block is lost, and it is sent again, byte for byte"
        none = "its block is lost, and an empty transaction takes its nonce"
        ours = {tx.winner: none if tx.void else again for tx in self._engines[row.chain].store.open() if tx.reopened}
        return ours | {one.claim.tx_hash: self.watch.words(one, row) for one in self.watch.lost(platform)}

    def forget(self, payment_id: str) -> str | None:
        """A person knows that a payment to this node is lost: what that was, in words. None when none of this id is."""
        held = self.watch.forget(payment_id)
        if held is None:
            return None
        owed = f"{amount_text(from_wei(held.claim.amount_wei))} from {held.claim.payer}"
        return f"payment {payment_id} is not named any more: {owed} is lost, and its payer owes it to you"

    async def decide(self, platform: str, batch_id: str, paid_by: str | None, unseen: bool = False) -> str:
        """A person's word on a batch that the RPCs do not prove. ValueError, RpcError."""
        engine = self._engines[self.networks.by_platform(platform).chain]
        return await desk.decide(engine, batch_id, paid_by, unseen=unseen)

    def totals(self, platform: str) -> dict[str, Any]:
        """Reserved, outgoing and incoming sums of the ledger on one platform; see `golem.chain.totals`."""
        return totals(self._system.rows("ledger"), platform)

    async def _reach(self, network: str, patience_s: float = START_WAIT_S) -> tuple[Network, Rpc]:
        row = self.networks.by_name(network)
        rpc = self._rpcs[row.chain]
        if self._dev_url and row.simulated_by:
            await self._look_at(rpc)
        with trio.move_on_after(patience_s):
            await self._up.wait()
            return row, rpc
        raise RpcError(f"the dev chain is not up: see devchain.log in {self._dev_dir}", "down")

    async def _look_at(self, rpc: Rpc) -> None:
        """Raise an RpcError in plain words where the chain that this node was given does not answer."""
        try:
            await rpc.pool.call("eth_chainId")
        except RpcError as error:
            if error.kind != "down":
                raise
            hint = "does `golem chain run --host ...` run there?"
            raise RpcError(f"the dev chain at {self._dev_url} (--chain-url) does not answer; {hint} ({error})", "down") from None


def _words(error: Exception) -> str:
    return str(error).strip("'\"")


@asynccontextmanager
async def open_chain(config: ChainSettings, identity: Secret, system: System, vouch: Vouch | None = None) -> AsyncIterator[Chain]:
    """The chain port, added to `system`; its `connect` has to be run. ValueError for a bad profile or network file.

    `vouch`: the last look before a payment is signed, where it is not the one at the rows of `system`.
    """
    chain = Chain(config, Key(identity.secret()), system, vouch=vouch)
    system.add_port(chain)
    try:
        yield chain
    finally:
        with trio.CancelScope(shield=True):
            await chain.aclose()
