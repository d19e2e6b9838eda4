"""Offers of the provider agent: published, watched, replaced when presets change or the node forgets them."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from actors.provider.rows import ProviderOfferRow
from actors.provider.turn import Turn
from protocol.provider import OfferLost, OfferPublished, OfferSpec, PlaceOffer, WatchOffer, WithdrawOffer


def reconcile(turn: Turn, specs: Iterable[OfferSpec], *, again: bool) -> None:
    """Bring the offers to what is wanted. `again`: the agent has just started, and nobody watches them yet."""
    wanted = {} if turn.agent.stopping else {spec.preset: spec for spec in specs}
    rows: list[ProviderOfferRow] = [row for _, row in turn.readable("offer/")]
    for key in [key for key in turn.left_out if key.startswith("offer/")]:
        turn.put(key, None)  # nobody knows its id any more: at its next start the agent takes it back by its name
    for row in rows:
        spec = wanted.get(row.preset)
        if spec and (spec.runtime, spec.properties, spec.subnet) == (row.runtime, row.properties, row.subnet):
            del wanted[row.preset]
            if again:
                _resume(turn, row)
        else:
            withdraw(turn, row)
    for spec in wanted.values():
        _publish(turn, ProviderOfferRow(spec.preset, spec.runtime, spec.properties, spec.subnet, 0))


def _resume(turn: Turn, row: ProviderOfferRow) -> None:
    if row.offer_id:
        turn.rest(WatchOffer(row.preset, row.offer_id))
    else:
        _publish(turn, row)


def _publish(turn: Turn, row: ProviderOfferRow) -> None:
    row = replace(row, offer_id="", serial=int(turn.now * 1000))
    turn.put(f"offer/{row.preset}", row)
    turn.rest(PlaceOffer(row.preset, row.serial, row.properties, row.subnet))


def withdraw(turn: Turn, row: ProviderOfferRow) -> None:
    """Take an offer back; if it is still being published, as soon as its id is known."""
    turn.put(f"offer/{row.preset}", None)
    if row.offer_id:
        turn.rest(WithdrawOffer(row.offer_id))


def withdraw_all(turn: Turn) -> None:
    for _, row in list(turn.readable("offer/")):
        withdraw(turn, row)


def published(turn: Turn, message: OfferPublished) -> None:
    """An offer is out; watch it, or take it back if it is not wanted any more."""
    row: ProviderOfferRow | None = turn.get(f"offer/{message.preset}")
    if row is None or row.serial != message.serial or row.offer_id not in ("", message.offer_id):
        turn.rest(WithdrawOffer(message.offer_id))
        return
    turn.put(f"offer/{message.preset}", replace(row, offer_id=message.offer_id))
    turn.rest(WatchOffer(message.preset, message.offer_id))


def lost(turn: Turn, message: OfferLost) -> None:
    """The node has forgotten an offer (they last an hour): publish it anew."""
    row: ProviderOfferRow | None = turn.get(f"offer/{message.preset}")
    if row is not None and row.offer_id == message.offer_id:
        _publish(turn, row)
