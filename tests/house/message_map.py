#!/usr/bin/env python3
"""The message map of docs/architecture.md, made from the tables of the machines and the unions of the ports.

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
KERNEL = ("Undelivered", "PeerLost")
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


def machines() -> tuple[Any, ...]:
    """Return the classes of all machines."""
    sys.path.insert(0, str(ROOT))
    from actors.activity.machine import Activity
    from actors.creations import Creations
    from actors.exeunit import ExeUnit
    from actors.ledger.machine import Ledger
    from actors.market.machine import Market
    from actors.negotiation.machine import Negotiation
    from actors.provider.machine import Provider
    from actors.wallet.machine import Wallet

    return Market, Negotiation, Activity, ExeUnit, Ledger, Wallet, Provider, Creations


def actors() -> Iterator[tuple[str, dict[type, str]]]:
    """Yield (name, who says what) of all actors with a vocabulary of their own."""
    sys.path.insert(0, str(ROOT))
    from actors.kernel.grammar import Looked, On
    from golem.chain.port import Chain
    from golem.node.signer import SignerPort

    def source(on: On) -> str:
        if on.message.__name__ in KERNEL:
            return "the kernel"
        return on.source.who if isinstance(on.source, Looked) else on.source

    for machine in machines():
        name = getattr(machine, "name", "exeunit")
        yield name, {message: source(on) for message, on in machine.table.entries.items()}
    yield "chain", dict.fromkeys(members(Chain.local), "wallet, ledger")
    yield "signer", dict.fromkeys(members(SignerPort.local), "ledger")


def message_map() -> str:
    """Return the whole map as Markdown."""
    parts = []
    for name, said in actors():
        rows = sorted((source, one.__name__, first_sentence(one)) for one, source in said.items())
        lines = [f"| `{message}` | {source} | {says} |" for source, message, says in rows]
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
