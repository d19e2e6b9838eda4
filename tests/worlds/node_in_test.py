"""A whole node inside a test: real actors, journal, bus, network host and REST application, without a process of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from golem.config import config_from
from golem.daemon import open_node
from golem.node.node import Node
from golem.rest.app import create_app

APP_KEY = "0123456789abcdef0123456789abcdef"
HEADERS = {"Authorization": f"Bearer {APP_KEY}"}


@asynccontextmanager
async def node_in_test(folder: Path, **flags: Any) -> AsyncIterator[Node]:
    """A node on loopback with a known app-key; its chain is not started (`node.chain.connect` does that)."""
    environment = {"YAGNA_AUTOCONF_APPKEY": APP_KEY, "YAGNA_DEV_SKIP_ALLOCATION_VALIDATION": "1"}
    settings = {
        "data_dir": folder / "node", "chain_dir": folder / "chain", "plain_key": True, "mdns": False,
        "listen": ("127.0.0.1:0",), "network_name": "in-test",
    } | flags  # fmt: skip
    async with open_node(config_from(environment, **settings)) as node:
        yield node


@asynccontextmanager
async def rest_in_test(folder: Path, **flags: Any) -> AsyncIterator[tuple[Node, Any]]:
    """A node and a test client of its REST application."""
    async with node_in_test(folder, **flags) as node:
        yield node, create_app(node).test_client()
