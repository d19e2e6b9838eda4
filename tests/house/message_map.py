#!/usr/bin/env python3
"""The message map of docs/architecture.md, made from what the machines declare: their unions of messages and their sources.

.venv/bin/python tests/house/message_map.py --write
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/architecture.md"
ARROWS = re.compile(r"^[\w@, ()-]+-> [\w@, -]+?(, when [\w ]+)?: ")  # who says it stands in a column of its own
#: What two sources may say, each checked by the machine itself.
BESIDE = {"StateReported": "the exe-unit, edge", "UsageReported": "the exe-unit"}
BEGIN, END = "<!-- message map -->\n", "<!-- end of the message map -->\n"


def members(union: Any) -> Iterator[type]:
    """Yield the classes of a union, of unions in it, and of aliases of these."""
    if get_origin(union) in (Union, UnionType):
        for one in get_args(union):
            yield from members(one)
    elif isinstance(union, type) and union is not type(None):
        yield union


def first_sentence(message: type) -> str:
    """Return the first sentence of a class's docstring, on one line."""
    text = " ".join((message.__doc__ or "").split("\n\n")[0].split())
    sentence = ARROWS.sub("", text.split(". ")[0].rstrip("."))
    sentence = sentence[:1].upper() + sentence[1:]
    return sentence.replace("|", "\\|").replace("<", "&lt;")


def machines() -> Iterator[tuple[str, Any, dict[type, str]]]:
    """Yield (name, machine or port, who alone says what) of all actors with a vocabulary of their own."""
    sys.path.insert(0, str(ROOT))
    from actors import exeunit
    from actors.activity import machine as activity
    from actors.ledger import machine as ledger
    from actors.market import machine as market
    from actors.negotiation import machine as negotiation
    from actors.provider import machine as provider
    from actors.wallet import machine as wallet
    from golem.chain.port import Chain
    from golem.node.signer import SignerPort

    yield "market", market.Market, market._SOURCES
    yield "negotiation", negotiation.Negotiation, negotiation._SOURCES
    yield "activity", activity.Activity, activity._SOURCES
    yield "exeunit", exeunit.ExeUnit, exeunit._SOURCES
    yield "ledger", ledger.Ledger, ledger._SOURCES
    yield "wallet", wallet.Wallet, wallet._SOURCES
    yield "provider", provider.Provider, {}
    yield "chain", Chain, {}
    yield "signer", SignerPort, {}


def source_of(name: str, message: type, peers: set[type], sources: dict[type, str]) -> str:
    """Return who says a message to an actor."""
    if message.__name__ in ("Undelivered", "PeerLost"):
        return "the kernel"
    if message.__name__ in BESIDE:
        return BESIDE[message.__name__]
    source = sources.get(message)
    if source is None and message in peers:
        return "activity" if name == "exeunit" else "peer"
    if source is None:
        return {"chain": "wallet, ledger", "signer": "ledger", "provider": "its ports and timers"}.get(name, "itself")
    return "itself" if source in (name, "") else source


def message_map() -> str:
    """Return the whole map as Markdown."""
    parts = []
    for name, machine, sources in machines():
        peers = set(members(machine.peer))
        rows = sorted({*members(machine.local), *peers}, key=lambda one: (source_of(name, one, peers, sources), one.__name__))
        lines = [f"| `{one.__name__}` | {source_of(name, one, peers, sources)} | {first_sentence(one)} |" for one in rows]
        parts.append("\n".join([f"### {name}", "", "| message | from | says |", "|---|---|---|", *lines, ""]))
    return "\n".join(parts)


def written() -> tuple[str, str, str]:
    """Return the page's text before the map, the map, and the text behind it."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    old, _, tail = rest.partition(END)
    return head, old, tail


if __name__ == "__main__":
    head, _, tail = written()
    if "--write" in sys.argv:
        PAGE.write_text(f"{head}{BEGIN}{message_map()}{END}{tail}")
    else:
        print(message_map())
