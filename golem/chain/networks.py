"""The table of networks: one row a network, and the platform strings that name them (`erc20-holesky-tglm`).

Rows come in three profiles. *testnet* and *mainnet* talk to the real chains. *local* serves `local`, `holesky` and
`hoodi` from the dev chain, because agents ask for their favourite network by name: such rows say so in `simulated_by`,
and displays must show it. All rows of one chain share accounts and nonces: `Network.chain` tells which do.

URLs may be replaced by the variable <NAME>_GETH_ADDR (comma separated); more rows come from a JSON file (`read_rows`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

from golem.base.settings_file import is_there, read_json
from golem.chain.devchain.genesis import CHAIN_ID, MULTI_TRANSFER_ADDRESS, TOKEN_ADDRESS

GWEI = 10**9
DRIVER = "erc20"
FEE_MODELS = ("eth", "op", "zk")
SIMULATED = "local dev chain"
DEFAULT_NETWORK = {"local": "hoodi", "testnet": "hoodi", "mainnet": "polygon"}  # by profile
STAND_INS = ("holesky", "hoodi")  # the default networks of the agents' libraries

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}\Z")

FeeModel = Literal["eth", "op", "zk"]


class NotServed(KeyError):
    """This node, as it was started, has no such network, platform or key."""


class Platform(NamedTuple):
    """The three parts of a platform string, all lower case."""

    driver: str
    network: str
    token: str

    def __str__(self) -> str:
        return "-".join(self)


def parse_platform(text: str) -> Platform:
    """`erc20-holesky-tglm` -> Platform. ValueError says what is wrong."""
    parts = text.split("-")
    if len(parts) != 3 or not all(part.isalnum() for part in parts):
        raise ValueError(f"not a payment platform (<driver>-<network>-<token>): {text[:80]!r}")
    if text != text.lower():
        raise ValueError(f"payment platforms are in lower case: {text[:80]!r}")
    return Platform(*parts)


_JSON_KINDS: Mapping[object, type | tuple[type, ...]] = {
    "int": int, "float": (int, float), "bool": bool, "tuple[str, ...]": list, "str | None": (str, type(None)),
}  # by the annotation of a field of `Network`  # fmt: skip


@dataclass(frozen=True, slots=True)
class Network:
    """What the chain layer needs to know of a network. Fees in wei per gas, `depth` in blocks over the mined one."""

    name: str
    chain_id: int
    rpc_urls: tuple[str, ...]
    token: str  # address of the GLM contract
    symbol: str = "tGLM"
    coin: str = "ETH"
    multi_transfer: str | None = None
    fee_model: FeeModel = "eth"
    depth: int = 3
    repeat_depth: int = 96  # over a payment that failed, or lost its nonce, before it is made anew: what no chain loses
    fee_cap: int = 500 * GWEI
    priority_fee: int = GWEI
    mint: str | None = None  # contract whose create() mints test tokens
    dev_faucet: bool = False  # the chain has our dev methods
    poll_s: float = 4.0
    stuck_s: float = 60.0  # a transaction as old as this gets a higher fee
    simulated_by: str | None = None

    @property
    def platform(self) -> str:
        return str(Platform(DRIVER, self.name, self.symbol.lower()))

    @property
    def chain(self) -> str:
        """Rows with the same value share accounts, nonces and transactions."""
        return f"{self.chain_id}"

    @property
    def is_test(self) -> bool:
        return self.symbol.lower() != "glm"


PUBLIC = (
    Network(
        "mainnet",
        1,
        ("https://ethereum-rpc.publicnode.com", "https://eth.drpc.org"),
        "0x7DD9c5Cba05E151C895FDe1CF355C9A1D5DA6429",
        "GLM",
        multi_transfer="0xCfD497F7D111F14c3eF7eBEeE63771d1506f0AF8",
        depth=5,
    ),
    Network(
        "polygon",
        137,
        ("https://polygon-bor-rpc.publicnode.com", "https://polygon.drpc.org"),
        "0x0B220b82F3eA3B7F6d9A1D8ab58930C064A2b5Bf",
        "GLM",
        "POL",
        multi_transfer="0x50100d4faf5f3b09987dea36dc2eddd57a3e561b",
        depth=5,
        repeat_depth=300,
        fee_cap=5_000 * GWEI,
        priority_fee=30 * GWEI,
    ),
    Network(
        "holesky",
        17000,
        ("https://ethereum-holesky-rpc.publicnode.com", "https://holesky.drpc.org"),
        "0x8888888815bf4DB87e57B609A50f938311EEd068",
        multi_transfer="0xAaAAAaA00E1841A63342db7188abA84BDeE236c7",
        mint="0xFACe100969FF47EB58d2CF603321B581A84bcEaC",
    ),
    Network(
        "hoodi",
        560048,
        ("https://ethereum-hoodi-rpc.publicnode.com", "https://hoodi.drpc.org"),
        "0x55555555555556AcFf9C332Ed151758858bd7a26",
        multi_transfer="0x222222222220C9269Cfb43eD434888F604d1dC21",
        mint="0x500F965199C63865A3E666cA3fF55B64F1c8Bc8b",
    ),
    Network(
        "amoy",
        80002,
        ("https://polygon-amoy-bor-rpc.publicnode.com", "https://rpc-amoy.polygon.technology"),
        "0x2b60e60d3fb0b36a7ccb388f9e71570da4c4594f",
        coin="POL",
        repeat_depth=300,
        multi_transfer="0xa0a51642a594763d78091bf03ee6bf8e8d663bba",
        mint="0xf29ff8a13211ac33861986e407190ae5c773d53c",
        priority_fee=30 * GWEI,
    ),
    Network(
        "sepolia",
        11155111,
        ("https://ethereum-sepolia-rpc.publicnode.com", "https://sepolia.drpc.org"),
        "0x167b15ada84c63427c6c813B915a42eFC72E7175",  # no multi-transfer contract is known: one payee a transaction
    ),
)


def local_rows(dev_url: str, simulated_by: str = SIMULATED) -> tuple[Network, ...]:
    """The dev chain at `dev_url` under its own name and as stand-in for the agents' default networks."""
    local = Network(
        "local",
        CHAIN_ID,
        (dev_url,),
        TOKEN_ADDRESS,
        multi_transfer=MULTI_TRANSFER_ADDRESS,
        depth=2,
        repeat_depth=2,
        mint=TOKEN_ADDRESS,
        dev_faucet=True,
        poll_s=0.3,
        stuck_s=3.0,
        simulated_by=simulated_by,
    )
    return (local, *(replace(local, name=name) for name in STAND_INS))


def _lower(address: str | None) -> str:
    return (address or "").lower()


class Networks:
    """Rows by network name and by platform. ValueError where rows contradict each other."""

    def __init__(self, rows: Iterable[Network], default: str) -> None:
        self.default = default
        self.rows = {row.name: row for row in rows}
        chains: dict[str, Network] = {}
        for row in self.rows.values():  # one engine pays for a whole chain, in one token
            first = chains.setdefault(row.chain, row)
            if (first.token.lower(), _lower(first.multi_transfer)) != (row.token.lower(), _lower(row.multi_transfer)):
                raise ValueError(f"networks {first.name} and {row.name} are one chain and name different contracts")
        self._platforms = {row.platform: row for row in self.rows.values()}

    def by_name(self, name: str) -> Network:
        """NotServed names the known ones."""
        if name not in self.rows:
            raise NotServed(f"unknown network {name[:40]!r}; known: {', '.join(self.rows)}")
        return self.rows[name]

    def by_platform(self, platform: str) -> Network:
        """ValueError when it is no platform string, NotServed when this node does not serve it."""
        parsed = parse_platform(platform)
        if platform not in self._platforms:
            raise NotServed(f"payment platform {parsed} is not served; served: {', '.join(self._platforms)}")
        return self._platforms[platform]

    @property
    def platforms(self) -> tuple[str, ...]:
        return tuple(self._platforms)

    def __iter__(self) -> Iterator[Network]:
        return iter(self.rows.values())


def load(
    profile: str, *, dev_url: str | None = None, simulated_by: str = SIMULATED,
    environ: Mapping[str, str] = os.environ, extra: Path | None = None,
) -> Networks:  # fmt: skip
    """The table of a profile: "local" (needs `dev_url`), "testnet" or "mainnet"; the file `extra` replaces or adds rows.

    ValueError for an unknown profile or a bad file.
    """
    if profile not in DEFAULT_NETWORK:
        raise ValueError(f"unknown network profile {profile[:40]!r}: one of {', '.join(DEFAULT_NETWORK)}")
    if profile == "local":
        if dev_url is None:
            raise ValueError("the local profile needs the dev chain's URL")
        rows = list(local_rows(dev_url, simulated_by))
    else:
        rows = [_with_env(row, environ) for row in PUBLIC if row.is_test == (profile == "testnet")]
    return Networks([*rows, *(read_rows(extra) if extra and is_there(extra) else ())], DEFAULT_NETWORK[profile])


def _with_env(row: Network, environ: Mapping[str, str]) -> Network:
    urls = tuple(url.strip() for url in environ.get(f"{row.name.upper()}_GETH_ADDR", "").split(",") if url.strip())
    return replace(row, rpc_urls=urls) if urls else row


def read_rows(path: Path) -> list[Network]:
    """Rows from a JSON array of objects with the fields of `Network`. ValueError says which row is wrong and how."""
    known = {field.name for field in fields(Network)}
    listed = read_json(path)
    if not isinstance(listed, list):
        raise ValueError(f"{path}: an array of networks is expected")
    rows = []
    for number, item in enumerate(listed):
        if not isinstance(item, dict) or not {"name", "chain_id", "rpc_urls", "token"} <= set(item) <= known:
            raise ValueError(f"{path}, row {number}: fields are name, chain_id, rpc_urls, token and of {sorted(known)}")
        kinds = {field.name: field.type for field in fields(Network)}
        wrong = [name for name, value in item.items() if not isinstance(value, _JSON_KINDS.get(kinds[name], str))]
        if wrong:
            raise ValueError(f"{path}, row {number}: the value of {wrong[0]} is of another type than expected")
        row = Network(**{**item, "rpc_urls": tuple(map(str, item["rpc_urls"]))})
        if row.fee_model not in FEE_MODELS or not isinstance(row.chain_id, int) or min(row.depth, row.repeat_depth) < 0:
            raise ValueError(f"{path}, row {number}: fee_model is one of {FEE_MODELS}, chain_id and depth are numbers")
        parse_platform(row.platform)
        for address in (row.token, row.multi_transfer, row.mint):
            if address is not None and not _ADDRESS.match(address):
                raise ValueError(f"{path}, row {number}: no address of a contract: {address[:50]!r}")
        rows.append(row)
    return rows
