"""Settings of the environment that REST and the feeds of a real node keep to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from worlds.market_world import OFFER_CONSTRAINTS, OFFER_PROPERTIES
from worlds.node_in_test import APP_KEY, HEADERS, node_in_test
from worlds.patience import patience
from worlds.support import trio_test

from golem.config import ConfigError, config_from
from golem.daemon import forget_events
from golem.rest.app import create_app

MARKET = "/market-api/v1"


def settings(folder: Path, **environment: str) -> dict[str, Any]:
    """Return flags for `node_in_test` of a node that was given this environment."""
    config = config_from(environment, data_dir=folder)
    names = ("max_events", "max_events_default", "event_store_days", "cleanup_interval_s", "unresponsive_s", "inactivity_s")
    return {name: getattr(config, name) for name in names}


@trio_test
async def test_events_at_a_time(tmp_path: Path) -> None:
    flags = settings(tmp_path, MARKET_MAX_EVENTS_DEFAULT="2", MARKET_MAX_EVENTS_MAX="3")
    async with node_in_test(tmp_path, **flags) as node:
        client = create_app(node).test_client()
        body = json.dumps({"properties": OFFER_PROPERTIES, "constraints": OFFER_CONSTRAINTS})
        answer = await client.post(f"{MARKET}/offers", data=body, headers=HEADERS)
        offer = json.loads(await answer.get_data())
        for path in (f"offers/{offer}/events", "agreementEvents"):
            assert (await client.get(f"{MARKET}/{path}?timeout=0&maxEvents=3", headers=HEADERS)).status_code == 200
            answer = await client.get(f"{MARKET}/{path}?timeout=0&maxEvents=4", headers=HEADERS)
            assert answer.status_code == 400
            assert json.loads(await answer.get_data()) == {"message": "Invalid maxEvents '4', should be between 1 and 3."}


@trio_test
async def test_old_events_go_while_the_node_runs(tmp_path: Path) -> None:
    async with node_in_test(tmp_path) as node:
        with node.system.journal._writer as db:
            for seq, age_days in enumerate((91, 90.5, 2, 0), 1):
                db.execute("insert into feed values ('agreements', ?, ?, x'80')", (seq, node.clock() - age_days * 86400))
        for days, left in ((90, [3, 4]), (1, [4])):
            config = replace(node.config, event_store_days=days, cleanup_interval_s=0.01)
            with trio.move_on_after(patience(10)) as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(forget_events, node.system, config)
                    while [event.seq for event in node.system.feeds.read("agreements")] != left:
                        await trio.sleep(0.005)
                    nursery.cancel_scope.cancel()
            assert not scope.cancelled_caught, days


def test_settings_of_the_environment(tmp_path: Path) -> None:
    config = config_from({
        "YAGNA_AUTOCONF_APPKEY": APP_KEY, "UNRESPONSIVE_LIMIT_SECONDS": "45", "INACTIVITY_LIMIT_SECONDS": "2min",
        "MARKET_EVENT_STORE_DAYS": "7", "MARKET_DB_CLEANUP_INTERVAL": "1h", "MAX_REST_TIMEOUT": "30",
        "PAYMENT_CYCLE_DEFAULT_INTERVAL": "5min", "YAGNA_API_ALLOW_ORIGIN": "https://a.example, https://b.example",
    }, data_dir=tmp_path)  # fmt: skip
    assert (config.unresponsive_s, config.inactivity_s) == (45.0, 120.0)
    assert (config.event_store_days, config.cleanup_interval_s) == (7.0, 3600.0)
    assert (config.max_rest_timeout_s, config.payment_cycle_s) == (30.0, 300.0)
    assert APP_KEY not in repr(config)
    assert config.allow_origins == ("https://a.example", "https://b.example")


@pytest.mark.parametrize("name", ["UNRESPONSIVE_LIMIT_SECONDS", "MARKET_EVENT_STORE_DAYS", "MAX_REST_TIMEOUT"])
def test_settings_that_cannot_be_are_named(tmp_path: Path, name: str) -> None:
    for value in ("0", "soon", "1e99", "nan"):
        with pytest.raises(ConfigError, match=name):
            config_from({name: value}, data_dir=tmp_path)
