"""A node or a provider agent with one function replaced: `python cheating_node.py CHEAT` and then what `golem` is told.

Run by `test_cheats_real.py`; everything else of the program is as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from actors.kernel.draft import Draft  # noqa: E402
from actors.negotiation import agreements  # noqa: E402
from actors.provider import billing as _provider_billing  # noqa: E402
from golem.cli import main  # noqa: E402
from protocol.ledger import DocumentReceived  # noqa: E402
from protocol.types import amount_text  # noqa: E402
from protocol.wallet import PayOut  # noqa: E402


def dated() -> None:
    """A requestor's node dates its agreements three years ahead."""
    honest = agreements._from_proposals
    agreements._from_proposals = lambda proposal, mine, created, *rest: honest(proposal, mine, created + 1e8, *rest)


def silent() -> None:
    """A requestor's node acknowledges no document, and orders no payment."""
    honest: Callable[..., None] = Draft.send

    def send(draft: Draft, to: str, message: Any, *rest: Any) -> None:
        if not isinstance(message, DocumentReceived | PayOut):
            honest(draft, to, message, *rest)

    Draft.send = send  # type: ignore[method-assign]


def uncommitted() -> None:
    """A requestor's node takes approvals and commits to none."""
    agreements.approval = lambda draft, message, meta: None


def greedy() -> None:
    """A provider's agent asks for a thousand times what the work costs."""
    honest = _provider_billing.cost
    _provider_billing.cost = lambda coeffs, usage: amount_text(1000 * float(honest(coeffs, usage)))


if __name__ == "__main__":
    {one.__name__: one for one in (dated, silent, uncommitted, greedy)}[sys.argv.pop(1)]()
    main()
