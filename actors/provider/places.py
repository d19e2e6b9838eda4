"""Who may take a provider's places: nobody more than half while others ask, nor one again at once that he left unused.

An agreement takes a place from its approval on, whether anything runs or not. Agreements that came to nothing (never
committed, or idle to the limit without a single activity) make their requestor wait, twice as long each time. The first
is free, for honest agents hold agreements in reserve, too; an activity wipes the slate.
"""

from __future__ import annotations

from actors.provider.rows import ProviderAgreementRow, RejectedRow, UnusedRow
from actors.provider.rules import TurnedDown
from actors.provider.turn import DAY_S, Turn

ASKING_S = 300.0  # who was turned away counts as waiting for this long
HELD_S = 5.0  # a place taken for less is no matter
FIRST_WAIT_S, LAST_WAIT_S = 90.0, DAY_S


def judge(turn: Turn, requestor: str) -> TurnedDown | None:
    """Return why this requestor gets no (further) place now, if it does not."""
    unused: UnusedRow | None = turn.get(f"agent/unused/{requestor}")
    if unused is not None and turn.now < unused.until:
        said = f"{unused.count} agreements of yours were left unused"
        return TurnedDown(f"{said}; the next is possible in {unused.until - turn.now:.0f} s.", False)
    share = max(1, turn.config.terms.max_agreements // 2)
    if _places_of(turn, requestor) >= share and _others_ask(turn, requestor):
        return TurnedDown(f"No capacity available: others ask, and one requestor gets {share} places then.", False, full=True)
    return None


def _places_of(turn: Turn, requestor: str) -> int:
    rows = (turn.agreement(key.removeprefix("active/")) for key, _ in turn.prefix("active/"))
    return sum(row is not None and row.requestor == requestor for row in rows)


def _others_ask(turn: Turn, requestor: str) -> bool:
    rows: list[RejectedRow] = [row for _, row in turn.prefix("rejected/")]
    return any(row.issuer != requestor and (row.waits or turn.now - row.at < ASKING_S) for row in rows)


def unused(turn: Turn, row: ProviderAgreementRow) -> None:
    """An agreement took a place for nothing."""
    if row.activities or turn.now - row.at < HELD_S:
        return
    key = f"agent/unused/{row.requestor}"
    before: UnusedRow | None = turn.get(key)
    count = 1 if before is None or turn.now - before.until > DAY_S else before.count + 1
    wait_s = 0.0 if count == 1 else min(LAST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(count - 2, 30))
    turn.put(key, UnusedRow(count, turn.now + wait_s))


def used(turn: Turn, row: ProviderAgreementRow) -> None:
    """The requestor works here."""
    if turn.get(f"agent/unused/{row.requestor}") is not None:
        turn.put(f"agent/unused/{row.requestor}", None)
