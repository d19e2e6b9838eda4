"""What is said about activities, between the two nodes and with the exe-unit. Handled by `actors/activity.py`."""

from __future__ import annotations

from protocol.types import Message


# -- to other actors of the node
class ActivityKnown(Message, frozen=True):
    """activity -> ledger: this activity belongs to this agreement."""

    activity_id: str
    agreement_id: str
