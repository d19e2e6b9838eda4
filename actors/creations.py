"""Creations that agents may repeat: who sends a key of its own twice makes one thing and gets one answer.

What is to be made is decided before it is made: the row of a key holds the seed of all ids and the time. So whoever repeats a
request whose answer never came, over a crash as well, makes the same thing, and the machines know it by its id. Each agent
has room for `MAX_KEYS`; the oldest go first. Neighbour: `golem/rest/repeatable.py`.

Rows: `key/<owner>/<key>`, `by/<owner>/<time>/<key>` (index), `owner/<owner>` (count).
"""

from __future__ import annotations

from msgspec.structs import replace

from actors.kernel.draft import Declined, Draft
from actors.kernel.grammar import EDGE, ITSELF, On, Table, TableMachine
from protocol.creations import BeginCreation, Creation, CreationExpired, EndCreation
from protocol.types import Done, Message

KEEP_S = 24 * 3600.0
MAX_KEYS = 4096  # of one agent
MAX_ANSWER_BYTES = 8192  # a longer one is made again of what was created


class CreationRow(Message, frozen=True):
    """A key, what it was used for, and the answer once there is one."""

    digest: str
    seed: str
    at: float
    status: int = 0
    answer: bytes = b""


class CreationAgeRow(Message, frozen=True):
    """Index: the keys of an agent by their age."""


class CreatorRow(Message, frozen=True):
    """How many keys of an agent are kept."""

    keys: int


def _begin(draft: Draft, message: BeginCreation) -> None:
    name = f"key/{message.owner}/{message.key}"
    row = draft.row(CreationRow, name)
    if row is None:
        _make_room(draft, message.owner)
        row = CreationRow(message.digest, message.seed, draft.now)
        draft.put(name, row)
        draft.put(_index(message.owner, message.key, row), CreationAgeRow())
        _count(draft, message.owner, +1)
        draft.wake(f"{message.owner}/{message.key}", draft.now + KEEP_S, CreationExpired(message.owner, message.key))
    elif row.digest != message.digest:
        raise Declined("conflict", "this Idempotency-Key was used for another request; a new request takes a new key")
    draft.reply(Creation(row.seed, row.at, row.status, row.answer))


def _end(draft: Draft, message: EndCreation) -> None:
    name = f"key/{message.owner}/{message.key}"
    row = draft.row(CreationRow, name)
    if row is not None and message.status == 0:
        _forget(draft, message.owner, message.key, row)
    elif row is not None and len(message.answer) <= MAX_ANSWER_BYTES:
        draft.put(name, replace(row, status=message.status, answer=message.answer))
    draft.reply(Done())


def _expired(draft: Draft, message: CreationExpired) -> None:
    row = draft.row(CreationRow, f"key/{message.owner}/{message.key}")
    if row is not None:
        _forget(draft, message.owner, message.key, row)


def _make_room(draft: Draft, owner: str) -> None:
    count = draft.row(CreatorRow, f"owner/{owner}")
    if count is None or count.keys < MAX_KEYS:
        return
    oldest = next(draft.prefix(f"by/{owner}/"))[0].rpartition("/")[2]
    row = draft.row(CreationRow, f"key/{owner}/{oldest}")
    assert row is not None, "a key in the index has a row"
    _forget(draft, owner, oldest, row)


def _forget(draft: Draft, owner: str, key: str, row: CreationRow) -> None:
    draft.put(f"key/{owner}/{key}", None)
    draft.put(_index(owner, key, row), None)
    draft.wake(f"{owner}/{key}", None)
    _count(draft, owner, -1)


def _index(owner: str, key: str, row: CreationRow) -> str:
    return f"by/{owner}/{row.at:017.6f}/{key}"


def _count(draft: Draft, owner: str, change: int) -> None:
    count = draft.row(CreatorRow, f"owner/{owner}") or CreatorRow(0)
    draft.put(f"owner/{owner}", CreatorRow(count.keys + change) if count.keys + change else None)


class Creations(TableMachine):
    """The machine `creations`."""

    name = "creations"
    rows = CreationRow | CreationAgeRow | CreatorRow
    table = Table(
        On(BeginCreation, EDGE, _begin),
        On(EndCreation, EDGE, _end),
        On(CreationExpired, ITSELF, _expired),
    )
