"""How often it is said that others broke the protocol: they can do it as fast as they like, a log is for people."""

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
