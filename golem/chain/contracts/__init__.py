"""The contracts of the local chain, as source (Vyper), ABI and bytecode.

`build` makes the JSON files beside the sources; this module only reads them. The public networks carry contracts with
the same calls, so the constants here serve `golem.chain.engine` and `golem.chain.verify` there as well.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any, NamedTuple

MINT_CAP_WEI = 1000 * 10**18  # what one `create()` of the test token mints
TRANSFER_TOPIC = "0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"


class Contract(NamedTuple):
    """ABI as JSON values; `bytecode` is the creation code, constructor arguments to be appended."""

    abi: list[dict[str, Any]]
    bytecode: bytes


@functools.cache
def load(name: str) -> Contract:
    """The compiled contract `name`: TestToken or MultiTransfer."""
    text = resources.files(__package__).joinpath(f"{name}.json").read_text()
    data = json.loads(text)
    return Contract(data["abi"], bytes.fromhex(data["bytecode"].removeprefix("0x")))
