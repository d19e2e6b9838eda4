"""What is said about creations that agents may repeat (`Idempotency-Key`). Handled by `actors/creations.py`."""

from __future__ import annotations

from protocol.types import Message


class BeginCreation(Message, frozen=True):
    """edge -> creations: an agent asks for something under a key of its own. Answer: `Creation`, `Refused`.

    `key` and `digest` are hex digests: of agent and key, of what is asked for. `seed` makes ids, should it be new.
    """

    owner: str
    key: str
    digest: str
    seed: str


class Creation(Message, frozen=True):
    """Answer: ids are to be made of `seed` and times to be `at`, so that who repeats it makes nothing new; or it is done.

    `status` 0: there is no answer yet.
    """

    seed: str
    at: float
    status: int = 0
    answer: bytes = b""


class EndCreation(Message, frozen=True):
    """edge -> creations: what was answered; a `status` of 0 forgets the key, since nothing was made. Answer: `Done`."""

    owner: str
    key: str
    status: int
    answer: bytes


class CreationExpired(Message, frozen=True):
    """The key of a creation has been kept long enough."""

    owner: str
    key: str
