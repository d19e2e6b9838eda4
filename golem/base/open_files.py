"""How many files and sockets this process may have open: as many as its user allows, and what of that strangers may take."""

from __future__ import annotations

import resource

MOST = 1 << 16  # more serves nobody, and some programs walk through all of them


def raise_limit() -> None:
    """Raise the soft limit of open files towards the hard one; children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def for_strangers() -> int:
    """Return how many connections may be open of whoever can reach a port: the rest is kept for files, peers and the bus."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(8, min(MOST if soft == resource.RLIM_INFINITY else soft, MOST) // 4)
