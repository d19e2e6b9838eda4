"""What a node is told by flags and environment. Every setting has a flag of `golem run` or a variable, and a default."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import platformdirs

from protocol.payment_terms import LEAST_PAYMENT_GLM

VERSION = "0.17.6"  # the API level that agents check; the SDKs want at least 0.15.2
DEFAULT_API_URL = "http://127.0.0.1:7465"
USAGE_EVERY_S = 10.0  # exe-units tell their usage that often: a shorter silence says nothing
MAX_SUBSCRIPTION_TTL_S = 7200.0  # as `protocol.market.MAX_LIFETIME_S`, beyond which no node keeps an offer
SWITCHES = {"yes": True, "on": True, "true": True, "1": True, "no": False, "off": False, "false": False, "0": False}
PROFILES = ("local", "testnet", "mainnet")


class ConfigError(Exception):
    """A setting that cannot be used; the text says which and why."""


def default_data_root() -> Path:
    """Return the folder below which nodes of this user keep their data unless told otherwise."""
    return Path(platformdirs.user_data_dir("golem"))


def data_dir_from(env: Mapping[str, str]) -> Path:
    """Return the data directory that the environment names, or the default."""
    named = env.get("GOLEM_DATA_DIR") or env.get("YAGNA_DATADIR")
    return Path(named).expanduser() if named else default_data_root() / "node"


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one node."""

    data_dir: Path
    api_host: str = "127.0.0.1"
    api_port: int = 7465
    api_port_fixed: bool = False  # the user named a port: a taken one is an error, not a reason to look for another
    profile: str = "local"
    listen: tuple[str, ...] = ()  # "host:port" for peers; empty = every interface, any free port
    bootstrap: tuple[str, ...] = ()
    mdns: bool = True
    network_name: str = "golem"
    chain_dir: Path = Path()
    chain_url: str = ""  # of a dev chain that somebody serves already; empty = the one in `chain_dir`
    allow_origins: tuple[str, ...] = ()
    autoconf_app_key: str = field(default="", repr=False)
    autoconf_id_secret: str = field(default="", repr=False)
    password_file: Path | None = None
    password: str = field(default="", repr=False)
    plain_key: bool = False
    payment_cycle_s: float = 0.0  # 0 = the network's own
    least_payment_glm: float = float(LEAST_PAYMENT_GLM)  # a payee who is owed less waits for more
    subscription_ttl_s: float = 3600.0
    max_events_default: int = 20
    max_events: int = 100
    unresponsive_s: float = 30.0  # without a word of an exe-unit
    inactivity_s: float = 60.0  # the same; then its activity is ended
    event_store_days: float = 90.0  # events in feeds
    cleanup_interval_s: float = 4 * 3600.0
    max_rest_timeout_s: float = 75.0  # how long an idle connection to REST is kept open
    images_max_gib: float = 100.0  # of all images in the registry together
    skip_allocation_validation: bool = False

    @property
    def bus_path(self) -> Path:
        return self.data_dir / "bus.sock"

    @property
    def units_path(self) -> Path:
        """The bus's socket for exe-units, by which they reach no more than they need."""
        return self.data_dir / "units.sock"

    @property
    def status_path(self) -> Path:
        """The file in which a running node says where it serves (`node.json`)."""
        return self.data_dir / "node.json"


def parse_api_url(url: str) -> tuple[str, int]:
    """Return host and port of an API URL. Raises `ConfigError`."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"API URL {url!r}: {error}") from None
    if not parts.hostname or parts.scheme not in ("", "http"):
        raise ConfigError(f"API URL {url!r}: expected http://HOST:PORT")
    return parts.hostname, port if port is not None else 7465


def parse_chain_url(url: str) -> str:
    """Return the URL of a dev chain in its plain form. Raises `ConfigError`."""
    parts = urlsplit(url)
    try:
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port
    except ValueError as error:
        raise ConfigError(f"chain URL {url[:80]!r}: {error}") from None
    if not complete or parts.username or parts.query or parts.fragment or parts.path not in ("", "/"):
        raise ConfigError(f"chain URL {url[:80]!r}: expected http://HOST:PORT")
    return f"{parts.scheme}://{parts.netloc}"


def read_number(env: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    """Return the number of a variable, `default` if it is not set. Raises `ConfigError`."""
    text = env.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r}: expected a number") from None
    if not low <= value <= high:
        raise ConfigError(f"{name}={text!r}: expected a number from {low:g} to {high:g}")
    return value


def read_choice(env: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    """Return the word of a variable, which is one of `choices`. Raises `ConfigError`."""
    text = env.get(name, "").strip()
    if text not in choices:
        raise ConfigError(f"{name}={text!r}: expected {' or '.join(choices)}")
    return text


def read_switch(env: Mapping[str, str], name: str, default: bool) -> bool:
    """Return whether a variable says yes (on, true, 1) or no (off, false, 0), in any case. Raises `ConfigError`."""
    text = env.get(name, "").strip().lower()
    if not text:
        return default
    if text not in SWITCHES:
        raise ConfigError(f"{name}={env[name]!r}: expected yes, no, on, off, true or false")
    return SWITCHES[text]


def read_duration(env: Mapping[str, str], name: str, default: float, low: float = 0.0, high: float = 1e9) -> float:
    """Return the seconds of a variable: a number, or one with the unit s, m (or min), h. Raises `ConfigError`."""
    text = env.get(name, "").strip()
    if not text:
        return default
    number = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(s|sec|m|min|h|)", text)
    if number is None:
        raise ConfigError(f"{name}={text!r}: expected seconds, or a number with s, min or h")
    value = float(number[1]) * {"m": 60.0, "min": 60.0, "h": 3600.0}.get(number[2], 1.0)
    if not low <= value <= high:
        raise ConfigError(f"{name}={text!r}: expected from {low:g} to {high:g} seconds")
    return value


def config_from(env: Mapping[str, str], **flags: object) -> Config:
    """Return the configuration of `env` with `flags` above it (flags that are `None` or empty say nothing).

    Raises `ConfigError`.
    """
    given = {key: value for key, value in flags.items() if value not in (None, "", ())}
    data_dir = Path(str(given.pop("data_dir", data_dir_from(env)))).expanduser().absolute()
    api_url = str(given.pop("api_url", "") or env.get("YAGNA_API_URL", ""))
    host, port = parse_api_url(api_url or DEFAULT_API_URL)
    profile = str(given.pop("profile", env.get("GOLEM_PROFILE", "local")))
    if profile not in PROFILES:
        raise ConfigError(f"profile {profile!r}: expected one of {', '.join(PROFILES)}")
    chain_dir = given.pop("chain_dir", env.get("GOLEM_CHAIN_DIR") or default_data_root() / "chain")
    values: dict[str, object] = {
        "data_dir": data_dir,
        "api_host": host,
        "api_port": port,
        "api_port_fixed": bool(api_url),
        "profile": profile,
        "chain_dir": Path(str(chain_dir)).expanduser().absolute(),
        "chain_url": env.get("GOLEM_CHAIN_URL", ""),
        "listen": read_list(env.get("GOLEM_LISTEN", "")),
        "bootstrap": read_list(env.get("GOLEM_BOOTSTRAP", "")),
        "mdns": read_switch(env, "GOLEM_MDNS", True),
        "network_name": env.get("GOLEM_NETWORK_NAME") or "golem",
        "allow_origins": read_list(env.get("YAGNA_API_ALLOW_ORIGIN", "")),
        "autoconf_app_key": env.get("YAGNA_AUTOCONF_APPKEY", ""),
        "autoconf_id_secret": env.get("YAGNA_AUTOCONF_ID_SECRET", ""),
        "password": env.get("GOLEM_PASSWORD", ""),
        "password_file": Path(env["GOLEM_PASSWORD_FILE"]) if env.get("GOLEM_PASSWORD_FILE") else None,
        "plain_key": read_switch(env, "GOLEM_PLAIN_KEY", False),
        "least_payment_glm": read_number(env, "MIN_PAYMENT_AMOUNT_GLM", float(LEAST_PAYMENT_GLM), 0.0, 1e9),
        "payment_cycle_s": read_duration(env, "PAYMENT_CYCLE_DEFAULT_INTERVAL", 0.0),
        "subscription_ttl_s": read_duration(env, "DEFAULT_SUBSCRIPTION_TTL", 3600.0, 1.0, MAX_SUBSCRIPTION_TTL_S),
        "max_events_default": int(read_number(env, "MARKET_MAX_EVENTS_DEFAULT", 20, 1, 100)),
        "max_events": int(read_number(env, "MARKET_MAX_EVENTS_MAX", 100, 1, 1000)),
        "unresponsive_s": read_duration(env, "UNRESPONSIVE_LIMIT_SECONDS", 30.0, 2 * USAGE_EVERY_S),
        "inactivity_s": read_duration(env, "INACTIVITY_LIMIT_SECONDS", 60.0, 3 * USAGE_EVERY_S),
        "event_store_days": read_number(env, "MARKET_EVENT_STORE_DAYS", 90.0, 1, 36500),
        "cleanup_interval_s": read_duration(env, "MARKET_DB_CLEANUP_INTERVAL", 4 * 3600.0, 1.0),
        "max_rest_timeout_s": read_duration(env, "MAX_REST_TIMEOUT", 75.0, 1.0, 86400.0),
        "images_max_gib": read_number(env, "GOLEM_IMAGES_MAX_GIB", 100.0, 0.001, 1e6),
        "skip_allocation_validation": read_switch(env, "YAGNA_DEV_SKIP_ALLOCATION_VALIDATION", False),
    }
    config = Config(**{**values, **given})  # type: ignore[arg-type]
    if config.chain_url and config.profile != "local":
        raise ConfigError(f"--chain-url (GOLEM_CHAIN_URL) names a dev chain, which the profile {config.profile} does not use")
    if config.chain_url:
        config = replace(config, chain_url=parse_chain_url(config.chain_url))
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", config.network_name):
        raise ConfigError(f"network name {config.network_name[:80]!r}: expected 1 to 64 letters, digits, dots, _ or -")
    if config.autoconf_app_key and not re.fullmatch(r"[!-~]{8,256}", config.autoconf_app_key):
        raise ConfigError("YAGNA_AUTOCONF_APPKEY: expected 8 to 256 printable characters without spaces")
    return config


def read_list(text: str) -> tuple[str, ...]:
    """Return the parts of a text between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
