"""Stand-ins for the app-key in the addresses of pages that services inside activities serve.

A script of a page can read its own address, and the page comes from a stranger: a browser that opens one with the app-key
in the query is sent on to the same address with a ticket, which opens the services of that one activity and nothing else.
A ticket counts as long as the app-key behind it does. Neighbour: `proxy.py`.
"""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from collections.abc import Sequence

import trio

from golem.rest.proxy_rules import Header, header, without_key

MAX_TICKETS = 1000  # the oldest goes
VALID_S = 12 * 3600.0
_TICKET = "page-"


class Tickets:
    """The tickets of one node; they end with it."""

    def __init__(self) -> None:
        self._issued: OrderedDict[str, tuple[str, str, float]] = OrderedDict()  # activity, app-key, until when

    def issue(self, activity: str, app_key: str) -> str:
        """Return a new ticket."""
        ticket = _TICKET + secrets.token_hex(16)
        self._issued[ticket] = activity, app_key, trio.current_time() + VALID_S
        while len(self._issued) > MAX_TICKETS:
            self._issued.popitem(last=False)
        return ticket

    def app_key(self, ticket: str, activity: str) -> str | None:
        """Return the app-key behind a ticket for this activity, None if it is none."""
        found = self._issued.get(ticket)
        if found is None or found[0] != activity or trio.current_time() > found[2]:
            return None
        return found[1]


def opens_page(headers: Sequence[Header]) -> bool:
    """Return whether what is asked for may be shown as a page: as browsers say, or by what older ones want."""
    mode = header(headers, b"sec-fetch-mode").lower()
    return mode == b"navigate" if mode else bool(re.search(rb"text/html", header(headers, b"accept"), re.IGNORECASE))


def with_ticket(path: bytes, query: bytes, ticket: str) -> str:
    """Return an address with the ticket in the place of the app-key."""
    rest = without_key(query)
    return (path + b"?" + rest + (b"&" if rest else b"") + b"authToken=" + ticket.encode()).decode("latin-1")
