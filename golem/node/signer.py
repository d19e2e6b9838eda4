"""The port "signer": the ledger's payments, and nothing else, get the node's signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from actors.kernel.machine import Meta, Send
from protocol.ledger import PaymentBody, PaymentSigned, SignPayment, decode_body
from protocol.signing import Document
from protocol.states import DocumentKind
from protocol.types import Violation, address


class SignerPort:
    """Signs with `sign(kind, body)`, which is deterministic: a repeat gives the same answer."""

    name = "signer"
    local: Any = SignPayment
    peer: Any = None

    def __init__(self, node_id: str, sign: Callable[[str, bytes], Document]) -> None:
        self._node_id, self._sign = node_id, sign

    async def handle(self, message: Any, meta: Meta) -> Sequence[Send]:
        """Sign a payment. Raises `Violation` for whoever is not the ledger, and for a payment of somebody else."""
        if meta.sender != address(self._node_id, "ledger"):
            raise Violation(f"{meta.sender} wants a signature, and is not the ledger")
        if decode_body(PaymentBody, message.body).payer_id != self._node_id:
            raise Violation("this node signs its own payments only")
        return [Send("ledger", PaymentSigned(message.payment_id, self._sign(DocumentKind.PAYMENT, message.body)))]
