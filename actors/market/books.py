"""The market's books: how much there is, of a node and in all, and what was not kept, and why."""

from __future__ import annotations

from msgspec.structs import replace

from actors.kernel.draft import Draft
from actors.market.rows import OfferRefusal, OwnerRow, StatsRow

MAX_REFUSALS, MAX_REASON_CHARS = 32, 300  # remembered for explanations


def count(draft: Draft, node: str, offers: int = 0, asked: int = 0) -> None:
    """Keep the books of how much there is, of a node and in all."""
    owner, stats = draft.get(f"owner/{node}") or OwnerRow(), stats_of(draft)
    owner = OwnerRow(owner.offers + offers, owner.asked + asked)
    draft.put(f"owner/{node}", owner if owner.offers or owner.asked else None)
    draft.put("stats", replace(stats, offers=stats.offers + offers, asked=stats.asked + asked))


def refuse(draft: Draft, offer_id: str, reason: str) -> None:
    """Note an offer that is not kept, and why."""
    stats, refusal = stats_of(draft), OfferRefusal(offer_id, reason[:MAX_REASON_CHARS], draft.now)
    draft.put("stats", replace(stats, refused=(*stats.refused, refusal)[-MAX_REFUSALS:]))


def stats_of(draft: Draft) -> StatsRow:
    """Return the row of what there is in all."""
    stats: StatsRow | None = draft.get("stats")
    return stats or StatsRow()
