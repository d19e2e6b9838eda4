"""Others that break the protocol: how often that is said (a log is for people), and how long they wait for it."""

from __future__ import annotations

from collections import OrderedDict

MINUTE_S = 60.0
MOST_A_MINUTE = 20  # of all peers together: names of peers are free
KEPT_PEERS = 256


class Complaints:
    """Says whether to complain of a peer now: once a minute, with the number of what was held back meanwhile."""

    def __init__(self) -> None:
        self._peers: OrderedDict[str, tuple[float, int]] = OrderedDict()  # when it was said, and how many were not since
        self._began, self._said = 0.0, 0

    def held_back(self, peer: str, now: float) -> int | None:
        """Return how many complaints of a peer were held back since the last one, None to hold this one back, too."""
        if not 0 <= now - self._began < MINUTE_S:
            self._began, self._said = now, 0
        at, held = self._peers.get(peer, (-MINUTE_S, 0))
        if 0 <= now - at < MINUTE_S or self._said >= MOST_A_MINUTE:
            self._keep(peer, at, held + 1)
            return None
        self._said += 1
        self._keep(peer, now, 0)
        return held

    def _keep(self, peer: str, at: float, held: int) -> None:
        self._peers[peer] = (at, held)
        self._peers.move_to_end(peer)
        if len(self._peers) > KEPT_PEERS:
            self._peers.popitem(last=False)


FIRST_WAIT_S, LAST_WAIT_S = 0.1, 60.0
FORGIVEN_S = 3600.0  # without a violation
KEPT_VIOLATORS = 1024


class Violators:
    """Peers that broke the protocol: none of their frames is taken for a while, which doubles each time."""

    def __init__(self) -> None:
        self._peers: OrderedDict[str, tuple[int, float, float, str]] = OrderedDict()  # times, last, until, what

    def broke(self, peer: str, what: str, now: float) -> None:
        """A peer broke the protocol. What it sent before it could know counts once."""
        times, last, until, _ = self._peers.pop(peer, (0, 0.0, 0.0, ""))
        if now >= until:
            times = times + 1 if now - last < FORGIVEN_S else 1
            until = now + min(FIRST_WAIT_S * 2.0 ** min(times - 1, 20), LAST_WAIT_S)
        self._peers[peer] = times, now, until, what
        if len(self._peers) > KEPT_VIOLATORS:
            self._peers.popitem(last=False)

    def __contains__(self, peer: str) -> bool:
        return peer in self._peers

    def waits(self, peer: str, now: float) -> bool:
        """Return whether what a peer sends is to be left alone yet."""
        return peer in self._peers and now < self._peers[peer][2]

    def words(self, now: float) -> list[tuple[str, str]]:
        """Return (peer, why it waits, or waited last) of those that are not forgiven yet, for people."""
        found = []
        for peer, (times, last, until, what) in sorted(self._peers.items()):
            if now - last < FORGIVEN_S:
                wait = f"what it sends waits {max(until - now, 0):.0f} s more" if now < until else "it is heard again"
                found.append((peer, f"broke the protocol {times} times ({what[:120]}); {wait}"))
        return found
