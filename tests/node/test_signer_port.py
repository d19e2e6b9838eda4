"""The signer signs payments of this node for the ledger, and nothing else."""

from __future__ import annotations

import base64
from functools import partial

import pytest
from worlds.money import KEYS
from worlds.support import trio_test

from actors.kernel.machine import Meta, Send
from golem.node.signer import SignerPort
from protocol.ledger import PaymentBody, PaymentSigned, SignPayment, encode_body
from protocol.signing import node_id_of, sign, verify
from protocol.types import Violation

ME, OTHER = node_id_of(KEYS[0]), node_id_of(KEYS[1])


def asked(payer: str) -> SignPayment:
    details = base64.b64encode(bytes(32)).decode()
    body = PaymentBody("p", payer, OTHER, payer, OTHER, "erc20-local-tglm", "1", "2026-01-01T00:00:00Z", (), (), details)
    return SignPayment("p", encode_body(body))


@trio_test
async def test_the_ledgers_payment_is_signed_the_same_each_time() -> None:
    port = SignerPort(ME, partial(sign, KEYS[0]))
    answers = [await port.handle(asked(ME), Meta(f"{ME}/ledger", 0.0, "t")) for _ in range(2)]
    assert answers[0] == answers[1]
    ((send,),) = answers[:1]
    assert isinstance(send, Send)
    assert isinstance(send.message, PaymentSigned)
    verify(send.message.payment, "payment", ME)
    assert send.message.payment.body == asked(ME).body


@trio_test
async def test_nobody_else_gets_a_signature() -> None:
    port = SignerPort(ME, partial(sign, KEYS[0]))
    with pytest.raises(Violation):
        await port.handle(asked(ME), Meta(f"{ME}/exeunit-1", 0.0, "t"))
    with pytest.raises(Violation):
        await port.handle(asked(OTHER), Meta(f"{ME}/ledger", 0.0, "t"))
    with pytest.raises(Violation):
        await port.handle(SignPayment("p", b"{}"), Meta(f"{ME}/ledger", 0.0, "t"))
