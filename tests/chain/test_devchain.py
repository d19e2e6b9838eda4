"""The dev chain's process: mempool and mining rules, the developer's methods, JSON-RPC manners, one server a directory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trio
from chain_support import GLM, GWEI, OURS, ROOT, Client, Lab, Refused, address_of, devchain, key_of, payer, spawn_devchain
from worlds.patience import patience
from worlds.support import trio_test

from golem.chain import token
from golem.chain.contracts import MINT_CAP_WEI
from golem.chain.devchain import BUSY_EXIT, DevChainError, ensure_devchain, genesis, stop_devchain, url_of
from golem.chain.rows import TransferBatch
from golem.chain.rpc import Rpc
from golem.chain.signer import Key, Transaction, sign
from golem.chain.token import balances
from protocol.wallet import TransferConfirmed


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with devchain(tmp_path_factory.mktemp("chain")) as url:
        yield Lab(url, "devchain")


@pytest.fixture(autouse=True)
def _calm(request: pytest.FixtureRequest) -> None:
    if "lab" in request.fixturenames:
        lab = request.getfixturevalue("lab")
        lab.call("evm_setAutomine", False)
        lab.call("anvil_dropAllTransactions")
        lab.base_fee(GWEI)


def raw(key: Key, nonce: int, *, fee: int = 10 * GWEI, tip: int = GWEI, gas: int = 21_000, chain_id: int = 1337) -> str:
    tx = Transaction(chain_id, nonce, gas, fee, tip, address_of("sink"), b"", 1)
    return "0x" + sign(key, tx).raw.hex()


def test_a_new_chain_has_the_contracts_at_their_fixed_addresses(lab: Lab) -> None:
    key = lab.rich("newcomer")
    assert lab.tokens(key.address) == MINT_CAP_WEI
    assert lab.call("eth_getCode", genesis.MULTI_TRANSFER_ADDRESS, "latest") != "0x"
    assert lab.call("eth_chainId") == hex(genesis.CHAIN_ID)
    with pytest.raises(Refused, match="Cannot acquire more funds"):
        lab.call("eth_estimateGas", {"from": key.address, "to": lab.network.token, "data": "0x" + token.CREATE.hex()})


def test_mempool_speaks_and_acts_like_geth(lab: Lab) -> None:
    key = lab.rich("mempool")
    send = lambda text: lab.call("eth_sendRawTransaction", text)  # noqa: E731
    nonce = lab.nonce(key.address)
    first = send(raw(key, nonce))
    refusals = {
        raw(key, nonce): "already known",
        raw(key, nonce - 1): "nonce too low",
        raw(key, nonce, fee=10 * GWEI + 1): "replacement transaction underpriced",
        raw(key, nonce, fee=10**9 * GWEI): "insufficient funds for gas",
        raw(key, nonce + 1, gas=20_000): "intrinsic gas too low",
        raw(key, nonce + 1, gas=31_000_000, fee=GWEI): "exceeds block gas limit",
        raw(key, nonce + 1, chain_id=1): "invalid chain id",
        "0x02c0": "invalid transaction",
        "0x": "invalid transaction",
        "nonsense": "0x-hex expected",
    }
    for text, words in refusals.items():
        with pytest.raises(Refused, match=words):
            send(text)
    better = send(raw(key, nonce, fee=11 * GWEI, tip=2 * GWEI))
    assert lab.call("eth_getTransactionByHash", first) is None, "replaced"
    gapped = send(raw(key, nonce + 2))
    assert lab.call("txpool_status") == {"pending": "0x1", "queued": "0x1"}
    assert lab.number("eth_getTransactionCount", key.address, "pending") == nonce + 1
    lab.mine()
    assert lab.call("eth_getTransactionReceipt", better)["status"] == "0x1"
    assert lab.call("eth_getTransactionReceipt", gapped) is None
    send(raw(key, nonce + 1))
    lab.mine()
    assert lab.call("eth_getTransactionReceipt", gapped) is not None
    cheap = send(raw(key, nonce + 3, fee=GWEI, tip=1))
    lab.base_fee(2 * GWEI)
    assert lab.call("eth_getTransactionReceipt", cheap) is None, "below the base fee it waits"
    lab.base_fee(GWEI)
    assert lab.call("eth_getTransactionReceipt", cheap) is not None


def test_reorg_and_snapshot(lab: Lab) -> None:
    key = lab.rich("rewind")
    payee = address_of("rewind payee")
    block = lab.number("eth_blockNumber")
    snapshot = lab.call("evm_snapshot")
    paid = lab.do(key, lab.network.token, token.transfer_call(payee, GLM))
    lab.mine()
    old = lab.call("eth_getBlockByNumber", "latest", False)["hash"]
    lab.call("anvil_reorg", 2, [])
    assert lab.call("eth_getBlockByNumber", "latest", False)["hash"] != old
    assert lab.number("eth_blockNumber") == block + 2
    assert lab.call("eth_getTransactionReceipt", paid["transactionHash"]) is None
    assert lab.call("eth_getLogs", {"fromBlock": hex(block + 1)}) == []
    assert lab.tokens(payee) == 0
    lab.do(key, lab.network.token, token.transfer_call(payee, 2 * GLM))
    assert lab.call("evm_revert", snapshot) is True
    assert lab.number("eth_blockNumber") == block
    assert lab.tokens(payee) == 0
    assert lab.call("evm_revert", snapshot) is False, "used up"
    with pytest.raises(Refused, match="reorg of depth"):
        lab.call("anvil_reorg", 10_000, [])
    lab.do(key, lab.network.token, token.transfer_call(payee, 3 * GLM))
    assert lab.tokens(payee) == 3 * GLM


def test_logs_are_found_by_address_topics_and_range(lab: Lab) -> None:
    key, a, b = lab.rich("logs"), address_of("logs a"), address_of("logs b")
    start = lab.number("eth_blockNumber") + 1
    for payee in (a, b, a):
        lab.do(key, lab.network.token, token.transfer_call(payee, GLM))
    topic = "0x" + bytes(12).hex() + a[2:]
    query = {"fromBlock": hex(start), "address": lab.network.token, "topics": [None, None, topic]}
    assert [int(log["blockNumber"], 16) for log in lab.call("eth_getLogs", query)] == [start, start + 2]
    assert len(lab.call("eth_getLogs", {**query, "topics": []})) == 3
    assert len(lab.call("eth_getLogs", {**query, "toBlock": hex(start + 1)})) == 1
    block_hash = lab.call("eth_getBlockByNumber", hex(start + 1), False)["hash"]
    assert len(lab.call("eth_getLogs", {"blockHash": block_hash})) == 1
    old = {"to": lab.network.token, "data": "0x" + token.BALANCE_OF.hex() + topic[2:]}
    assert lab.number("eth_call", old, hex(start)) == GLM, "state of an earlier block"


def test_bad_requests_get_errors_and_the_chain_lives_on(lab: Lab) -> None:
    with httpx.Client(trust_env=False) as http:

        def post(body: bytes) -> httpx.Response:
            return http.post(lab.url, content=body, headers={"Content-Type": "application/json; charset=utf-8"})

        assert post(b"{").json()["error"]["code"] == -32700
        assert post(b"[" * 100_000).json()["error"]["code"] == -32700
        assert post(b"[]").json()["error"]["code"] == -32600
        assert post(b"3").json()["error"]["code"] == -32600
        assert post(b'{"method": "eth_chainId", "params": {"a": 1}, "id": 1}').json()["error"]["code"] == -32602
        assert post(b'[{"method": "eth_chainId", "id": 7}]').json()[0] == {"jsonrpc": "2.0", "id": 7, "result": "0x539"}
        assert http.get(lab.url).status_code == 405
        assert post(b" " * (2 << 20)).status_code == 413
    for method, params in (
        ("eth_getBalance", ("x",)), ("eth_getBalance", ("0x12",)), ("eth_getBalance", ()), ("eth_call", (3,)),
        ("eth_getBlockByNumber", ("0xzz",)), ("eth_getLogs", ({"topics": ["0x1"]},)), ("eth_feeHistory", (-1,)),
        ("eth_sendRawTransaction", (5,)), ("anvil_mine", (10**9,)), ("dev_faucet", (address_of("x"), 10**30)),
    ):  # fmt: skip
        with pytest.raises(Refused, match="invalid argument"):
            lab.call(method, *params)
    with pytest.raises(Refused, match="does not exist"):
        lab.call("eth_sign")
    assert lab.call("eth_getBlockByNumber", "0xfffff", False) is None
    assert lab.call("eth_chainId") == "0x539"


def test_confirmations_come_by_themselves_and_an_idle_chain_stands_still(tmp_path: Path) -> None:
    with devchain(tmp_path, "--block-time", "0.05", "--tail", "4") as url:
        client = Client(url)
        tx_hash = client.call("dev_faucet", address_of("tail"))
        receipt = client.call("eth_getTransactionReceipt", tx_hash)
        assert receipt is not None, "mined at once"
        end = int(receipt["blockNumber"], 16) + 4
        deadline = time.monotonic() + patience(5)
        while client.number("eth_blockNumber") < end and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        assert client.number("eth_blockNumber") == end
        client.call("evm_setAutomine", False)
        waiting = client.call("dev_faucet", address_of("tail"))
        time.sleep(0.2)
        assert client.call("eth_getTransactionReceipt", waiting) is None
        client.call("evm_setIntervalMining", 0.1)
        while client.call("eth_getTransactionReceipt", waiting) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert client.call("eth_getTransactionReceipt", waiting)["status"] == "0x1"


def test_one_server_a_directory_however_many_ask(tmp_path: Path) -> None:
    program = (
        "import sys, trio\nfrom golem.chain.devchain import ensure_devchain\n"
        "print(trio.run(ensure_devchain, sys.argv[1]))\n"
        "print('py-evm imported' if 'eth' in sys.modules else 'light')"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    asking = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    answers = [each.communicate(timeout=patience(60))[0].split("\n")[:2] for each in asking]
    try:
        assert len({url for url, _ in answers}) == 1
        assert {light for _, light in answers} == {"light"}
        second = spawn_devchain(tmp_path)
        assert second.wait(patience(20)) == BUSY_EXIT
        assert trio.run(url_of, tmp_path) == answers[0][0]
    finally:
        assert trio.run(stop_devchain, tmp_path) is True
    assert trio.run(url_of, tmp_path) is None
    assert trio.run(stop_devchain, tmp_path) is False


def test_idle_exit_and_the_same_port_again(tmp_path: Path) -> None:
    process = spawn_devchain(tmp_path, "--idle-exit", "0.3")
    assert process.wait(patience(20)) == 0
    with devchain(tmp_path) as first:
        Client(first).call("dev_faucet", address_of("again"))
    with devchain(tmp_path) as second:
        assert second == first
        assert Client(second).number("eth_getBalance", address_of("again")) == genesis.FAUCET_GIFT_WEI


def test_a_chain_that_cannot_start_says_where_to_look(tmp_path: Path) -> None:
    (tmp_path / "chain.sqlite").write_bytes(b"this is no database, but longer than a hundred bytes" * 4)
    with pytest.raises(DevChainError, match=r"status 1, see .*devchain\.log"):
        trio.run(ensure_devchain, tmp_path)
    assert "not a database" in (tmp_path / "devchain.log").read_text()


def test_sigterm_ends_it_cleanly(tmp_path: Path) -> None:
    process = spawn_devchain(tmp_path)
    while trio.run(url_of, tmp_path) is None:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(patience(10)) == 0


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_a_chain_whose_directory_was_deleted_ends_and_says_so(tmp_path: Path, is_made_anew: bool) -> None:
    where = tmp_path / "chain"
    process = spawn_devchain(where)
    while trio.run(url_of, where) is None:
        assert process.poll() is None
        time.sleep(0.05)
    log = (where / "devchain.log").open()  # the file lives on while it is open
    shutil.rmtree(where)
    if is_made_anew:
        with devchain(where) as url:
            assert Client(url).number("eth_chainId") == genesis.CHAIN_ID
            assert process.wait(patience(20)) == 4
    else:
        assert process.wait(patience(20)) == 4
        assert not where.exists(), "it has left nothing behind"
    with log:
        assert f"{where} was deleted" in log.read()


@trio_test
async def test_balances_over_web3(lab: Lab) -> None:
    key = key_of("balances")
    lab.gas_money(key.address)
    async with Rpc(lab.network) as rpc:
        assert await balances(rpc, lab.network, key.address) == (10**19, 0)
        head = await rpc.head()
        assert await rpc.block_hash(head.number) == head.hash
        assert await rpc.block_hash(head.number + 1_000) is None
        assert await rpc.priority_fee() == GWEI
        web3 = await rpc.web3()
        assert await web3.is_connected()


@trio_test
async def test_a_dev_chain_made_anew_is_taken_as_new(tmp_path: Path) -> None:
    key, payee = key_of("anew"), address_of("anew payee")
    try:
        for number in (1, 2):
            OURS.append(tmp_path / f"chain{number}")
            lab = Lab(await ensure_devchain(OURS[-1]), "devchain")
            lab.rich("anew")
            async with payer(lab, key, tmp_path / "chain.db") as wallet:
                await wallet.pay(f"b{number}", (payee, GLM))
                await wallet.until(TransferConfirmed)
                await wallet.pay("left over", (payee, GLM))
                if number == 1:
                    await wallet.engine.step()
                else:
                    while len(wallet.told(TransferConfirmed)) < 2:
                        await wallet.engine.step()
                        lab.mine()
                    await wallet.pay("b1", (payee, GLM))
                    await wallet.engine.step()
                    told = {event.batch_id for event in wallet.told(TransferConfirmed)}
                    assert told == {"left over", "b1", "b2"}, "what was paid on the old chain stays paid"
            assert lab.tokens(payee) == number * GLM
        async with payer(lab, key, tmp_path / "chain.db", dev_faucet=False) as wallet:
            wallet.engine.store.change_chain(lab.network.chain, "0x" + "11" * 32)
            await wallet.engine.submit(TransferBatch("b3", ((payee, GLM),)))
            await wallet.engine.step()
            assert wallet.problems == ["InvalidChainId"]
            assert "was replaced" in wallet.engine.problems()[0].detail
    finally:
        for number in (1, 2):
            await stop_devchain(tmp_path / f"chain{number}")


def test_another_chain_on_the_port_is_not_taken_for_ours(tmp_path: Path) -> None:
    with devchain(tmp_path / "a") as url:
        (tmp_path / "b").mkdir()
        port = int(url.rpartition(":")[2])
        (tmp_path / "b" / "chain.json").write_text(json.dumps({"port": port, "pid": 1, "chain_id": 1337}))
        assert trio.run(url_of, tmp_path / "a") == url
        assert trio.run(url_of, tmp_path / "b") is None
        (tmp_path / "b" / "chain.json").write_text("{")
        assert trio.run(url_of, tmp_path / "b") is None


def test_a_chain_hears_no_secret_of_the_node_that_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("YAGNA_AUTOCONF_ID_SECRET", "YAGNA_AUTOCONF_APPKEY", "GOLEM_PASSWORD"):
        monkeypatch.setenv(name, "5ec2e7")
    monkeypatch.setenv("GOLEM_NOTE", "no secret")
    trio.run(ensure_devchain, tmp_path)
    try:
        pid = json.loads((tmp_path / "chain.json").read_text())["pid"]
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"GOLEM_NOTE=no secret" in environment
        assert b"5ec2e7" not in environment
    finally:
        trio.run(stop_devchain, tmp_path)
