"""What became of a nonce: concluded from what the RPCs of a pool show, each asked by itself.

An RPC may lag, prune, be balanced over several nodes, sit on a fork or be a liar, so what it does not know proves nothing.
A payment is sent anew only when all of this holds:

  the transaction that took its nonce was shown in a block body, signed by our key and not paying the same thing;
  every RPC of the pool answers, stands `repeat_depth` blocks above that block, and has the same block there;
  no RPC shows ours in a block, in whatever form, and none has a Transfer of the token to the payee that nobody accounts for.

Everything else is `Unclear`, with what each RPC said: it waits, for the RPCs to agree or for a person to decide.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import trio

from golem.chain.bodies import HASH_CHARS, BodyTx, read_body
from golem.chain.contracts import TRANSFER_TOPIC
from golem.chain.networks import Network
from golem.chain.pool import Endpoint, Kind
from golem.chain.rpc import NONSENSE, Head, Receipt, Rpc, RpcError
from golem.chain.signer import address_bytes

T = TypeVar("T")
SCAN_BLOCKS = 64  # bodies looked through in one step, where an RPC does not know the account's past counts
LOG_BLOCKS = 1000  # asked for in one request: what most public RPCs allow
LEAST_LOG_BLOCKS = 5  # in one request: an RPC that refuses these as well refuses for another reason
MAX_LOG_REQUESTS = 500
TOLD = 5  # transactions named of many
MAX_LOG_BLOCKS = 200_000  # a payment that waited longer than this is left to a person


class Story(NamedTuple):
    """What one RPC says."""

    teller: str
    text: str


class Unclear(Exception):
    """The RPCs do not prove what became of a payment. `contradiction`: two of them cannot both be right."""

    def __init__(self, stories: Sequence[Story], *, contradiction: bool = False) -> None:
        super().__init__("; ".join(f"{story.teller}: {story.text}" for story in stories))
        self.stories, self.contradiction = tuple(stories), contradiction


class Witness:
    """One RPC of the pool, asked by itself. RpcError where it does not answer."""

    def __init__(self, rpc: Rpc, endpoint: Endpoint, name: str) -> None:
        self._rpc, self.endpoint, self.name = rpc, endpoint, name

    async def ask(self, question: Callable[[], Awaitable[T]]) -> T:
        with self._rpc.pool.pinned(self.endpoint):
            try:
                return await question()
            except NONSENSE as error:
                words = f"{type(error).__name__}: {str(error)[:120]}"
                raise RpcError(f"{self.name}: a senseless answer ({words})", "down") from error

    async def count(self, address: str, block: int | str = "latest") -> int:
        return await self.ask(lambda: self._rpc.transaction_count(address, block))

    async def block_hash(self, number: int) -> str | None:
        return await self.ask(lambda: self._rpc.block_hash(number))

    async def block(self, number: int) -> tuple[str, int] | None:
        return await self.ask(lambda: self._rpc.block(number))

    async def receipt(self, tx_hash: str) -> Receipt | None:
        return await self.ask(lambda: self._rpc.receipt(tx_hash))

    async def knows(self, tx_hash: str) -> bool:
        return await self.ask(lambda: self._rpc.knows(tx_hash))

    async def body(self, number: int) -> tuple[str, list[BodyTx]] | None:
        """Hash and transactions of the canonical block `number`; None when it has none."""
        block = await self.ask(lambda: self._rpc.pool.call("eth_getBlockByNumber", [hex(number), True]))
        try:
            return None if block is None else read_body(block)
        except NONSENSE as error:
            raise RpcError(f"{self.name}: block {number} is no block", "down") from error

    async def transfers(self, network: Network, payer: str, payees: Collection[str], first: int, last: int) -> dict[str, int]:
        """Hashes of the transactions that moved tokens from payer to one of the payees, and their blocks."""
        found: dict[str, int] = {}
        words = ["0x" + address_bytes(each).rjust(32, b"\0").hex() for each in (payer, *payees)]
        wanted = {"address": network.token, "topics": [TRANSFER_TOPIC, words[0], words[1:]]}
        start, span, requests = first, self.endpoint.log_span or LOG_BLOCKS, 0
        while start <= last:
            end = min(start + span - 1, last)
            requests += 1
            if requests > MAX_LOG_REQUESTS:
                raise RpcError(f"{self.name}: {last - first + 1} blocks of logs take more than {MAX_LOG_REQUESTS} requests")
            try:
                logs = await self._logs({**wanted, "fromBlock": hex(start), "toBlock": hex(end)})
            except RpcError as error:
                span = min(span, end - start + 1) // 2
                if error.kind != "answer" or span < LEAST_LOG_BLOCKS:
                    raise
                continue  # providers take few blocks at once, and call that by all sorts of names
            if span < LOG_BLOCKS:
                self.endpoint.log_span = span
            try:
                found |= {str(log["transactionHash"]).lower()[:HASH_CHARS]: int(log["blockNumber"], 16) for log in logs}
            except NONSENSE as error:
                raise RpcError(f"{self.name}: its logs are none", "down") from error
            start = end + 1
        return found

    async def _logs(self, wanted: dict[str, Any]) -> Any:
        return await self.ask(lambda: self._rpc.pool.call("eth_getLogs", [wanted]))


@dataclass(frozen=True, slots=True)
class View:
    """Where an RPC stands: its newest block, and the account's next nonce there."""

    witness: Witness
    head: Head
    count: int

    @property
    def name(self) -> str:
        return self.witness.name


class Shown(NamedTuple):
    """A receipt, and who shows it."""

    view: View
    receipt: Receipt


class Use(NamedTuple):
    """The transaction that took a nonce, in a block, and who shows it."""

    view: View
    block: int
    block_hash: str
    tx: BodyTx


class Payment(NamedTuple):
    """What has to be known of a transaction to find it. `since`: no block before it can hold it."""

    nonce: int
    recipient: str
    data: bytes
    payees: tuple[str, ...]
    hashes: tuple[str, ...]
    since: int


class Evidence:
    """Asks the RPCs of one pool about one account. `ours` tells whether a transaction is one that was made here."""

    def __init__(self, rpc: Rpc, network: Network, address: str, ours: Callable[[str], bool]) -> None:
        self._rpc, self._network, self._address, self._ours = rpc, network, address, ours
        self._places: dict[tuple[str, int], int] = {}  # RPC and nonce -> block in which it says the nonce was used
        self._scanned: dict[tuple[str, int], int] = {}  # RPC and nonce -> last block looked through

    def witnesses(self) -> list[Witness]:
        """Every RPC of the pool, by host; those on one host with a number."""
        endpoints = self._rpc.pool.endpoints
        hosts = [endpoint.host for endpoint in endpoints]
        names = [host if hosts.count(host) == 1 else f"{host} #{i + 1}" for i, host in enumerate(hosts)]
        return [Witness(self._rpc, endpoint, name) for endpoint, name in zip(endpoints, names, strict=True)]

    async def each(
        self, witnesses: Sequence[Witness], question: Callable[[Witness], Awaitable[T]]
    ) -> tuple[list[tuple[Witness, T]], list[tuple[Witness, RpcError]]]:
        """Ask all at once: answers and silences, in the pool's order."""
        answers: dict[str, T] = {}
        silent: dict[str, RpcError] = {}

        async def ask(witness: Witness) -> None:
            try:
                answers[witness.name] = await question(witness)
            except RpcError as error:
                silent[witness.name] = error

        async with trio.open_nursery() as nursery:
            for witness in witnesses:
                nursery.start_soon(ask, witness)
        return (
            [(each, answers[each.name]) for each in witnesses if each.name in answers],
            [(each, silent[each.name]) for each in witnesses if each.name in silent],
        )

    async def views(self) -> list[View]:
        """Where the RPCs of our chain stand, the first of the pool first. RpcError when none answers.

        One that failed a moment ago is left to rest, unless all of them are.
        """
        now = trio.current_time()
        served = [each for each in self.witnesses() if not each.endpoint.stranger]
        asked = [each for each in served if each.endpoint.rests_until <= now] or served
        answers, silent = await self.each(asked, self._view)
        if not answers:
            raise silence(self._network, silent)
        return [view for _, view in answers]

    async def _view(self, witness: Witness) -> View:
        head = await witness.ask(self._rpc.head)
        return View(witness, head, await witness.count(self._address))

    async def _our_view(self, witness: Witness) -> View:
        if witness.endpoint.stranger:
            raise RpcError("it serves another chain of the same id", "chain_id")
        if not witness.endpoint.genesis:
            raise RpcError("it has not shown yet which chain it serves", "down")
        return await self._view(witness)

    async def receipts(self, views: Sequence[View], hashes: Sequence[str]) -> list[Shown]:
        """Who shows a receipt of one of these transactions. Silence is no answer here."""

        async def look(view: View) -> Receipt | None:
            for tx_hash in hashes:
                if (receipt := await view.witness.receipt(tx_hash)) is not None:
                    return receipt
            return None

        by_name = {view.name: view for view in views}
        answers, _ = await self.each([view.witness for view in views], lambda each: look(by_name[each.name]))
        return [Shown(by_name[witness.name], receipt) for witness, receipt in answers if receipt is not None]

    async def final(self, shown: Sequence[Shown]) -> list[tuple[Shown, int]]:
        """The receipts that are deep enough, in a block that their RPC still has, and that block's time. Unclear when none
        of those who show one says whether it has the block."""
        found: list[tuple[Shown, int]] = []
        mute: list[Story] = []
        for each in shown:
            view, receipt = each
            if view.head.number - receipt.block < self._network.depth:
                continue
            try:
                block = await view.witness.block(receipt.block)
                if block is not None and block[0] == receipt.block_hash:
                    found.append((each, block[1]))
            except RpcError as error:
                mute.append(Story(view.name, f"shows {receipt.hash} in block {receipt.block}, and not that block: {error}"))
        if mute and len(mute) == len(shown):
            raise Unclear(mute)
        return found  # of the others receipts lag behind the chain: look again at the next step

    async def used(self, views: Sequence[View], nonce: int) -> bool:
        """Does an RPC say that a nonce was used, `depth` blocks ago? RpcError when none can say."""
        deep = {view.name: view.head.number - self._network.depth for view in views}
        asked = [view.witness for view in views if deep[view.name] >= 0]
        answers, silent = await self.each(asked, lambda witness: witness.count(self._address, deep[witness.name]))
        if silent and not answers:
            raise silence(self._network, silent)
        return any(count > nonce for _, count in answers)

    async def moved(self, payment: Payment) -> list[Story]:
        """Which RPCs show that one of a payment's own transactions moved tokens to its payees."""
        views = await self.views()
        last = min(newest(views).number, payment.since + MAX_LOG_BLOCKS)

        async def look(witness: Witness) -> dict[str, int]:
            return await witness.transfers(self._network, self._address, payment.payees, payment.since, last)

        answers, _ = await self.each([view.witness for view in views], look)
        return [
            Story(witness.name, f"shows that {tx_hash} in block {found[tx_hash]} moved tokens to the payee")
            for witness, found in answers for tx_hash in payment.hashes if tx_hash in found
        ]  # fmt: skip

    # -- conclusions

    async def user(self, payment: Payment) -> Use:
        """What took the nonce of a payment: ours, or a transaction that proves that ours never will be mined; unless its block
        `is_young`. Unclear."""
        answers, silent = await self.each(self.witnesses(), self._our_view)
        views = [view for _, view in answers]
        stories = [Story(witness.name, f"does not say: {error}") for witness, error in silent]
        uses: list[Use] = []
        for view in views:
            found = await self._use(view, payment)
            if isinstance(found, Use):
                uses.append(found)
                stories.append(Story(view.name, f"block {found.block} holds {found.tx.hash} with nonce {payment.nonce}"))
            else:
                stories.append(Story(view.name, found))
        mine = [use for use in uses if use.tx.hash in payment.hashes or use.tx.pays(payment.recipient, payment.data)]
        if len({use.tx.hash for use in uses}) > 1:
            raise Unclear(stories, contradiction=True)
        if mine:
            return mine[0]
        if not uses or not uses[0].tx.proven:
            raise Unclear(stories)
        if self.is_young(uses[0].block, newest(views)):
            return uses[0]
        await self.unpaid(payment, uses[0].block, uses[0].block_hash)
        return uses[0]

    def is_young(self, block: int, head: Head) -> bool:
        """May the chain yet lose this block, as far as paying anew is concerned?"""
        return head.number - block < max(self._network.depth, self._network.repeat_depth)

    async def unpaid(self, payment: Payment, block: int, block_hash: str) -> None:
        """All RPCs have this block, deep enough, and none knows of money that reached the payees. Unclear otherwise."""
        stories: list[Story] = []
        contradiction = False

        async def look(witness: Witness) -> tuple[View, str | None, dict[str, int]]:
            view = await self._our_view(witness)
            first = min(payment.since, block)
            if view.head.number - first > MAX_LOG_BLOCKS:
                raise RpcError(f"more than {MAX_LOG_BLOCKS} blocks have to be looked through")
            moved = await witness.transfers(self._network, self._address, payment.payees, first, view.head.number)
            return view, await witness.block_hash(block), moved

        answers, silent = await self.each(self.witnesses(), look)
        stories += [Story(witness.name, f"does not say: {error}") for witness, error in silent]
        for witness, (view, seen, moved) in answers:
            strange = [tx_hash for tx_hash in moved if tx_hash in payment.hashes or not self._ours(tx_hash)]
            if self.is_young(block, view.head) or seen is None:
                stories.append(Story(witness.name, f"stands at block {view.head.number} only"))
            elif seen != block_hash:
                contradiction = True
                stories.append(Story(witness.name, f"has another block {block}: {seen}, not {block_hash}"))
            if strange:
                contradiction = True
                said = ", ".join(f"{tx_hash} in block {moved[tx_hash]}" for tx_hash in strange[:TOLD])
                said += f" and {len(strange) - TOLD} more" if len(strange) > TOLD else ""
                stories.append(Story(witness.name, f"{said} moved tokens to the payee"))
        if stories:
            raise Unclear([Story("the pool", f"nonce {payment.nonce} was used in block {block}"), *stories],
                          contradiction=contradiction)  # fmt: skip

    async def agreed(self, block: int, block_hash: str) -> None:
        """No RPC has another block there. Silent ones and those that are behind do not object. Unclear otherwise."""
        served = [each for each in self.witnesses() if not each.endpoint.stranger]
        answers, _ = await self.each(served, lambda witness: witness.block_hash(block))
        hashes = {seen for _, seen in answers if seen is not None}
        if hashes - {block_hash}:
            stories = [Story(witness.name, f"block {block} is {seen}") for witness, seen in answers]
            raise Unclear(stories, contradiction=True)

    async def one_chain(self, views: Sequence[View]) -> None:
        """All RPCs have the same final block. Unclear otherwise."""
        height = min(view.head.number for view in views) - self._network.depth
        if len(views) < 2 or height < 0:
            return
        answers, _ = await self.each([view.witness for view in views], lambda witness: witness.block_hash(height))
        if len({seen for _, seen in answers if seen is not None}) > 1:
            raise Unclear([Story(each.name, f"block {height} is {seen}") for each, seen in answers], contradiction=True)

    # -- where a nonce was used

    async def _use(self, view: View, payment: Payment) -> Use | str:
        """The transaction with our address and nonce in a block body of this RPC, or what it says instead."""
        if view.count <= payment.nonce:
            return f"nonce {payment.nonce} is not used"
        key = (view.name, payment.nonce)
        try:
            number = await self._place(view, payment, key)
            if number is None:
                return f"nonce {payment.nonce} is used, its blocks since {payment.since} do not show by what"
            use = await self._in_body(view, number, payment.nonce)
        except RpcError as error:
            return f"nonce {payment.nonce} is used, and it does not show by what ({error})"
        if use is None:
            self._places.pop(key, None)
            return f"nonce {payment.nonce} is used since block {number}, which does not show by what"
        self._places[key] = number
        return use

    async def _in_body(self, view: View, number: int, nonce: int) -> Use | None:
        body = await view.witness.body(number)
        if body is None:
            return None
        block_hash, txs = body
        for tx in txs:
            if tx.sender == self._address and tx.nonce == nonce:
                return Use(view, number, block_hash, tx)
        return None

    async def _place(self, view: View, payment: Payment, key: tuple[str, int]) -> int | None:
        """The block in which this RPC says that the nonce was used: by bisection over the account's counts, or through
        one body after the other where it has forgotten those."""
        if (known := self._places.get(key)) is not None:
            return known
        try:
            return await self._bisect(view, payment.nonce, max(0, payment.since - 1))
        except RpcError as error:
            if error.kind != "answer":
                raise
        start = self._scanned.get(key, payment.since - 1) + 1
        for number in range(start, min(start + SCAN_BLOCKS, view.head.number + 1)):
            if await self._in_body(view, number, payment.nonce):
                return number
            self._scanned[key] = number
        self._scanned.setdefault(key, start - 1)
        return None

    async def _bisect(self, view: View, nonce: int, likely: int) -> int:
        low, high = 0, view.head.number  # the count is over `nonce` at `high`, and not at `low`
        if likely < high:
            if await view.witness.count(self._address, likely) > nonce:
                high = likely
            else:
                low = likely
        while high - low > 1:
            middle = (low + high) // 2
            if await view.witness.count(self._address, middle) > nonce:
                high = middle
            else:
                low = middle
        return high


def newest(views: Sequence[View]) -> Head:
    """The head of the RPC that is furthest."""
    return max((view.head for view in views), key=lambda head: head.number)


def silence(network: Network, silent: Sequence[tuple[Witness, RpcError]]) -> RpcError:
    """The error that stands for those of all RPCs."""
    reasons = "; ".join(str(error) for _, error in silent) or "no RPC serves this chain"
    kind: Kind = next((error.kind for _, error in silent if error.kind not in ("down", "answer")), "down")
    return RpcError(f"{network.name}: {reasons}"[:500], kind)
