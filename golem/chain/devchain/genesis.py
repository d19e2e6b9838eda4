"""What every dev chain starts with: its id, its well-known keys, and where its contracts stand.

The keys below are PUBLIC, like those of every development chain: anyone can compute them from this file. They hold play
money on a chain that lives on one machine. Never send anything of value to their addresses.
"""

from __future__ import annotations

from golem.chain import contracts
from golem.chain.contracts import MINT_CAP_WEI
from golem.chain.signer import Key, Signed, Transaction, address_bytes, sign

CHAIN_ID = 1337
FAUCET_SECRET = bytes.fromhex("da02c88767fb30f0be030d9d1d96c90b5b894834d65c77042fec1a421ce2b5d3")
DEPLOYER_SECRET = bytes.fromhex("51f059ddba0d5dd05e505449f4b48c8a6c2bcc32bbcbe166e5b29a1d36a9862e")
FAUCET_ADDRESS = "0x06Eb0C1655bb30900a53F5360EdE10AFf29D3Cd6"
DEPLOYER_ADDRESS = "0x17bABc839370b143488edF26683d7cfa45683dea"
TOKEN_ADDRESS = "0xfE40f0e613A3501C3CC65AB075F17131bEa1F5E6"  # made by the deployer's nonce 0
MULTI_TRANSFER_ADDRESS = "0x15629453Fa4EAF7124980B1f5AD60132041884e5"  # nonce 1

GENESIS_BALANCE_WEI = 10**27
FAUCET_GIFT_WEI = 10 * 10**18  # what one dev_faucet call sends
GAS_LIMIT = 30_000_000
DEPLOY_FEE = 10 * 10**9  # well over the first base fee, 1 gwei


def _word(number: int) -> bytes:
    return number.to_bytes(32, "big")


def _text(text: str) -> bytes:
    raw = text.encode()
    return _word(len(raw)) + raw.ljust(-(-len(raw) // 32) * 32, b"\0")


def deploy_transactions(chain_id: int = CHAIN_ID, secret: bytes = DEPLOYER_SECRET) -> list[Signed]:
    """Token, then multi-transfer, signed by the deployer with nonces 0 and 1: hence the fixed addresses."""
    name, symbol = _text("Golem test token"), _text("tGLM")
    head = _word(3 * 32) + _word(3 * 32 + len(name)) + _word(MINT_CAP_WEI)
    token = contracts.load("TestToken").bytecode + head + name + symbol
    multi = contracts.load("MultiTransfer").bytecode + address_bytes(TOKEN_ADDRESS).rjust(32, b"\0")
    key = Key(secret)
    return [
        sign(key, Transaction(chain_id, nonce, 3_000_000, DEPLOY_FEE, 10**9, None, code))
        for nonce, code in enumerate((token, multi))
    ]
