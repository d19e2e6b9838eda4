"""The observers of the simulation: they read the disks and the clients' notes, and say what must not be.

Conservation: what left one node arrived at another once, or its sender was told that nobody acknowledged it.

A check that lets something pass says why. Two things may be lost: what only the disk of the node that loses its disk knew
(`Host.disks` counts its disks; it gives no commands), and what a client was about to take when it died with its node.
One thing may come twice: what waited in an outbox when the disk was copied, once from each copy (`World.repeats`).
"""

from __future__ import annotations

import sqlite3
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sim_machines import (
    FIRST_BALANCE,
    FOREVER_S,
    Alarm,
    Answer,
    Asked,
    Balance,
    Bank,
    Bomb,
    Coins,
    Desk,
    Done,
    Got,
    Last,
    Mined,
    Ordered,
    Paid,
    Query,
    Ring,
    Seen,
    Transfer,
)

from actors.kernel.records import unsealed
from protocol.codec import Decoder

if TYPE_CHECKING:
    from sim_world import Host, World

_decode = {"bank": Decoder[Any](Bank.rows), "desk": Decoder[Any](Desk.rows)}
_poison: Decoder[Any] = Decoder(Bomb | Transfer)
_said: Decoder[Any] = Decoder(Answer | Query)
_event: Decoder[Any] = Decoder(Coins | Ring | Done | Mined)


def rows(db: sqlite3.Connection, actor: str, prefix: str = "") -> dict[str, Any]:
    """Return the rows on a disk without the kernel's help, keys without `prefix`."""
    query = "select key, body from row where actor=? and substr(key, 1, ?)=? order by key"
    if not db.execute("select 1 from sqlite_master where name='row'").fetchone():
        return {}  # a new disk, before its first start
    found = db.execute(query, (actor, len(prefix), prefix)).fetchall()
    return {key[len(prefix) :]: _decode[actor](unsealed(actor, key, body)) for key, body in found}


def unsettled(world: World) -> list[str]:
    """Return what is still under way."""
    waits = []
    for host in world.hosts.values():
        if host.system is None:
            waits.append(f"{host.name} is down")
            continue
        for link in host.db.execute("select actor, recipient, count(*) from outbox group by 1, 2"):
            waits.append(f"{host.name}: outbox {link}")
        if timers := host.db.execute("select count(*) from timer").fetchone()[0]:
            waits.append(f"{host.name}: {timers} timers")
        for _, actor, message in host.client.commands:
            if f"{actor}/{message.id}" not in host.client.promised:  # type: ignore[attr-defined]
                waits.append(f"{host.name}: {message}")
    return waits


def waiting_answers(db: sqlite3.Connection) -> list[str]:
    """Return the keys under which the answers that wait on a disk will be noted by who asked."""
    if not db.execute("select 1 from sqlite_master where name='outbox'").fetchone():
        return []
    stored = db.execute("select recipient, body from outbox where actor='desk'").fetchall()
    found = [_said(unsealed("desk", recipient, body)) for recipient, body in stored]
    return [f"answer/{one.id}/{one.attempt}/{one.disk}" for one in found if isinstance(one, Answer)]


def expect(truth: bool, *what: object) -> None:
    if not truth:
        from sim_world import Broken

        raise Broken(" ".join(str(one) for one in what))


def check(world: World, final: bool) -> None:
    """Look at all disks. What is under way is no fault before the end (`final`)."""
    for host in world.hosts.values():
        check_books(host)
        check_alarms(host, final)
        check_feeds(host, final)
        check_news(host, final)
        for id, seen in rows(host.db, "desk").items():
            expect(not isinstance(seen, Seen) or 1 <= seen.times <= 1 + world.repeats[id], host.name, "got", id, seen)
            expect(not (final and isinstance(seen, Asked)) or seen.answered, host.name, "has no answer to", id)
        for name in host.client.promised if final else ():
            check_promise(host, name)
    check_money(world, final)
    check_orders(world, final)
    check_quarantine(world, final)
    if final:
        check_lateness(world)
        check_answers(world)


def check_answers(world: World) -> None:
    """What a node's last disk says it answered has arrived; what it was asked, it knows, or the asker was told."""
    for name, host in world.hosts.items():
        queries = rows(host.db, "desk", "query/")
        for attempt, seen in queries.items():
            asker = world.hosts[attempt[0]]
            answers = rows(asker.db, "desk", "answer/")
            expect(f"{attempt}/{seen.disk}" in answers, asker.name, "lost", name, "answer to", attempt)
        for asker in world.hosts.values():
            asked = {id: one for id, one in rows(asker.db, "desk", "asked/").items() if one.to == name}
            attempts = {f"{id}/{attempt}" for id, one in asked.items() for attempt in range(1, one.attempt + 1)}
            unknown = len(attempts - set(queries))
            # `told` counts messages of the link, so it is never less than the questions among them
            told = rows(asker.db, "desk", f"lost/{name}/").get("False", Last(0)).number
            expect(unknown <= told, name, "forgot", unknown, "questions;", asker.name, "was told of", told)


def check_books(host: Host) -> None:
    """A step is on disk whole: the balance and the payments tell the same."""
    out, got = rows(host.db, "bank", "out/"), rows(host.db, "bank", "in/")
    balance = rows(host.db, "bank", "balance").get("", Balance())
    ought = FIRST_BALANCE - sum(p.coins for p in out.values()) + sum(g.coins * g.times for g in got.values())
    expect(balance.coins == ought, host.name, "has", balance, "and ought to have", ought)
    for sender, last in rows(host.db, "bank", "from/").items():
        expect(isinstance(last, Last) and last.disorders == 0, host.name, "got payments in disorder from", sender, last)


def check_money(world: World, final: bool) -> None:
    """Each payment arrives once or its sender is told."""
    books: dict[str, dict[str, Paid]] = {name: rows(host.db, "bank", "out/") for name, host in world.hosts.items()}
    arrivals: dict[str, dict[str, Got]] = {name: rows(host.db, "bank", "in/") for name, host in world.hosts.items()}
    for name, got in arrivals.items():
        for id, one in got.items():
            expect(one.times == 1, name, "got", id, one)
            expect(id in books[one.sender], name, "got", id, "which", one.sender, "never paid")
    for name, paid in books.items():
        for id, p in paid.items():
            arrived = id in arrivals.get(p.to, {})
            expect(p.receipts <= 1 and p.undelivered <= 1, name, id, p)
            # before its deadline nothing is given up; behind it, what arrived may be, since its sender could not know
            may_be_late = p.deadline_s < FOREVER_S
            expect(p.undelivered <= may_be_late, name, "was told too early that", id, "is lost", p)
            expect(p.receipts == 0 or arrived, name, "has a receipt for", id, "which did not arrive")
            if final:
                expect(arrived or p.undelivered == 1, name, "lost", id, p)
                expect(p.receipts == arrived, name, "lost the receipt of", id, p)


def check_orders(world: World, final: bool) -> None:
    for name, host in world.hosts.items():
        for id, order in rows(host.db, "bank", "order/").items():
            assert isinstance(order, Ordered)
            on_chain = world.chain.get((name, order.nonce)) == id
            expect(order.mined <= on_chain, name, "heard of", id, order, "on chain:", on_chain)
            poison = "poison" in id
            expect(order.undelivered <= poison, name, "was told that", id, "is lost", order)
            expect(not final or (order.mined, order.undelivered) == (not poison, poison), name, "lost", id, order)


def check_quarantine(world: World, final: bool) -> None:
    """Nothing is set aside but what crashed its actor again and again, and whoever sent it is told."""
    attempts, thrown = world.attempts, set[str]()
    for name, host in world.hosts.items():
        for actor, sender, body in host.db.execute("select actor, sender, body from quarantine").fetchall():
            thrown.add(id := _poison(body).id)
            expect("bomb" in id or "poison" in id, name, actor, "set aside", id, "of", sender)
            expect(attempts[id] >= 3, name, actor, "set aside", id, "after", attempts[id], "attempts")
        for id, bomb in rows(host.db, "bank", "bomb/").items():
            expect(bomb.undelivered <= 1, name, "was told twice of", id)
            expect(not final or bomb.undelivered == 1, name, "was not told of", id)
            world.reached["told"] += bomb.undelivered
    for host in world.hosts.values() if final else ():
        for id in (*rows(host.db, "bank", "bomb/"), *(id for id in rows(host.db, "bank", "order/") if "poison" in id)):
            expect(id in thrown, id, "of", host.name, "is in nobody's quarantine")


def check_alarms(host: Host, final: bool) -> None:
    for id, alarm in rows(host.db, "bank", "alarm/").items():
        assert isinstance(alarm, Alarm)
        expect(alarm.early == 0, host.name, id, "rang early", alarm)
        expect(alarm.rung <= (not alarm.taken_away), host.name, id, "rang too often", alarm)
        expect(not final or alarm.rung == (not alarm.taken_away), host.name, id, "did not ring", alarm)


def check_lateness(world: World) -> None:
    """In the calm phase timers ring and messages arrive on time."""
    for name, host in world.hosts.items():
        for id, alarm in rows(host.db, "bank", "alarm/").items():
            if alarm.rung:  # `check_alarms` finds those that did not
                world.on_time(alarm.at, name, id, now=alarm.rung_at)
        for id, paid in rows(host.db, "bank", "out/").items():
            got = rows(world.hosts[paid.to].db, "bank", f"in/{id}").get("") if paid.to in world.hosts else None
            if got:  # `check_money` finds what did not come
                world.on_time(paid.at, name, id, now=got.at)


def check_news(host: Host, final: bool) -> None:
    got = {int(key): seen.times for key, seen in rows(host.db, "bank", "news/").items()}
    expect(all(times == 1 for times in got.values()), host.name, "got news twice:", got)
    last = rows(host.db, "bank", "news").get("", Last(0))
    expect(last.disorders == 0, host.name, "got news in disorder", last)
    if final and host.disks == 1:  # news are posted to this node by itself: another disk never had them
        expect(set(got) >= host.client.news_promised, host.name, "lost news", got, host.client.news_promised)


def check_feeds(host: Host, final: bool) -> None:
    """Readers by cursor saw each event once and in order; what was taken was taken once."""
    if host.disks > 1:
        return  # the readers outlive the disk, and numbers begin again on another one; the other nodes' feeds are looked at
    for feed, seen in host.client.read.items():
        expect([e[0] for e in seen] == list(range(1, len(seen) + 1)), host.name, feed, "numbers", seen)
        expect(all(a[1] < b[1] for a, b in pairwise(seen)), host.name, feed, "times", seen)
        ids = [_event(body).id for _, _, body in seen]
        if feed == "coins":
            happened = {id: got.times for id, got in rows(host.db, "bank", "in/").items()}
        else:
            happened = {id: alarm.rung for id, alarm in rows(host.db, "bank", "alarm/").items() if alarm.rung}
        expect(len(set(ids)) == len(ids) and set(ids) <= set(happened), host.name, feed, ids, happened)
        expect(not final or len(ids) == len(happened), host.name, feed, "lost events", ids, happened)
    taken = [str(_event(body)) for body in host.client.taken]
    expect(len(set(taken)) == len(taken), host.name, "handed out twice", taken)
    if final:
        happened_jobs = rows(host.db, "bank", "did/")
        mined = sum(order.mined for order in rows(host.db, "bank", "order/").values())
        missing = len(happened_jobs) + mined - len(taken)
        expect(0 <= missing <= 2 * host.client.unsure_takes, host.name, "lost", missing, "jobs")


def check_promise(host: Host, name: str) -> None:
    """What an edge was told happened is on disk."""
    actor, _, id = name.partition("/")
    prefix = "did/" if actor == "bank" else "asked/"
    expect(id in rows(host.db, actor, prefix), host.name, "promised", name, "and forgot it")
