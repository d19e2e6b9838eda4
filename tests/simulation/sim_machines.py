"""What the simulated nodes do: machines whose rows tell, at the end, whether anything was lost, doubled or disordered.

The machines never correct what the kernel does wrong: they count it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from actors.kernel.machine import NOTHING, Emit, Meta, Reply, Rows, Send, Step, Wake
from protocol.codec import Decoder
from protocol.types import Message, PeerLost, Refused, Undelivered, node_of

FIRST_BALANCE = 1000
FOREVER_S = 1e6
RETRY_S = 30.0


# -- commands of an edge (each may be given again with the same id until it is answered)
class Pay(Message, frozen=True):
    id: str
    to: str  # node
    coins: int
    deadline_s: float
    memo_chars: int = 0


class Order(Message, frozen=True):
    id: str


class SetAlarm(Message, frozen=True):
    id: str
    after_s: float


class SetAlarms(Message, frozen=True):
    """Many at once, for one time."""

    id: str
    number: int
    after_s: float


class MoveAlarm(Message, frozen=True):
    id: str
    alarm: str
    after_s: float | None  # None takes it away


class SendBomb(Message, frozen=True):
    id: str
    to: str


class Enquire(Message, frozen=True):
    id: str
    to: str


# -- between nodes
class Coins(Message, frozen=True):
    id: str
    number: int  # of this sender's payments to this receiver
    coins: int
    memo: str = ""


class Receipt(Message, frozen=True):
    id: str


class Bomb(Message, frozen=True):
    id: str


class Query(Message, frozen=True):
    id: str
    attempt: int


class Answer(Message, frozen=True):
    id: str
    attempt: int
    disk: int


# -- inside a node
class Transfer(Message, frozen=True):
    nonce: int
    id: str


class Mined(Message, frozen=True):
    nonce: int
    id: str


class News(Message, frozen=True):
    number: int


class Ring(Message, frozen=True):
    id: str


class AskAgain(Message, frozen=True):
    id: str


class Done(Message, frozen=True):
    id: str


# -- rows
class Balance(Message, frozen=True):
    coins: int = FIRST_BALANCE


class Paid(Message, frozen=True):
    """A payment that left: what is known of its fate."""

    to: str
    coins: int
    number: int
    at: float
    deadline_s: float
    receipts: int = 0
    undelivered: int = 0


class Got(Message, frozen=True):
    sender: str
    coins: int
    times: int
    at: float
    receipt_undelivered: int = 0


class Last(Message, frozen=True):
    number: int
    disorders: int = 0


class Ordered(Message, frozen=True):
    nonce: int
    mined: int = 0
    undelivered: int = 0


class Bombed(Message, frozen=True):
    """A bomb that was thrown, and whether its fate was told."""

    to: str
    undelivered: int = 0


class Alarm(Message, frozen=True):
    at: float
    rung: int = 0
    early: int = 0
    taken_away: bool = False
    rung_at: float = 0.0


class Seen(Message, frozen=True):
    times: int
    disk: int = 0  # of the process that saw it


class Asked(Message, frozen=True):
    to: str
    attempt: int
    answered: bool = False


_undelivered: Decoder[Any] = Decoder(Coins | Receipt | Bomb | Query | Answer | Transfer)
replace = msgspec.structs.replace


class Bank:
    """Pays other banks, orders transfers from the chain port, sets alarms, throws bombs."""

    name = "bank"
    local = Pay | Order | SetAlarm | SetAlarms | MoveAlarm | SendBomb | Mined | News | Ring | Undelivered
    peer = Coins | Receipt | Bomb
    rows = Balance | Paid | Got | Last | Ordered | Bombed | Alarm | Seen

    def __init__(self, node_id: str, hit: Callable[[Message], None]) -> None:
        self.node_id, self.hit = node_id, hit  # `hit` may raise, as a bug would

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        """Dispatch on the kind of message."""
        if isinstance(message, Pay | Order | SetAlarm | SetAlarms | MoveAlarm | SendBomb):
            if f"did/{message.id}" in rows:
                return Step({}, [Reply(Refused("conflict", "done before"))])
            step = self.command(rows, message, meta)
            did: dict[str, Message | None] = {f"did/{message.id}": Seen(1)}
            return Step(step.rows | did, [*step.effects, Emit("jobs", Done(message.id)), Reply(Done(message.id))])
        return self.event(rows, message, meta)

    def command(self, rows: Rows, message: Any, meta: Meta) -> Step:
        match message:
            case Pay(id, to, coins, deadline_s, memo_chars):
                number = rows.get(f"to/{to}", Last(0)).number + 1
                left = rows.get("balance", Balance()).coins - coins
                paid = Paid(to, coins, number, meta.now, deadline_s)
                changed = {"balance": Balance(left), f"to/{to}": Last(number), f"out/{id}": paid}
                return Step(changed, [Send(f"{to}/bank", Coins(id, number, coins, "m" * memo_chars), deadline_s)])
            case Order(id):
                nonce = rows.get("nonce", Last(0)).number + 1
                changed = {"nonce": Last(nonce), f"order/{id}": Ordered(nonce)}
                return Step(changed, [Send("chain", Transfer(nonce, id), FOREVER_S)])
            case SetAlarm(id, after_s):
                at = meta.now + after_s
                return Step({f"alarm/{id}": Alarm(at)}, [Wake(id, at, Ring(id))])
            case SetAlarms(id, number, after_s):
                at, ids = meta.now + after_s, [f"{id}.{one}" for one in range(number)]
                return Step({f"alarm/{one}": Alarm(at) for one in ids}, [Wake(one, at, Ring(one)) for one in ids])
            case MoveAlarm(_, alarm, after_s):
                row = rows.get(f"alarm/{alarm}")
                if row is None or row.rung or row.taken_away:
                    return NOTHING
                if after_s is None:
                    return Step({f"alarm/{alarm}": replace(row, taken_away=True)}, [Wake(alarm, None)])
                at = meta.now + after_s
                return Step({f"alarm/{alarm}": replace(row, at=at)}, [Wake(alarm, at, Ring(alarm))])
            case SendBomb(id, to):
                return Step({f"bomb/{id}": Bombed(to)}, [Send(f"{to}/bank", Bomb(id), FOREVER_S)])
        return NOTHING

    def event(self, rows: Rows, message: Any, meta: Meta) -> Step:
        match message:
            case Coins():
                return self.coins(rows, message, node_of(meta.sender), meta.now)
            case Receipt(id):
                row = rows[f"out/{id}"]
                return Step({f"out/{id}": replace(row, receipts=row.receipts + 1)})
            case Bomb():
                self.hit(message)
            case Mined(nonce, id):
                row = rows[f"order/{id}"]
                assert row.nonce == nonce
                return Step({f"order/{id}": replace(row, mined=row.mined + 1)}, [Emit("jobs", message)])
            case News(number):
                last = rows.get("news", Last(0))
                seen = rows.get(f"news/{number:04}", Seen(0)).times + 1
                disorders = last.disorders + (number <= last.number)
                return Step({"news": Last(number, disorders), f"news/{number:04}": Seen(seen)})
            case Ring(id):
                self.hit(message)
                row = rows[f"alarm/{id}"]
                early = row.early + (meta.now < row.at)
                row = replace(row, rung=row.rung + 1, early=early, rung_at=meta.now)
                return Step({f"alarm/{id}": row}, [Emit("rings", message)])
            case Undelivered(_, body):
                return self.undelivered(rows, _undelivered(body))
        return NOTHING

    def coins(self, rows: Rows, message: Coins, sender: str, now: float) -> Step:
        key = f"in/{message.id}"
        before = rows.get(key)
        got = replace(before, times=before.times + 1) if before else Got(sender, message.coins, 1, now)
        last = rows.get(f"from/{sender}", Last(0))
        changed: dict[str, Message | None] = {
            key: got,
            f"from/{sender}": Last(message.number, last.disorders + (message.number <= last.number)),
            "balance": Balance(rows.get("balance", Balance()).coins + message.coins),
        }
        return Step(changed, [Send(f"{sender}/bank", Receipt(message.id), FOREVER_S), Emit("coins", replace(message, memo=""))])

    def undelivered(self, rows: Rows, message: Any) -> Step:
        if isinstance(message, Coins):
            row = rows[f"out/{message.id}"]
            return Step({f"out/{message.id}": replace(row, undelivered=row.undelivered + 1)})
        key = {Transfer: "order", Bomb: "bomb"}.get(type(message))
        if key is None:
            return NOTHING
        row = rows[f"{key}/{message.id}"]
        return Step({f"{key}/{message.id}": replace(row, undelivered=row.undelivered + 1)})


class Desk:
    """Asks until it is answered, and answers whoever asks: what must survive the loss of a whole disk."""

    name = "desk"
    local = Enquire | AskAgain | Undelivered | PeerLost
    peer = Query | Answer
    rows = Asked | Seen | Last

    def __init__(self, node_id: str, disk: int) -> None:
        self.node_id, self.disk = node_id, disk

    def handle(self, rows: Rows, message: Any, meta: Meta) -> Step:
        """Dispatch on the kind of message."""
        match message:
            case Enquire(id, to):
                if f"asked/{id}" in rows:
                    return Step({}, [Reply(Refused("conflict", "done before"))])
                step = self.ask(id, Asked(to, 1), meta)
                return Step(step.rows, [*step.effects, Reply(Done(id))])
            case AskAgain(id):
                row = rows[f"asked/{id}"]
                return NOTHING if row.answered else self.ask(id, replace(row, attempt=row.attempt + 1), meta)
            case Query(id, attempt):
                key = f"query/{id}/{attempt}"
                seen = rows.get(key, Seen(0)).times + 1
                reply = Send(f"{node_of(meta.sender)}/desk", Answer(id, attempt, self.disk), FOREVER_S)
                return Step({key: Seen(seen, self.disk)}, [reply])
            case PeerLost(to, first, last, here):
                told = rows.get(f"lost/{node_of(to)}/{here}", Last(0))
                return Step({f"lost/{node_of(to)}/{here}": Last(told.number + last + 1 - first)})
            case Answer(id, attempt, disk):
                key = f"answer/{id}/{attempt}/{disk}"
                changed: dict[str, Message | None] = {key: Seen(rows.get(key, Seen(0)).times + 1)}
                changed[f"asked/{id}"] = replace(rows[f"asked/{id}"], answered=True)
                return Step(changed, [Wake(id, None), Emit("answers", message)])
        return NOTHING

    def ask(self, id: str, row: Asked, meta: Meta) -> Step:
        query = Send(f"{row.to}/desk", Query(id, row.attempt), FOREVER_S)
        return Step({f"asked/{id}": row}, [query, Wake(id, meta.now + RETRY_S, AskAgain(id))])


class Chain:
    """A port to a world that outlives every node: the same nonce twice is the same transfer."""

    name = "chain"
    local = Transfer
    peer = type(None)

    def __init__(self, mine: Callable[[int, str], Awaitable[None]]) -> None:
        self.mine = mine

    async def handle(self, message: Transfer, meta: Meta) -> Sequence[Send]:
        """Bring a transfer to the chain, and say so."""
        await self.mine(message.nonce, message.id)
        return [Send("bank", Mined(message.nonce, message.id), FOREVER_S)]
