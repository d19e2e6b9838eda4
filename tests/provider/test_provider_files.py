"""Presets, hardware, names and rules of the provider agent, and the commands that edit them."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from click.testing import CliRunner
from worlds.support import mock_trio_test

from actors.provider.rules import Terms
from golem.base.dotenv_file import _NAMES
from golem.cli import main
from golem.config import ConfigError, config_from
from golem.exeunit.__main__ import offer_template
from golem.provider.client import NodeClient
from golem.provider.environment import SETTINGS, kept_settings, read_environment
from golem.provider.hardware import Profile, default_profile, load_profile, machine_profile
from golem.provider.offer import constraints, offer_spec, wanted_accounts
from golem.provider.offering import ACCOUNTS_S, LOOK_S, Offering
from golem.provider.presets import Preset, load_presets, parse_price
from golem.provider.runtimes import DOUBT_S, RETRY_S, ExeUnits, Template
from golem.provider.settings import Rules, Settings, SettingsError, interactions, keep_interactions, names, read_json, read_rules
from protocol.property_names import COEFFS, LOCAL_CHAIN, VECTOR
from protocol.provider import Capacity, OffersChanged, RulesChanged
from protocol.terms import compile_constraint, match

ME = "0x" + "a" * 40
ACCOUNT = {"platform": "erc20-local-tglm", "address": "0x" + "9" * 40, "network": "local"}
TEMPLATE = Template("wasmtime", {VECTOR: ["golem.usage.duration_sec", "golem.usage.cpu_sec"], "golem.runtime.version": "1.0.0"})


async def wasmtime_alone(runtime: str, units: ExeUnits) -> Template | str:
    return TEMPLATE if runtime == "wasmtime" else "no Docker Engine"


def cli(folder: Path, *arguments: str) -> Any:
    result = CliRunner().invoke(main, ["--json", "-d", str(folder), "provider", *arguments], catch_exceptions=False)
    return result


def test_the_default_price_is_within_what_sdk_examples_accept(tmp_path: Path) -> None:
    presets = load_presets(tmp_path).offered()
    assert [preset.runtime for preset in presets] == ["wasmtime", "vm"]
    for preset in presets:
        cpu, env = (preset.coeffs[f"golem.usage.{name}_sec"] * 3600 for name in ("cpu", "duration"))
        assert cpu <= 1
        assert env <= 0.5
        assert preset.initial_price <= 0.5
        assert preset.initial_price + cpu + env <= 1
        if preset.runtime == "vm":
            assert (cpu, env * 5) == pytest.approx((0.025, 0.025))
    assert json.loads((tmp_path / "presets.json").read_text())["presets"][0]["exeunit-name"] == "wasmtime"


def test_presets_by_command(tmp_path: Path) -> None:
    assert cli(tmp_path, "preset", "create", "fast", "--price", "CPU=0.002", "--price", "Init price=0.1").exit_code == 0
    assert cli(tmp_path, "preset", "activate", "fast").exit_code == 0
    assert cli(tmp_path, "preset", "deactivate", "wasmtime").exit_code == 0
    assert cli(tmp_path, "preset", "update", "fast", "--price", "Duration=0.001").exit_code == 0
    listed = {one["name"]: one for one in json.loads(cli(tmp_path, "preset", "list").output)}
    assert listed["fast"]["usage-coeffs"] == {"golem.usage.cpu_sec": 0.002, "golem.usage.duration_sec": 0.001}
    assert (listed["fast"]["initial-price"], listed["fast"]["active"], listed["wasmtime"]["active"]) == (0.1, True, False)
    assert cli(tmp_path, "preset", "remove", "wasmtime").exit_code == 0
    refused = cli(tmp_path, "preset", "activate", "wasmtime")
    assert refused.exit_code == 1
    assert "no preset named 'wasmtime'" in json.loads(refused.stderr)["message"]


def test_a_preset_sells_what_there_is(tmp_path: Path) -> None:
    for line in (["create", "mine", "--exe-unit", "nonsense"], ["update", "wasmtime", "--exe-unit", "nonsense"]):
        refused = cli(tmp_path, "preset", *line)
        assert refused.exit_code == 1
        assert "unknown runtime 'nonsense': this provider has wasmtime, vm" in json.loads(refused.stderr)["message"]
    assert [one["name"] for one in json.loads(cli(tmp_path, "preset", "list").output)] == ["wasmtime", "vm"]


def test_changed_presets_say_how_they_are_now(tmp_path: Path) -> None:
    def said(*line: str) -> str:
        result = CliRunner().invoke(main, ["-d", str(tmp_path), "provider", "preset", *line], catch_exceptions=False)
        assert (result.exit_code, result.stdout.count("\n")) == (0, 1), result.output
        return result.stdout.strip()

    sells = "Preset 'fast' sells wasmtime; GLM a unit: cpu_sec 0.002, once at the start: 0.1"
    assert said("create", "fast", "--price", "CPU=0.002", "--price", "Init price=0.1") == (
        f"{sells} (not offered: golem provider preset activate fast)."
    )
    assert said("activate", "fast") == f"{sells} (an agent that runs offers it)."
    assert "cpu_sec 0.003" in said("update", "fast", "--price", "CPU=0.003")
    assert "not offered" in said("deactivate", "fast")
    assert said("remove", "fast") == "There is no preset 'fast' any more."


def test_a_presets_file_of_an_older_version_gets_vm_once(tmp_path: Path) -> None:
    preset = {"name": "mine", "exeunit-name": "wasmtime", "initial-price": 0.0, "usage-coeffs": {}}
    folder = tmp_path / "provider"
    folder.mkdir()
    (folder / "presets.json").write_text(json.dumps({"ver": "V1", "active": ["mine"], "presets": [preset]}))
    assert [(one.name, one.runtime) for one in load_presets(folder).offered()] == [("mine", "wasmtime"), ("vm", "vm")]
    assert cli(tmp_path, "preset", "remove", "vm").exit_code == 0
    assert [one.name for one in load_presets(folder).all] == ["mine"], "what was removed stays away"
    (folder / "presets.json").write_text(json.dumps({"active": [], "presets": [{**preset, "name": "vm"}]}))
    assert [(one.name, one.runtime) for one in load_presets(folder).all] == [("vm", "wasmtime")], "the name is taken"


@pytest.mark.parametrize("price", ["CPU", "CPU=-1", "CPU=nan", "CPU=inf", "CPU=x", "Warp=1", "CPU=1e9"])
def test_bad_prices(tmp_path: Path, price: str) -> None:
    with pytest.raises(SettingsError):
        parse_price(price)
    refused = cli(tmp_path, "preset", "update", "wasmtime", "--price", price)
    assert refused.exit_code == 1
    assert "Traceback" not in refused.output


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"active":[],"presets":[{}]}', '{"active":[],"presets":[{"name":"a b","exeunit-name":"x"}]}', "null" * 2],
)
def test_a_damaged_presets_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "presets.json").write_text(content)
    with pytest.raises(SettingsError, match=r"presets\.json|name"):
        load_presets(tmp_path)


def test_hardware_defaults_and_shares(tmp_path: Path) -> None:
    assert default_profile(Profile(8, 16.0, 100.0)) == Profile(7, 11.2, 80.0)
    assert default_profile(Profile(1, 1.0, 1.0)).cpu_threads == 1
    machine, profile = machine_profile(tmp_path), load_profile(tmp_path)
    assert profile == load_profile(tmp_path), "written once, read again"
    assert 1 <= profile.cpu_threads <= machine.cpu_threads
    for agreements in (1, 2, 3, 7, 50):
        share = Profile(7, 11.2, 80.0).share(agreements)
        assert share.mem_gib * agreements <= 11.2
        assert share.storage_gib * agreements <= 80
        assert share.cpu_threads == max(1, 7 // agreements)
        assert isinstance(share.mem_gib, float)


def test_a_profile_above_the_machine_is_cut(tmp_path: Path) -> None:
    profile = {"cpu_threads": 10_000, "mem_gib": 1e6, "storage_gib": 1.0}
    (tmp_path / "hardware.json").write_text(json.dumps({"active": "x", "profiles": {"x": profile}}))
    found, machine = load_profile(tmp_path), machine_profile(tmp_path)
    assert (found.cpu_threads, found.mem_gib) == (machine.cpu_threads, machine.mem_gib)
    (tmp_path / "hardware.json").write_text(json.dumps({"active": "y", "profiles": {"x": profile}}))
    with pytest.raises(SettingsError, match=r"hardware\.json"):
        load_profile(tmp_path)


def test_an_offer_says_what_it_must() -> None:
    preset = Preset("p", "wasmtime", {"golem.usage.duration_sec": 5e-05, "golem.usage.cpu_sec": 1e-4}, 0.0)
    spec = offer_spec(preset, TEMPLATE, Profile(2, 4.0, 10.0), [ACCOUNT], "prov", "testnet", Terms())
    offer = json.loads(spec.properties)
    assert offer[VECTOR] == ["golem.usage.cpu_sec", "golem.usage.duration_sec"], "sorted by name"
    assert offer[COEFFS] == [1e-4, 5e-05, 0.0]
    assert all(isinstance(one, float) for one in offer[COEFFS])
    assert isinstance(offer["golem.inf.mem.gib"], float)
    assert offer["golem.com.payment.platform.erc20-local-tglm.address"] == ACCOUNT["address"]
    assert (offer["golem.com.scheme"], offer["golem.com.payment.protocol.version"]) == ("payu", 3)
    assert offer["golem.inf.cpu.cores"] <= offer["golem.inf.cpu.threads"] == 2


def test_an_offer_states_the_credit_of_a_stranger() -> None:
    """1.5 x price x threads x (interval + time to accept + pace of payments), 0.01 GLM at least; the least of its platforms."""
    prices = {"golem.usage.duration_sec": 5e-05, "golem.usage.cpu_sec": 1e-4}
    mainnet = {**ACCOUNT, "platform": "erc20-mainnet-glm"}
    for price, accounts, credit in (
        (prices, [ACCOUNT], 1.5 * (5e-05 + 2 * 1e-4) * (120 + 240 + 360)),
        (prices, [ACCOUNT, mainnet], 1.5 * (5e-05 + 2 * 1e-4) * (120 + 240 + 360)),
        (prices, [mainnet], 1.5 * (5e-05 + 2 * 1e-4) * (120 + 240 + 25 * 3600)),
        ({"golem.usage.duration_sec": 1e-9, "golem.usage.cpu_sec": 0.0}, [ACCOUNT], 0.01),
    ):
        spec = offer_spec(Preset("p", "wasmtime", price), TEMPLATE, Profile(2, 4.0, 10.0), accounts, "prov", "testnet", Terms())
        assert json.loads(spec.properties)["golem.com.payment.credit"] == pytest.approx(credit, abs=1e-6)


def test_an_offer_matches_a_demand_of_the_same_subnet() -> None:
    spec = offer_spec(Preset("p", "wasmtime"), TEMPLATE, Profile(2, 4.0, 10.0), [ACCOUNT], "prov", "testnet", Terms())
    wanted = "(&(golem.node.debug.subnet=testnet)(golem.com.pricing.model=linear)(golem.inf.mem.gib>=0.5))"
    now = 1_800_000_000.0
    late, early = now * 1000 + 1, 5
    for subnet, expires_ms, matches in (("testnet", late, True), ("public", late, False), ("testnet", early, False)):
        demand = {"golem.node.debug.subnet": subnet, "golem.srv.comp.expiration": int(expires_ms)}
        offer = json.loads(spec.properties)
        found = match(demand, compile_constraint(wanted), offer, compile_constraint(constraints("testnet", now)))
        assert bool(found) is matches


def test_an_offer_matches_only_demands_of_its_own_dev_chain() -> None:
    account = {**ACCOUNT, "chain": "00112233aabbccdd"}
    spec = offer_spec(Preset("p", "wasmtime"), TEMPLATE, Profile(2, 4.0, 10.0), [account], "prov", "testnet", Terms())
    offer, now = json.loads(spec.properties), 1_800_000_000.0
    assert offer[LOCAL_CHAIN] == account["chain"]
    offered = constraints("testnet", now, account["chain"])
    for chain, matches in (("00112233aabbccdd", True), ("00112233aabbccde", False), (None, True)):  # who says nothing may look
        demand = {"golem.node.debug.subnet": "testnet", "golem.srv.comp.expiration": int(now * 1000) + 1}
        demand |= {LOCAL_CHAIN: chain} if chain else {}
        wanted = f"({LOCAL_CHAIN}={chain})" if chain else "()"
        assert bool(match(demand, compile_constraint(wanted), offer, compile_constraint(offered))) is matches


@mock_trio_test
async def test_a_dev_chain_made_anew_renews_the_offers(tmp_path: Path) -> None:
    answers = [[{**ACCOUNT, "chain": name}] for name in ("first", "first", "second")] + [None]

    def node(request: httpx.Request) -> httpx.Response:
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return httpx.Response(200, json=found) if found else httpx.Response(503, json={"message": "the dev chain is not up"})

    told: list[str] = []

    class System:
        async def ask(self, actor: str, message: OffersChanged) -> None:
            told.extend(json.loads(spec.properties)[LOCAL_CHAIN] for spec in message.offers)

    settings = Settings(tmp_path, tmp_path / "node.json", "", "key", "prov")
    async with NodeClient(lambda: "http://node", "key", httpx.MockTransport(node)) as client:
        offers = Offering(settings, client, wasmtime_alone)
        assert [json.loads(spec.properties)[LOCAL_CHAIN] for spec in await offers.current()] == ["first"]
        with trio.move_on_after(ACCOUNTS_S + 2 * LOOK_S):
            await offers.watch(System())  # type: ignore[arg-type]
        assert told == []
        with trio.move_on_after(3 * ACCOUNTS_S):
            await offers.watch(System())  # type: ignore[arg-type]
        assert told == ["second"]


@pytest.mark.parametrize(("given", "accounts", "reach"), [
    ("", [{**ACCOUNT, "chain": "c"}], "local"),
    ("", [{**ACCOUNT, "chain": "c"}, ACCOUNT], "public"),
    ("", [], "public"),
    ("public", [{**ACCOUNT, "chain": "c"}], "public"),
    ("local", [ACCOUNT], "local"),
])  # fmt: skip
@mock_trio_test
async def test_transfers_reach_this_machine_where_only_play_money_is_paid_or_its_owner_says_so(
    tmp_path: Path, given: str, accounts: list[dict[str, str]], reach: str
) -> None:
    node = httpx.MockTransport(lambda request: httpx.Response(200, json=accounts))
    settings = Settings(tmp_path, tmp_path / "node.json", "", "key", "prov", transfers=given)
    async with NodeClient(lambda: "http://node", "key", node) as client:
        offers = Offering(settings, client, wasmtime_alone)
        if accounts:
            await offers.current()
        assert offers.units().flags()[-2:] == ["--transfer-policy", reach]


def test_what_transfers_may_reach_is_a_setting_and_stands_in_the_offer(tmp_path: Path) -> None:
    assert read_environment({}).transfers == ""
    assert read_environment({"GOLEM_TRANSFER_POLICY": "local"}).transfers == "local"
    with pytest.raises(SettingsError, match="GOLEM_TRANSFER_POLICY='lan': expected public or local"):
        read_environment({"GOLEM_TRANSFER_POLICY": "lan"})
    shown = json.loads(cli(tmp_path, "settings", "set", "GOLEM_TRANSFER_POLICY=public").output)["settings"]
    assert [one["value"] for one in shown if one["name"] == "GOLEM_TRANSFER_POLICY"] == ["public"]
    for reach in ("public", "local"):
        assert offer_template({}, reach=reach)["properties"]["golem.activity.caps.transfer.reach"] == reach


@mock_trio_test
async def test_rules_count_at_once(tmp_path: Path) -> None:
    told: list[Any] = []

    class System:
        async def ask(self, actor: str, message: Any) -> None:
            told.append(message)

    rules = tmp_path / "rules.json"
    settings = Settings(tmp_path, tmp_path / "node.json", "", "key", "prov")
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=[ACCOUNT]))
    async with NodeClient(lambda: "http://node", "key", transport) as client:
        offers = Offering(settings, client, wasmtime_alone)
        await offers.current()
        nobody = RulesChanged((), ())
        for content, changed in (
            ('{"allow-only": []}', nobody), ('{"allow_only": ["x"]}', nobody), ("{", nobody),
            (json.dumps({"blacklist": [ME]}), RulesChanged((ME,), None)), ("null", nobody), (None, RulesChanged((), None)),
        ):  # fmt: skip
            rules.unlink() if content is None else rules.write_text(content)
            told.clear()
            with trio.move_on_after(3 * LOOK_S):
                await offers.watch(System())  # type: ignore[arg-type]
            assert [one for one in told if isinstance(one, RulesChanged)] == [changed], content
            assert ("nobody" in offers.rules.words()) is (changed == nobody)


def test_a_preset_may_not_price_what_the_runtime_does_not_count() -> None:
    preset = Preset("p", "wasmtime", {"golem.usage.gpu_sec": 1.0})
    with pytest.raises(ValueError, match=r"does not count golem\.usage\.gpu_sec"):
        offer_spec(preset, TEMPLATE, Profile(2, 4.0, 10.0), [ACCOUNT], "prov", "public", Terms())


def test_accounts_by_network() -> None:
    other = {"platform": "erc20-hoodi-tglm", "address": "0x1", "network": "hoodi"}
    accounts = [ACCOUNT, other, {"platform": 3}, "nonsense"]
    assert wanted_accounts(accounts, ()) == [other, ACCOUNT]
    assert wanted_accounts(accounts, ("local",)) == [ACCOUNT]
    assert wanted_accounts(accounts, ("erc20-hoodi-tglm",)) == [other]
    assert wanted_accounts("nonsense", ()) == []


def test_the_machines_name_is_not_published(tmp_path: Path) -> None:
    found, _ = names({}, tmp_path, None, "testnet")
    assert re.fullmatch("golem-[0-9a-f]{6}", found)
    assert platform.node() not in found
    assert names({}, tmp_path, None, None) == (found, "testnet"), "and it stays"
    assert names({"NODE_NAME": platform.node()}, tmp_path, None, None)[0] == platform.node()


def test_names_are_kept(tmp_path: Path) -> None:
    assert names({}, tmp_path, "prov", "testnet") == ("prov", "testnet")
    assert names({}, tmp_path, None, None) == ("prov", "testnet")
    assert names({"NODE_NAME": "env"}, tmp_path, None, None) == ("env", "testnet")
    for name, subnet in (("", "a b"), ("x\n", "public"), ("y" * 101, "public")):
        with pytest.raises(SettingsError):
            names({}, tmp_path, name, subnet)


def test_what_requestors_may_do_inside_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "provider"
    assert interactions(folder) == ("shell", "proxy-http")
    keep_interactions(folder, shell=False, proxy_http=None)
    assert interactions(folder) == ("proxy-http",)
    shown = json.loads(cli(tmp_path, "settings", "set", "--no-proxy-http", "--subnet", "s").output)
    assert {key: shown[key] for key in shown if key != "settings"} == {
        "node_name": names({}, folder, None, None)[0], "subnet": "s", "shell": False, "proxy_http": False,
    }  # fmt: skip
    assert ExeUnits(None, interactions(folder)).flags() == ["--interaction", "", "--transfer-policy", "public"]
    assert json.loads(cli(tmp_path, "settings", "show").output)["shell"] is False
    (folder / "globals.json").write_text('{"shell": "no"}')
    with pytest.raises(SettingsError, match="shell must be true or false"):
        interactions(folder)


# -- runtimes that come and go
class Answers:
    """Self-tests by script: each runtime's next answer, the last one again and again."""

    def __init__(self, **answers: list[bool | str]) -> None:
        self.answers, self.asked = answers, []  # type: ignore[var-annotated]

    async def __call__(self, runtime: str, units: ExeUnits) -> Template | str:
        self.asked.append((trio.current_time(), runtime, units.interactions))
        left = self.answers[runtime]
        found = left.pop(0) if len(left) > 1 else left[0]
        await trio.sleep(1)
        return Template(runtime, {**TEMPLATE.properties, "with": units.interactions}) if found is True else str(found)


class Told:
    """The machine's side: which runtimes are offered, and since when."""

    def __init__(self) -> None:
        self.offers: list[tuple[float, list[str]]] = []

    async def ask(self, actor: str, message: OffersChanged) -> None:
        self.offers.append((trio.current_time(), sorted(spec.runtime for spec in message.offers)))


@asynccontextmanager
async def offering(tmp_path: Path, answers: Answers, **changes: Any) -> AsyncIterator[tuple[Offering, list[str], Told]]:
    settings = Settings(tmp_path / "provider", tmp_path / "node.json", "", "key", "prov", **changes)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=[ACCOUNT]))
    async with NodeClient(lambda: "http://node", "key", transport) as client, trio.open_nursery() as nursery:
        made, told = Offering(settings, client, answers), Told()
        first = [spec.runtime for spec in await made.current()]
        nursery.start_soon(made.watch, told)
        yield made, first, told
        nursery.cancel_scope.cancel()


@mock_trio_test
async def test_a_runtime_that_works_later_is_offered_then_and_withdrawn_when_it_fails(tmp_path: Path) -> None:
    engine: list[bool | str] = ["no Engine", "no Engine", True, True, "one hiccup", True, "the Engine is gone"]
    answers = Answers(wasmtime=[True], vm=engine)
    async with offering(tmp_path, answers) as (made, first, told):
        assert first == ["wasmtime"]
        report = {one["name"]: one for one in made.report()}
        assert (report["vm"]["offered"], report["vm"]["reason"], report["wasmtime"]["offered"]) == (False, "no Engine", True)
        await trio.sleep(2 * 62 + 10)
        assert [runtimes for _, runtimes in told.offers] == [["vm", "wasmtime"]], "as soon as a test says so"
        assert told.offers[0][0] < 2 * 62 + 10
        await trio.sleep(2 * 62 + RETRY_S + 5)
        assert len(told.offers) == 1, "one failure is looked at twice"
        await trio.sleep(70 + RETRY_S)
        assert told.offers[-1][1] == ["wasmtime"]
        assert {one["name"]: one["reason"] for one in made.report()}["vm"] == "the Engine is gone"


@mock_trio_test
async def test_a_runtime_whose_exe_units_end_badly_is_tested_soon(tmp_path: Path) -> None:
    async with offering(tmp_path, Answers(wasmtime=[True], vm=[True, "the Engine is gone"])) as (made, first, told):
        assert first == ["wasmtime", "vm"]
        await trio.sleep(3)
        made.runtimes.doubt("vm")
        await trio.sleep(DOUBT_S + RETRY_S + 5)
        assert told.offers[-1][1] == ["wasmtime"]


@mock_trio_test
async def test_nothing_works_yet_and_later_it_does(tmp_path: Path) -> None:
    async with offering(tmp_path, Answers(vm=["no Engine", True]), runtimes=("vm",)) as (_, first, told):
        assert first == []
        await trio.sleep(75)
        assert told.offers[-1][1] == ["vm"]


@mock_trio_test
async def test_a_test_that_hangs_holds_nothing_up(tmp_path: Path) -> None:
    answers = Answers(wasmtime=[True], vm=["never comes"])
    usual = answers.__call__

    async def ask(runtime: str, units: ExeUnits) -> Template | str:
        if runtime == "vm":
            await trio.sleep(50)
        return await usual(runtime, units)

    async with offering(tmp_path, ask) as (made, first, _):  # type: ignore[arg-type]
        assert first == ["wasmtime"]
        assert trio.current_time() < 25
        assert {one["name"]: one["reason"] for one in made.report()}["vm"] == "not tested yet"


@mock_trio_test
async def test_other_settings_and_descriptors_are_taken_up(tmp_path: Path) -> None:
    answers = Answers(wasmtime=[True], vm=[True], other=[True])
    async with offering(tmp_path, answers) as (made, _, told):
        keep_interactions(tmp_path / "provider", shell=False)
        await trio.sleep(10)
        assert {runtime for _, runtime, allowed in answers.asked if allowed == ("proxy-http",)} == {"vm", "wasmtime"}
        assert told.offers[-1][1] == ["vm", "wasmtime"]
        plugins = tmp_path / "provider" / "plugins"
        plugins.mkdir()
        one = {"name": "other", "version": "2.0", "supervisor-path": "exe-unit", "runtime-path": "x"}
        (plugins / "ya-other.json").write_text(json.dumps([one]))
        assert {one["name"]: (one["version"], one["reason"]) for one in made.report()}["other"] == (
            "2.0", "no active preset sells it",
        )  # fmt: skip
        assert cli(tmp_path, "preset", "create", "mine", "--exe-unit", "other").exit_code == 0
        assert cli(tmp_path, "preset", "activate", "mine").exit_code == 0
        await trio.sleep(10)
        assert told.offers[-1][1] == ["other", "vm", "wasmtime"]


def test_the_list_of_runtimes_without_an_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    (tmp_path / "ya-other.json").write_text(
        '[{"name":"other","version":"7","supervisor-path":"/usr/bin/exe-unit","runtime-path":"x"}]'
    )
    (tmp_path / "ya-bad.json").write_text("[")
    found = json.loads(cli(tmp_path, "exe-unit", "list", "--exe-unit-path", str(tmp_path)).output)
    rows = {one["name"]: one for one in found["runtimes"]}
    assert (rows["vm"]["works"], rows["vm"]["presets"]) == (False, ["vm"])
    assert "nothing.sock" in rows["vm"]["reason"]
    assert (rows["other"]["works"], rows["other"]["version"]) == (False, "7")
    assert "own supervisor, is started" in rows["other"]["reason"], "foreign supervisors are not"
    if rows["wasmtime"]["works"]:
        assert rows["wasmtime"]["reason"] == "no agent runs"
    assert not any(one["offered"] for one in rows.values())
    assert "ya-bad.json" in found["problems"][0]


@pytest.mark.parametrize(("content", "reason"), [
    ({"allow_only": [ME]}, "unknown key 'allow_only'"), ({"allowOnly": [ME]}, "unknown key"), ({"Blacklist": []}, "unknown key"),
    ({"blacklist": [], "comment": 1}, "unknown key"), ("null", "null"), ("[]", "expected a JSON object"),
    ("false", "JSON object"), ("0", "JSON object"), ('""', "JSON object"), ({"allow-only": None}, "list of node ids"),
    ({"allow-only": ""}, "list of node ids"), ({"allow-only": {}}, "list of node ids"), ({"blacklist": None}, "list of node ids"),
    ({"blacklist": ME}, "list of node ids"),
    ({"allow-only": [None]}, "not in order"), ({"allow-only": ["0x1"]}, "not in order"), ("", "not JSON"), ("{", "not JSON"),
    ('{"allow-only": [1], "allow-only": []}', "twice"), ('{"blacklist": [], "blacklist": []}', "twice"),
])  # fmt: skip
def test_rules_that_are_not_in_order_open_no_door(tmp_path: Path, content: Any, reason: str) -> None:
    (tmp_path / "rules.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SettingsError, match=r"rules\.json") as caught:
        read_rules(tmp_path)
    assert reason in str(caught.value)


def test_whom_rules_serve(tmp_path: Path) -> None:
    def rules(**content: list[str]) -> Rules:
        (tmp_path / "rules.json").write_text(json.dumps({name.replace("_", "-"): value for name, value in content.items()}))
        return read_rules(tmp_path)

    assert (read_rules(tmp_path), read_rules(tmp_path).words()) == (Rules(), "everybody")
    assert rules(allow_only=[]) == Rules(allow_only=frozenset())
    assert rules(allow_only=[]).words().startswith("nobody")
    assert rules(allow_only=[ME.upper().replace("X", "x")]).allow_only == {ME}
    assert rules(allow_only=[ME]).words() == "1 nodes of rules.json alone"
    assert rules(allow_only=[ME], blacklist=[ME]).words().startswith("nobody")
    assert rules(blacklist=[ME]).words() == "everybody but 1 nodes of rules.json"
    assert rules().words() == "everybody"


@pytest.mark.parametrize(("name", "content"), [
    ("globals.json", {"node_name": "x", "Shell": False}), ("globals.json", {"proxy-http": False}), ("globals.json", None),
    ("hardware.json", {"active": "a", "profiles": {"a": {"cpu_threads": 1, "mem_gib": 1, "storage_gib": 1, "gpu": 1}}}),
    ("hardware.json", {"active": "a", "profiles": {}, "x": 1}), ("hardware.json", None),
    ("presets.json", {"active": [], "presets": [], "only": []}), ("presets.json", None),
    ("presets.json", {"active": [], "presets": [
        {"name": "a", "exeunit-name": "vm", "initial-price": 1, "usage-coeffs": {}, "usage_coeffs": {}}]}),
])  # fmt: skip
def test_every_settings_file_refuses_what_it_does_not_know(tmp_path: Path, name: str, content: Any) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    read = {"globals.json": interactions, "hardware.json": load_profile, "presets.json": load_presets}[name]
    with pytest.raises(SettingsError, match=name.replace(".json", "")):
        read(tmp_path)


@pytest.mark.parametrize("name", ["GOLEM_MDNS", "GOLEM_PLAIN_KEY", "YAGNA_DEV_SKIP_ALLOCATION_VALIDATION"])
def test_switches_of_the_environment(name: str) -> None:
    field = {"GOLEM_MDNS": "mdns", "GOLEM_PLAIN_KEY": "plain_key"}.get(name, "skip_allocation_validation")
    for text in ("yes", "Yes", "ON", "true", "TRUE", "1", " on "):
        assert getattr(config_from({name: text}), field) is True
    for text in ("no", "No", "OFF", "false", "False", "0", "fAlSe"):
        assert getattr(config_from({name: text}), field) is False
    for text in ("nein", "2", "y es", "falsch", "yesno", "-"):
        with pytest.raises(ConfigError, match=name):
            config_from({name: text})
    assert getattr(config_from({name: ""}), field) is (name == "GOLEM_MDNS")


def test_rules(tmp_path: Path) -> None:
    assert read_rules(tmp_path).blacklist == frozenset()
    (tmp_path / "rules.json").write_text(json.dumps({"blacklist": ["0x" + "A" * 40]}))
    assert read_rules(tmp_path).blacklist == {"0x" + "a" * 40}
    (tmp_path / "rules.json").write_text(json.dumps({"blacklist": ["everybody"]}))
    with pytest.raises(SettingsError, match=r"rules\.json"):
        read_rules(tmp_path)


def test_files_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "big.json").write_bytes(b" " * (1024 * 1024 + 1))
    with pytest.raises(SettingsError, match="over"):
        read_json(tmp_path / "big.json", "file")


def test_status_without_an_agent_says_so(tmp_path: Path) -> None:
    refused = cli(tmp_path, "status")
    assert refused.exit_code == 1
    assert "golem provider run" in refused.output


def test_what_the_environment_gives() -> None:
    usual = read_environment({})
    assert (usual.terms, usual.idle_s, usual.approve_timeout_s) == (Terms(), 90, 10)
    assert (usual.max_agreements, usual.networks) == (None, ())
    given = read_environment({
        "IDLE_AGREEMENT_TIMEOUT": "2min", "AGREEMENT_APPROVE_TIMEOUT": "20s", "MAX_SIMULTANEOUS_AGREEMENTS": "3",
        "YA_PAYMENT_NETWORK": "holesky,hoodi", "YA_RT_CORES": "2", "YA_RT_MEM": "1.5", "DEBIT_NOTE_INTERVAL": "30",
        "MIN_AGREEMENT_EXPIRATION": "60", "DEBIT_NOTE_ACCEPTANCE_DEADLINE": "1min",
    })  # fmt: skip
    assert (given.idle_s, given.approve_timeout_s, given.max_agreements) == (120, 20, 3)
    assert given.networks == ("holesky", "hoodi")
    assert Profile(8, 16.0, 50.0).at_most(*given.most) == Profile(2, 1.5, 50.0)
    assert (given.terms.interval_s, given.terms.min_expiration_s, given.terms.accept_timeout_s) == (30, 60, 60)


@pytest.mark.parametrize("name", ["IDLE_AGREEMENT_TIMEOUT", "MAX_SIMULTANEOUS_AGREEMENTS", "YA_RT_CORES", "DEBIT_NOTE_INTERVAL"])
@pytest.mark.parametrize("value", ["-1", "0", "many", "nan"])
def test_what_the_environment_must_not_give(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        read_environment({name: value})


@mock_trio_test
async def test_the_offer_keeps_to_what_the_environment_gives(tmp_path: Path) -> None:
    given = read_environment({"YA_RT_CORES": "1", "YA_RT_MEM": "0.25", "YA_RT_STORAGE": "0.5", "DEBIT_NOTE_INTERVAL": "45"})
    settings = Settings(tmp_path, tmp_path / "node.json", "", "key", "prov", max_agreements=2, terms=given.terms, most=given.most)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=[ACCOUNT]))
    async with NodeClient(lambda: "http://node", "key", transport) as client:
        offers = Offering(settings, client, wasmtime_alone)
        (spec,) = await offers.current()
    offer = json.loads(spec.properties)
    found = [offer[f"golem.inf.{name}"] for name in ("cpu.threads", "mem.gib", "storage.gib")]
    assert found == [1, 0.125, 0.25]
    assert offer["golem.com.scheme.payu.debit-note.interval-sec?"] == 45
    assert offers.terms.max_agreements == 2
    assert offers.capacity == Capacity(2, 0.25, 0.5), "what both presets sell is sold once"


def test_settings_are_kept_and_say_where_they_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(*args: str) -> dict[str, tuple[Any, str]]:
        rows = json.loads(cli(tmp_path, "settings", *args).output)["settings"]
        return {row["name"]: (row["value"], row["from"]) for row in rows}

    monkeypatch.setenv("IDLE_AGREEMENT_TIMEOUT", "2min")
    found = shown("set", "GOLEM_CREDIT_FLOOR=0.5", "MAX_SIMULTANEOUS_AGREEMENTS=3", "IDLE_AGREEMENT_TIMEOUT=30")
    assert found["GOLEM_CREDIT_FLOOR"] == (0.5, "settings")
    assert found["IDLE_AGREEMENT_TIMEOUT"] == (120, "environment")
    assert found["GOLEM_CREDIT_FACTOR"] == (1.5, "default")
    assert found["YA_RT_CORES"] == (None, "default")
    assert set(found) == {one.name for one in SETTINGS}
    assert set(found) - _NAMES == {"GOLEM_TRANSFER_POLICY"}, "a .env may set each but what opens doors"
    given = read_environment({"IDLE_AGREEMENT_TIMEOUT": "2min"}, kept_settings(tmp_path / "provider"))
    assert (given.terms.credit_floor, given.max_agreements, given.idle_s) == (0.5, 3, 120)
    for wrong in ("GOLEM_CREDIT_FLOOR=-1", "GOLEM_CREDIT=1", "GOLEM_CREDIT_FLOOR"):
        assert cli(tmp_path, "settings", "set", "GOLEM_PAY_PACE=1", wrong).exit_code == 1
        assert shown("show") == found
    assert shown("set", "GOLEM_CREDIT_FLOOR=")["GOLEM_CREDIT_FLOOR"] == (0.01, "default")
    assert shown() == shown("show")


def test_every_setting_of_credit_is_in_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs/trust.md").read_text()
    terms = Terms()
    for one in SETTINGS:
        if one.name.startswith("GOLEM_") or "DEBIT_NOTE" in one.name or "TIMEOUT" in one.name:
            assert f"`{one.name}`" in text, one.name
    assert f"{terms.credit_floor:g} GLM" in text


def test_credit_has_settings() -> None:
    given = read_environment({"GOLEM_CREDIT_FLOOR": "0.5", "GOLEM_CREDIT_FACTOR": "2", "GOLEM_PAY_PACE": "30"}).terms
    assert (given.credit_floor, given.credit_factor, given.pay_pace_s, given.credit_growth) == (0.5, 2.0, 30.0, 0.1)
    with pytest.raises(SettingsError, match="GOLEM_CREDIT_GROWTH"):
        read_environment({"GOLEM_CREDIT_GROWTH": "much"})
