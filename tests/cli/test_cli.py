"""The command line against real nodes: text and JSON of the commands, refusals, and what `golem run` says and does."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner
from eth_account import Account
from eth_account.messages import encode_defunct
from eth_keys import keys
from worlds.patience import patience

from golem.cli import main
from golem.cli.run import _clear_text
from golem.config import MAX_SUBSCRIPTION_TTL_S, ConfigError, config_from
from golem.lab.localnet import LocalNet, LocalNode
from protocol.market import MAX_LIFETIME_S

pytestmark = [pytest.mark.integration]

GOLEM = [sys.executable, "-m", "golem.cli"]
STRANGER = "0x00000000000000000000000000000000000000aa"

PEER_ID = "16Uiu2HAmLAzw5aqXDBnegxiKDTDtPywPozUaFXxqvY3M3rZZziJe"  # of nobody


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalNode, LocalNode]]:
    """Two nodes that have met; the second is only there to be met."""
    net = LocalNet(tmp_path_factory.mktemp("cli"))

    async def start() -> tuple[LocalNode, LocalNode]:
        alice = await net.start_node("alice", wait=False)
        bob = await net.start_node("bob")
        await alice.wait_ready()
        return alice, bob

    try:
        alice, bob = trio.run(start)
        address = run_json(bob, "net", "status")["addresses"][0]
        until(lambda: golem(alice, "net", "connect", address).exit_code == 0, "the nodes meet")
        yield alice, bob
    finally:
        trio.run(net.stop)


@pytest.fixture
def alice(market: tuple[LocalNode, LocalNode]) -> LocalNode:
    return market[0]


def golem(node: LocalNode, *arguments: str, as_json: bool = False) -> Any:
    """Run a command in this process, as the script `golem` does, and return click's result."""
    flags = ["--json"] if as_json else []
    return CliRunner().invoke(main, [*flags, "--data-dir", str(node.data_dir), *arguments])


def run_json(node: LocalNode, *arguments: str) -> Any:
    result = golem(node, *arguments, as_json=True)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def run_text(node: LocalNode, *arguments: str) -> str:
    result = golem(node, *arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def until(holds: Any, what: str, timeout_s: float = 15.0) -> None:
    end = time.monotonic() + patience(timeout_s)
    while not holds():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


# -- commands


def test_identity(alice: LocalNode) -> None:
    shown = run_json(alice, "id", "show")
    assert shown["Ok"] == {
        "alias": alice.node_id[:10], "nodeId": alice.node_id, "isLocked": False, "isDefault": True, "deleted": False,
    }  # fmt: skip
    assert run_json(alice, "id", "list") == [
        {"default": "X", "locked": "", "delete in progress": "", "alias": alice.node_id[:10], "address": alice.node_id}
    ]
    assert f"nodeId: {alice.node_id}" in run_text(alice, "id", "show").splitlines()
    assert alice.node_id in run_text(alice, "id", "list")


def test_a_file_is_signed_as_wallets_sign(alice: LocalNode, tmp_path: Path) -> None:
    message = bytes(range(256)) * 20
    (tmp_path / "file").write_bytes(message)
    signature = bytes.fromhex(run_json(alice, "id", "sign", str(tmp_path / "file")))
    assert Account.recover_message(encode_defunct(message), signature=signature).lower() == alice.node_id
    public_key = keys.PublicKey(bytes.fromhex(run_json(alice, "id", "pub-key")))
    assert public_key.to_address() == alice.node_id
    assert run_text(alice, "id", "pub-key", alice.node_id).strip() == public_key.to_bytes().hex()


def test_app_keys(alice: LocalNode) -> None:
    key = run_json(alice, "app-key", "create", "one")
    assert re.fullmatch("[0-9a-f]{32}", key)
    assert run_text(alice, "app-key", "create", "one").strip() == key
    row = next(row for row in run_json(alice, "app-key", "list") if row["name"] == "one")
    assert row in json.loads(run_text(alice, "app-key", "list", "--json"))  # as the reference's users write it
    assert list(row) == ["name", "key", "id", "role", "created"]
    assert (row["key"], row["id"], row["role"]) == (key, alice.node_id, "manager")
    shown = run_json(alice, "app-key", "show", "one")
    assert list(shown) == ["name", "key", "role", "identity", "createdDate", "allowOrigins"]
    assert run_json(alice, "app-key", "drop", "one") is None
    assert run_text(alice, "app-key", "list").count(key) == 0


def test_network(market: tuple[LocalNode, LocalNode]) -> None:
    alice, bob = market
    status = run_json(alice, "net", "status")
    assert {"nodeId", "listenAddress", "publicAddress", "sessions", "bandwidth"} <= set(status)
    assert (status["nodeId"], status["sessions"]) == (alice.node_id, 1)
    session = run_json(alice, "net", "sessions")[0]
    assert list(session) == ["nodeId", "address", "type", "seen", "time", "ping", "in [MiB]", "out [MiB]"]
    assert session["nodeId"] == bob.node_id
    ping = run_json(alice, "net", "ping", bob.node_id)[0]
    assert list(ping) == ["nodeId", "alias", "p2p", "ping (tcp)", "ping (udp)"]
    assert 0 < ping["ping (tcp)"] < 5000
    assert run_json(alice, "net", "connect", bob.node_id)["identities"] == [bob.node_id]
    assert bob.node_id in run_text(alice, "net", "sessions")
    found = run_json(alice, "net", "find", bob.node_id)
    assert found["identities"] == [bob.node_id]
    assert found["endpoints"][0].startswith("/ip4/")
    assert run_json(alice, "net", "list-neighbors", "8") == [bob.node_id]
    assert run_json(alice, "net", "list-neighbors", "0") == []
    assert run_text(alice, "net", "list-neighbors", "8").splitlines() == [bob.node_id]
    (one,) = run_json(alice, "net", "sockets")
    assert list(one) == ["type", "port", "to addr", "to port", "state", "out [KiB/s]", "in [KiB/s]"]
    assert f"/ip4/{one['to addr']}/tcp/{one['to port']}" == session["address"]
    assert run_json(alice, "net", "connect", bob.node_id, "--keep-alive")["identities"] == [bob.node_id]


def test_payment(alice: LocalNode) -> None:
    funded = run_text(alice, "payment", "fund")
    assert "1000 tGLM" in funded
    status = run_json(alice, "payment", "status")
    assert (status["driver"], status["network"], status["token"], status["amount"]) == ("erc20", "hoodi", "tGLM", "1000")
    nothing = {"totalAmount": "0", "agreementsCount": 0}
    assert status["outgoing"] == status["incoming"] == {"requested": nothing, "accepted": nothing, "confirmed": nothing}
    assert {"currency_short_name", "currency_long_name", "balance"} <= set(status["gas"])
    assert "no real money" in run_text(alice, "payment", "status")
    accounts = run_json(alice, "payment", "accounts")
    assert {row["platform"] for row in accounts} >= {"erc20-holesky-tglm", "erc20-hoodi-tglm"}
    assert all(row["address"] == alice.node_id and row["send"] is True for row in accounts)
    assert "no real money" in run_text(alice, "payment", "accounts")
    assert run_json(alice, "payment", "init", "--sender") is None
    drivers = run_json(alice, "payment", "driver", "list")
    assert (drivers["erc20"]["default_network"], drivers["erc20"]["recv_init_required"]) == ("hoodi", False)
    holesky = {"default_token": "tGLM", "tokens": {"tGLM": "erc20-holesky-tglm"}}
    assert drivers["erc20"]["networks"]["holesky"] == holesky
    assert "no real money" in run_text(alice, "payment", "driver", "list")


def test_books(alice: LocalNode, tmp_path: Path) -> None:
    assert "The books add up: 0 documents" in run_text(alice, "payment", "audit")
    assert run_json(alice, "payment", "audit")["addsUp"] is True
    for name, words in (("invoices", "No invoices."), ("debtors", "Nobody owes this node anything.")):
        assert words in golem(alice, "payment", name).stderr
        assert run_json(alice, "payment", name) == []
    header = "date,kind,document,agreement,peer,direction,amount,paymentPlatform,status,due,transaction"
    assert run_text(alice, "payment", "export", "--csv").splitlines() == [header]
    assert "0 documents" in run_text(alice, "payment", "export", "--output", str(tmp_path / "books.csv"))
    assert (tmp_path / "books.csv").read_text().startswith(header)
    assert "no living allocation" in golem(alice, "payment", "release", "nope").output


def test_market_and_trace(alice: LocalNode) -> None:
    import httpx

    headers = {"Authorization": f"Bearer {alice.app_key}"}
    expires_ms = int((time.time() + 1800) * 1000)
    demand = {"properties": {"golem.srv.comp.expiration": expires_ms}, "constraints": "(golem.runtime.name=of-nobody)"}
    answer = httpx.post(f"{alice.api_url}/market-api/v1/demands", json=demand, headers=headers)
    assert answer.status_code == 201, answer.text
    assert "matching: 0" in run_text(alice, "market", "explain", answer.json())
    assert run_json(alice, "market", "explain", answer.json())["offers"]["matching"] == 0
    story = run_text(alice, "trace", answer.headers["X-Trace-Id"])
    assert "PublishDemand" in story
    assert "SubscriptionOpened" in story
    assert run_json(alice, "market", "agreements", "list") == []
    assert run_text(alice, "market", "agreements", "list") == "No agreements.\n"


def subscribe(node: LocalNode, kind: str, properties: dict[str, Any], constraints: str = "()") -> str:
    import httpx

    body = {"properties": properties, "constraints": constraints}
    headers = {"Authorization": f"Bearer {node.app_key}"}
    answer = httpx.post(f"{node.api_url}/market-api/v1/{kind}s", json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json())


def test_what_is_on_the_market(market: tuple[LocalNode, LocalNode]) -> None:
    alice, bob = market
    prices = {"golem.com.usage.vector": ["golem.usage.cpu_sec"], "golem.com.pricing.model.linear.coeffs": [0.5, 2]}
    offer = {"golem.runtime.name": "abacus", "golem.inf.mem.gib": 4, "golem.node.id.name": "b\x1b[2Job", **prices}
    of_bob = subscribe(bob, "offer", offer)
    of_alice = subscribe(alice, "offer", {"golem.runtime.name": "pebbles", "golem.node.debug.subnet": "beach"})
    demand = subscribe(alice, "demand", {"golem.node.debug.subnet": "beach"}, "(golem.runtime.name=abacus)")

    def offers(*filters: str) -> list[str]:
        return [row["id"] for row in run_json(alice, "market", "offers", *filters)]

    until(lambda: of_bob in offers(), "the offer of the other node arrives")
    assert set(offers()) >= {of_bob, of_alice}
    assert of_bob not in offers("--own")
    assert of_alice not in offers("--others")
    assert offers("--runtime", "abacus") == [of_bob] == offers("--provider", bob.node_id[:8], "--runtime", "abacus")
    assert offers("--subnet", "beach") == [of_alice]
    assert offers("--constraints", "(golem.inf.mem.gib>=4)") == [of_bob]
    assert f"The newest 1 of {len(offers())}" in run_text(alice, "market", "offers", "--limit", "1")
    row = next(row for row in run_json(alice, "market", "offers") if row["id"] == of_bob)
    assert (row["owner"], row["own"], row["runtime"]) == (bob.node_id, False, "abacus")
    assert row["prices"] == {"golem.usage.cpu_sec": 0.5, "start": 2}
    shown = run_text(alice, "market", "offers", "--runtime", "abacus")
    assert "cpu_sec 0.5, start 2" in shown
    assert "\x1b" not in shown
    assert [row["id"] for row in run_json(alice, "market", "demands")][-1] == demand
    assert demand[:12] in run_text(alice, "market", "demands")
    assert of_bob in run_json(alice, "market", "show", "offer", of_bob[:12]).values()

    # ids by their first digits
    assert run_text(alice, "market", "explain", demand[:12], of_bob[:12]).splitlines() == ["They match."]
    assert "matching: 1" in run_text(alice, "market", "explain", demand[:14].upper())
    refused = golem(alice, "market", "explain", "")
    assert (refused.exit_code, refused.stdout) == (1, "")
    for _ in range(15):  # with the two there are, two begin with the same of sixteen digits
        subscribe(alice, "offer", {})
    first = next(one for one in "0123456789abcdef" if sum(each.startswith(one) for each in offers()) > 1)
    ambiguous = golem(alice, "market", "show", "offer", first)
    assert (ambiguous.exit_code, ambiguous.stdout) == (1, "")
    assert "ids: " in ambiguous.stderr
    assert "give more of it" in ambiguous.stderr
    assert run_json(alice, "net", "ping", bob.node_id[:10])[0]["nodeId"] == bob.node_id


def test_errors_for_programs_are_json(alice: LocalNode, tmp_path: Path) -> None:
    for line, status, words in (
        (("payment", "status", "--network", "nope"), 1, "unknown network 'nope'"),
        (("market", "agreements", "get", "--id", "xx"), 1, "Invalid agreement id"),
        (("payment", "status", "--nope"), 2, "No such option"),
        (("nothing",), 2, "No such command"),
        (("payment", "trace"), 2, "Missing argument"),
    ):
        for arguments in (["--json", "-d", str(alice.data_dir), *line], ["-d", str(alice.data_dir), *line, "--json"]):
            result = CliRunner().invoke(main, arguments)
            assert (result.exit_code, result.stdout) == (status, ""), arguments
            found = json.loads(result.stderr)
            assert (found["status"], words in found["message"]) == (status, True), found
    without = CliRunner().invoke(main, ["--json", "-d", str(tmp_path), "status"])
    assert json.loads(without.stderr)["message"].startswith("no node is running")
    assert CliRunner().invoke(main, ["-d", str(tmp_path), "status"]).stderr.startswith("Error: no node is running")


def test_what_succeeds_says_what_is_true_now(market: tuple[LocalNode, LocalNode]) -> None:
    alice, bob = market
    assert "can pay and be paid on hoodi" in run_text(alice, "payment", "init")
    run_text(alice, "app-key", "create", "short-lived")
    assert "'short-lived' is deleted" in run_text(alice, "app-key", "drop", "short-lived")
    assert bob.node_id in run_text(alice, "net", "disconnect", bob.node_id[:12])
    assert run_json(alice, "net", "connect", bob.node_id)["identities"] == [bob.node_id]


def test_stopping_the_chain_beside_a_running_node(alice: LocalNode) -> None:
    folder = Path(run_json(alice, "status")["chainDir"])
    said = run_text(alice, "chain", "stop", "--chain-dir", str(folder))
    assert "is stopped; its blocks stay" in said
    assert f"The node on {alice.data_dir} runs and starts it again within" in said
    assert "golem service shutdown" in said
    until(lambda: (folder / "chain.json").exists(), "the node starts the chain again", 30)
    other = run_text(alice, "chain", "stop", "--chain-dir", str(alice.data_dir / "no-chain"))
    assert other.splitlines() == [f"No dev chain was running in {alice.data_dir / 'no-chain'}."]


def test_about_the_program(alice: LocalNode) -> None:
    for asked in ("show", "check"):
        assert run_json(alice, "version", asked)["current"]["version"].count(".") == 2
    assert run_json(alice, "version", "skip") is None
    assert run_json(alice, "consent", "show") == {"consents": []}
    assert run_text(alice, "consent", "show") == run_text(alice, "consent", "deny", "stats")
    assert run_json(alice, "extension", "list") == []
    assert run_json(alice, "activity", "status") == {"last1h": {}, "total": {}, "lastActivityTs": None}
    assert "complete" in run_text(alice, "complete", "bash")
    status = run_json(alice, "status")
    assert (status["nodeId"], status["apiUrl"], status["profile"]) == (alice.node_id, alice.api_url, "local")
    assert f"nodeId: {alice.node_id}" in run_text(alice, "status")


def test_command_lists_are_not_cut() -> None:
    for group in ([], ["payment"], ["net"], ["market"], ["id"], ["app-key"], ["provider"], ["chain"], ["service"],
                  ["activity"], ["image"], ["wallet"], ["quarantine"]):  # fmt: skip
        text = CliRunner().invoke(main, [*group, "--help"]).stdout
        assert "..." not in text.partition("Commands:")[2], text


@pytest.mark.parametrize(("arguments", "expected"), [
    (("app-key", "drop", "nobody"), "no app-key named 'nobody'"),
    (("app-key", "show", "nobody"), "no app-key named 'nobody'"),
    (("app-key", "create", "x" * 101), "1 to 100 characters"),
    (("app-key", "create", "x", "--id", STRANGER), "one identity"),
    (("id", "show", STRANGER), "one identity"),
    (("id", "show", "0x12"), "not a node id"),
    (("id", "pub-key", STRANGER), "one identity"),
    (("id", "sign", __file__, "--id", STRANGER), "one identity"),
    (("app-key", "drop", "nobody", "--id", STRANGER), "one identity"),
    (("app-key", "show", "nobody", "--id", STRANGER), "one identity"),
    (("consent", "allow", "stats"), "Nothing is sent"),
    (("extension", "register", "x", "--path", "/bin/x"), "REST API"),
    (("net", "find", STRANGER), "was never met"),
    (("net", "find", "0x12"), "not a node id"),
    (("net", "ping", "0x12"), "not a node id"),
    (("net", "connect", "/ip4/1.2.3.4"), "expected /ip4/<address>/tcp/<port>/p2p/<peer id>"),
    (("net", "connect", f"/ip4/127.0.0.1/tcp/9/p2p/{PEER_ID}"), "(/ip4/127.0.0.1/tcp/9: Connection refused)"),
    (("net", "connect", STRANGER), f"no address of {STRANGER} is known"),
    (("net", "disconnect", "x"), "not a node id"),
    (("payment", "status", "--network", "nope"), "unknown network 'nope'; known: local, holesky, hoodi"),
    (("payment", "fund", "--network", "nope"), "unknown network 'nope'"),
    (("payment", "init", "--network", "nope"), "unknown network 'nope'"),
    (("payment", "trace", "nope"), "no debt of this node is known as nope"),
    (("payment", "decide", "nope", "--unpaid"), "no payment nope is known here"),
    (("market", "explain", "nope"), "not found"),
    (("market", "agreements", "get", "--id", "xx"), "Invalid agreement id"),
    (("trace", "000000000000"), "under trace 000000000000"),
    (("provider", "status"), "no provider agent has run"),
])  # fmt: skip
def test_refused_commands_say_why(alice: LocalNode, arguments: tuple[str, ...], expected: str) -> None:
    result = golem(alice, *arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ")
    assert expected in result.stderr
    assert result.stdout == ""


def test_rest_beyond_this_machine_is_warned_of() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "2001:db8::1", "myhost"):
        assert "app-key" in _clear_text(host)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.5"):
        assert _clear_text(host) == ""


def test_without_a_node(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--data-dir", str(tmp_path), "status"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: no node is running on {tmp_path}")


# -- golem run


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GOLEM_", "YAGNA_"))}
    elsewhere = {"GOLEM_CHAIN_DIR": str(tmp_path / "chain"), "GOLEM_CHAIN_URL": "http://127.0.0.1:9"}
    return {**kept, **elsewhere, "YAGNA_API_URL": "http://127.0.0.1:0", **variables}


def command_line(folder: Path, *flags: str) -> list[str]:
    return [*GOLEM, "--data-dir", str(folder), "run", "--no-mdns", "--listen", "127.0.0.1:0", *flags]


def refused(tmp_path: Path, *flags: str, folder: Path | None = None, **variables: str) -> str:
    """Start a node that must end at once, and return what it says."""
    result = subprocess.run(
        command_line(folder or tmp_path / "node", *flags), env=environment(tmp_path, **variables), capture_output=True,
        text=True, timeout=patience(20), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode in (1, 2), result
    assert "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip().splitlines()[-1]


def started(tmp_path: Path, *flags: str, **variables: str) -> subprocess.Popen[str]:
    """Start a node on free ports and return when it serves."""
    folder = tmp_path / "node"
    process = subprocess.Popen(
        command_line(folder, "--api-url", "http://127.0.0.1:0", *flags), env=environment(tmp_path, **variables),
        stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
    )  # fmt: skip

    def serves() -> bool:
        assert process.poll() is None, process.communicate()[1]
        try:
            return json.loads((folder / "node.json").read_text())["pid"] == process.pid
        except (OSError, ValueError):
            return False

    until(serves, "the node serves")
    return process


def ended(process: subprocess.Popen[str], sign: int, timeout_s: float = 4.0) -> str:
    """Stop a node within the time, and return what it said."""
    process.send_signal(sign)
    text = process.communicate(timeout=patience(timeout_s))[1]
    assert process.returncode == 0, text
    assert "Traceback" not in text, text
    return text


@pytest.mark.parametrize(("flags", "expected"), [
    (("--api-url", "https://x"), "expected http://HOST:PORT"),
    (("--api-url", "127.0.0.1:99999"), "Port out of range"),
    (("--listen", "foo"), 'a listen address is "host:port", got \'foo\''),
    (("--listen", "192.0.2.77:5"), "cannot listen on 192.0.2.77:5"),
    (("--bootstrap", "foo"), "expected /ip4/<address>/tcp/<port>/p2p/<peer id>, got 'foo'"),
    (("--network-name", "a/b"), "network name 'a/b'"),
    (("--profile", "nope"), "'nope' is not one of"),
    (("--profile", "testnet", "--chain-url", "http://127.0.0.1:9"), "the profile testnet does not use"),
    (("--chain-url", "127.0.0.1:9"), "expected http://HOST:PORT"),
    (("--chain-dir", "/proc/nowhere"), "cannot use the chain directory /proc/nowhere"),
])  # fmt: skip
def test_bad_flags(tmp_path: Path, flags: tuple[str, ...], expected: str) -> None:
    assert expected in refused(tmp_path, "--plain-key", "--api-url", "http://127.0.0.1:0", *flags, GOLEM_CHAIN_URL="")
    assert not (tmp_path / "node" / "identity.key").exists(), "no key is made where nothing starts"


@pytest.mark.parametrize(("name", "value"), [
    ("DEFAULT_SUBSCRIPTION_TTL", "3h"), ("DEFAULT_SUBSCRIPTION_TTL", "nan"), ("DEFAULT_SUBSCRIPTION_TTL", "-1"),
    ("PAYMENT_CYCLE_DEFAULT_INTERVAL", "soon"), ("MARKET_MAX_EVENTS_MAX", "0"), ("MARKET_MAX_EVENTS_DEFAULT", "many"),
    ("GOLEM_PROFILE", "nope"), ("YAGNA_API_URL", "ftp://x"), ("YAGNA_AUTOCONF_APPKEY", "with a space"),
    ("YAGNA_AUTOCONF_APPKEY", "short"),
])  # fmt: skip
def test_bad_variables(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(value) if name != "YAGNA_AUTOCONF_APPKEY" else name):
        config_from({name: value})


def test_durations() -> None:
    for text, seconds in (("90", 90), ("1.5min", 90), ("2m", 120), ("20 s", 20), ("2h", 7200), ("", 3600)):
        assert config_from({"DEFAULT_SUBSCRIPTION_TTL": text}).subscription_ttl_s == seconds
    assert MAX_SUBSCRIPTION_TTL_S == MAX_LIFETIME_S


@pytest.mark.parametrize("file", ["peers.db", "chain.db", "node.db", "identity.key", "app-keys.json", "steps.log"])
def test_unusable_files(tmp_path: Path, file: str) -> None:
    """A directory stands where the file should: root, too, cannot read it."""
    (tmp_path / "node" / file).mkdir(parents=True)
    text = refused(tmp_path, "--plain-key", "--api-url", "http://127.0.0.1:0")
    assert text.startswith("Error: ")
    assert str(tmp_path / "node" / file) in text


@pytest.mark.parametrize(("file", "content", "expected"), [
    ("networks.json", "{", "networks.json is not JSON"),
    ("networks.json", '[{"name": "x", "chain_id": "1", "rpc_urls": [], "token": "x"}]', "networks.json, row 0"),
    ("node.db", "no database at all", "node.db is damaged (file is not a database)"),
    ("chain.db", "no database at all", "chain.db is damaged (file is not a database)"),
    ("app-keys.json", "x", "app-keys.json is not JSON"),
    ("identity.key", "zz", "identity.key: a private key is 64 hex digits"),
    ("keystore.json", "{}", "keystore.json is damaged"),
])  # fmt: skip
def test_damaged_files(tmp_path: Path, file: str, content: str, expected: str) -> None:
    folder = tmp_path / "node"
    folder.mkdir()
    (folder / file).write_text(content)
    password = {"GOLEM_PASSWORD": "a long secret"} if file == "keystore.json" else {}
    flags = () if password else ("--plain-key",)
    assert expected in refused(tmp_path, "--api-url", "http://127.0.0.1:0", *flags, **password)


def test_the_data_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refused(tmp_path, "--plain-key", folder=tmp_path / "file").endswith("it is a file")


def test_a_taken_directory_and_a_taken_port(tmp_path: Path) -> None:
    process = started(tmp_path, "--plain-key")
    try:
        assert "another node runs on" in refused(tmp_path, "--plain-key", "--api-url", "http://127.0.0.1:0")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            for flag in ("--api-url", "--listen"):
                text = refused(tmp_path, "--plain-key", flag, f"127.0.0.1:{port}", folder=tmp_path / "other")
                assert f"127.0.0.1:{port}: Address already in use" in text
    finally:
        text = ended(process, signal.SIGTERM)
    assert "is ready" in text
    assert "no real money" in text
    assert not (tmp_path / "node" / "node.json").exists()


def test_an_encrypted_key(tmp_path: Path) -> None:
    assert "needs a password" in refused(tmp_path)
    password, wrong, empty = tmp_path / "password", tmp_path / "wrong", tmp_path / "empty"
    password.write_text("secret-word\n"), wrong.write_text("terces-drow"), empty.touch()
    node_ids = []
    for given in ({"GOLEM_PASSWORD": "secret-word"}, {"GOLEM_PASSWORD_FILE": str(password)}):
        process = started(tmp_path, **given)
        node_ids.append(json.loads((tmp_path / "node" / "node.json").read_text())["nodeId"])
        text = ended(process, signal.SIGINT)
        assert "secret" not in text
    assert node_ids[0] == node_ids[1]
    keystore = tmp_path / "node" / "keystore.json"
    assert keystore.stat().st_mode & 0o777 == 0o600
    assert "wrong password" in refused(tmp_path, "--password-file", str(wrong))
    assert "is empty" in refused(tmp_path, "--password-file", str(empty))
    assert "does not exist" in refused(tmp_path, "--password-file", str(tmp_path / "nothing"))


def test_a_password_typed_at_a_terminal(tmp_path: Path) -> None:
    person, terminal = pty.openpty()
    line = command_line(tmp_path / "node", "--api-url", "http://127.0.0.1:0")
    process = subprocess.Popen(line, env=environment(tmp_path), stdin=terminal, stdout=terminal, stderr=terminal,
                               start_new_session=True)  # fmt: skip
    os.close(terminal)
    seen = ""

    def shown(text: str) -> None:
        nonlocal seen
        end = time.monotonic() + patience(15)
        while text not in seen:
            assert select.select([person], [], [], max(0.0, end - time.monotonic()))[0], seen
            seen += os.read(person, 4096).decode()
        seen = seen.partition(text)[2]

    try:
        for prompt, typed in (("Choose a password for this node's new key:", "password 1"),
                              ("Repeat for confirmation:", "password 2"), ("do not match", ""), ("new key:", "password 1"),
                              ("Repeat for confirmation:", "password 1")):  # fmt: skip
            shown(prompt)
            if typed:
                until(lambda: not termios.tcgetattr(person)[3] & termios.ECHO, "the terminal's echo goes off")
                os.write(person, f"{typed}\n".encode())
        shown("is ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(patience(5)) == 0
    finally:
        process.kill()
        process.wait()
        os.close(person)


def test_killed_and_started_again(tmp_path: Path) -> None:
    process = started(tmp_path, "--plain-key")
    node = LocalNode("killed", tmp_path / "node", "", None)  # type: ignore[arg-type]
    key = run_json(node, "app-key", "create", "kept")
    before = run_json(node, "id", "show")
    process.kill()
    process.communicate()
    assert golem(node, "status").stderr.startswith("Error: no node is running")
    process = started(tmp_path, "--plain-key")
    try:
        assert (run_json(node, "app-key", "create", "kept"), run_json(node, "id", "show")) == (key, before)
        assert run_json(node, "service", "shutdown") is None
        assert process.wait(patience(5)) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.root
def test_a_full_disk_does_not_end_the_node(tmp_path: Path) -> None:
    disk = tmp_path / "node"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        process = started(tmp_path, "--plain-key", YAGNA_AUTOCONF_APPKEY="a-key-of-mine")
        try:
            text = _live_through(disk, process, partial(_fill_up, disk), (disk / "fill").unlink, "database or disk is full")
        finally:
            process.kill()
        assert "Traceback" not in text
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.parametrize("name", ["node.db", "chain.db"])
def test_a_locked_database_does_not_end_the_node(tmp_path: Path, name: str) -> None:
    process = started(tmp_path, "--plain-key", YAGNA_AUTOCONF_APPKEY="a-key-of-mine")
    other = sqlite3.connect(tmp_path / "node" / name, isolation_level=None)
    try:
        words = "database is locked" if name == "node.db" else ""
        text = _live_through(
            tmp_path / "node", process, partial(other.execute, "begin exclusive"), partial(other.execute, "rollback"), words
        )
    finally:
        process.kill()
        other.close()
    assert "Traceback" not in text


def _fill_up(disk: Path) -> None:
    with (disk / "fill").open("wb", buffering=0) as fill, suppress(OSError):
        while True:
            fill.write(bytes(1024))


def _live_through(data_dir: Path, process: Any, begin: Any, end: Any, words: str) -> str:
    """Let a node live through a disk that takes nothing (for these words, if any); return what it said on stderr."""
    import httpx

    found = json.loads((data_dir / "node.json").read_text())
    key = {"Authorization": "Bearer a-key-of-mine"}
    with httpx.Client(base_url=found["apiUrl"], headers=key, timeout=patience(30)) as client:

        def publish(number: int) -> httpx.Response:
            text = {"n": number, "text": "x" * 20_000}
            return client.post("/market-api/v1/demands", json={"properties": text, "constraints": "()"})

        def demands() -> int:
            return len(client.get("/market-api/v1/demands").raise_for_status().json())

        assert publish(0).status_code == 201
        begin()
        taken, answer = 1, publish(1)
        while words and answer.status_code == 201:  # what the disk had set aside is used up first
            taken, answer = taken + 1, publish(taken + 1)
        if words:
            assert answer.status_code == 503, answer.text
            assert words in answer.json()["message"]
            for number in range(5):
                assert publish(100 + number).status_code == 503
            assert words in client.get("/healthcheck").json()["detail"]
            assert demands() == taken, "reads go on, and nothing is there that was refused"
        else:
            taken += 1
        assert process.poll() is None
        end()
        until = time.monotonic() + patience(30)
        while publish(200).status_code != 201:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert demands() == taken + 1
    process.send_signal(signal.SIGTERM)
    text: str = process.communicate(timeout=patience(20))[1]
    assert process.returncode == 0, text
    return text


def test_a_node_is_light_to_import() -> None:
    """What the start waits for; libp2p and web3 are loaded in threads once REST answers."""
    heavy = ("libp2p", "web3", "eth_utils", "pydantic", "eth", "zeroconf", "numpy")
    program = f"import sys, golem.node, golem.rest.app; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
