"""What any web page may send to what listens on this machine: posts without asking (no-cors), forms, names made to lead here.

A page can choose method GET or POST, the body, and three content types; it cannot take `Origin` off its posts, nor choose
`Host`, which is the name that was made to lead here.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from chain_support import Client, address_of, authority, devchain
from worlds.patience import patience

from golem.chain.devchain import INFO_NAME, token_of

CALL = {"jsonrpc": "2.0", "id": 1, "method": "anvil_reorg", "params": [1, []]}
SIMPLE_TYPES = (
    "text/plain",
    "text/plain;charset=UTF-8",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "",
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("chain")
    with devchain(folder) as url:
        yield folder, url


def post(url: str, body: object = CALL, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(url, content=json.dumps(body), headers=named, trust_env=False, timeout=patience(30))


@pytest.mark.parametrize("kind", SIMPLE_TYPES)
def test_a_page_posts_to_the_chain_without_asking(chain: tuple[Path, str], kind: str) -> None:
    _, url = chain
    for headers in ({}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        for call in (CALL, [CALL], CALL | {"method": "dev_faucet", "params": [address_of("page")]}):
            assert post(url, call, Content_Type=kind, **headers).status_code in (403, 415)
    assert Client(url).number("eth_getBalance", address_of("page")) == 0


HOSTILE = [
    {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": ""}, {"Origin": "http://127.0.0.1:8545"},
    {"Host": "evil.example"},
    {"Host": "127.0.0.1.evil.example:8545"}, {"Host": "localhost.evil.example"}, {"Host": "x@127.0.0.1"},
    {"Host": "127.1"}, {"Host": ""},
]  # fmt: skip


@pytest.mark.parametrize("headers", HOSTILE)
def test_a_page_that_may_send_anything(chain: tuple[Path, str], headers: dict[str, str]) -> None:
    """By a name that was made to lead here, a page is at its own site: JSON and all headers are its to send."""
    folder, url = chain
    with_token = {"Content-Type": "application/json", "Authorization": f"Bearer {token_of(folder)}"}
    for call in (CALL, CALL | {"method": "eth_chainId", "params": []}):
        assert httpx.post(url, json=call, headers={**with_token, **headers}, trust_env=False).status_code == 403
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(url, headers=asked, trust_env=False)
    assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (403, False)


def test_programs_of_this_machine_are_served(chain: tuple[Path, str]) -> None:
    _, url = chain
    port = url.rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", f"192.168.1.10:{port}", "LOCALHOST"):
        call = CALL | {"method": "eth_chainId", "params": []}
        answer = httpx.post(url, json=call, headers={"Host": host}, trust_env=False)
        assert answer.json()["result"] == "0x539"
    assert httpx.get(url, trust_env=False).status_code == 405


@pytest.mark.parametrize("method", [
    "anvil_reorg", "anvil_dropAllTransactions", "anvil_dropTransaction", "anvil_setNextBlockBaseFeePerGas", "anvil_mine",
    "evm_mine", "evm_revert", "evm_snapshot", "evm_setAutomine", "evm_setIntervalMining", "evm_increaseTime", "anvil_of_tomorrow",
])  # fmt: skip
def test_the_developers_methods_take_the_token(chain: tuple[Path, str], method: str) -> None:
    folder, url = chain
    token = token_of(folder)
    for given in ("", "Bearer", f"Bearer {token[:-1]}", f"Bearer {token}0", f"Basic {token}", f"Bearer {'0' * 32}"):
        for call in (CALL | {"method": method}, [CALL | {"method": method}]):
            told = post(url, call, Content_Type="application/json", Authorization=given).json()
            told = told[0] if isinstance(told, list) else told
            assert "chain.json" in told["error"]["message"]
    told = post(url, CALL | {"method": method, "params": [[[]]] * 9}, Content_Type="application/json", **authority(url)).json()
    assert "chain.json" not in told["error"]["message"], "with it, the call is one like others"


def test_the_token_is_its_users_alone_and_stays(tmp_path: Path) -> None:
    info, tokens = tmp_path / INFO_NAME, []
    for _ in range(3):
        with devchain(tmp_path):
            tokens.append(token_of(tmp_path))
            assert stat.S_IMODE(info.stat().st_mode) == 0o600
        if len(tokens) == 2:
            info.chmod(0o644)
    assert len(tokens[0]) == 32
    assert tokens[0] == tokens[1], "a restart changes nothing for who has it"
    assert tokens[2] != tokens[1], "one that others could read is no secret"
