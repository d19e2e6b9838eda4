"""Settings of the provider agent that have no flag: variables of the environment, by the names the reference gave them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from actors._provider_negotiators import Terms
from golem.config import ConfigError, read_duration, read_list, read_number
from golem.exeunit.descriptors import SEARCH
from golem.provider.settings import SettingsError

DAY_S = 24 * 3600.0
CENTURY_S = 100 * 365.25 * DAY_S


@dataclass(frozen=True, slots=True)
class Given:
    """What the environment says, and defaults for the rest. `most`: threads, memory and storage in GiB."""

    terms: Terms
    idle_s: float
    approve_timeout_s: float
    max_agreements: int | None
    networks: tuple[str, ...]
    most: tuple[float, float, float]
    exe_unit_path: str | None
    test_interval_s: float


def read_environment(env: Mapping[str, str]) -> Given:
    """Raises `SettingsError` that names the variable."""
    usual = Terms()

    def seconds(name: str, default: float, low: float = 1.0, high: float = DAY_S) -> float:
        return read_duration(env, name, default, low, high)

    try:
        terms = Terms(
            min_expiration_s=seconds("MIN_AGREEMENT_EXPIRATION", usual.min_expiration_s, 0.0, CENTURY_S),
            max_expiration_s=seconds("MAX_AGREEMENT_EXPIRATION", usual.max_expiration_s, 1.0, CENTURY_S),
            max_expiration_without_deadline_s=seconds(
                "MAX_AGREEMENT_EXPIRATION_WITHOUT_DEADLINE", usual.max_expiration_without_deadline_s, 0.0, CENTURY_S
            ),
            accept_timeout_s=int(seconds("DEBIT_NOTE_ACCEPTANCE_DEADLINE", usual.accept_timeout_s, usual.min_accept_timeout_s)),
            interval_s=int(seconds("DEBIT_NOTE_INTERVAL", usual.interval_s)),
            min_interval_s=int(seconds("MIN_DEBIT_NOTE_INTERVAL", usual.min_interval_s)),
            max_interval_s=int(seconds("MAX_DEBIT_NOTE_INTERVAL", usual.max_interval_s)),
            payment_timeout_required_s=seconds(
                "PAYMENT_TIMEOUT_REQUIRED_DURATION", usual.payment_timeout_required_s, 0.0, CENTURY_S
            ),
        )
        terms = replace(
            terms,
            credit_floor=read_number(env, "GOLEM_CREDIT_FLOOR", usual.credit_floor, 0.0, 1e9),
            credit_factor=read_number(env, "GOLEM_CREDIT_FACTOR", usual.credit_factor, 0.0, 1e6),
            credit_growth=read_number(env, "GOLEM_CREDIT_GROWTH", usual.credit_growth, 0.0, 1e6),
            pay_pace_s=seconds("GOLEM_PAY_PACE", usual.pay_pace_s, 0.0, 30 * DAY_S),
        )
        agreements = int(read_number(env, "MAX_SIMULTANEOUS_AGREEMENTS", 0, 1, 1000))
        return Given(
            terms,
            seconds("IDLE_AGREEMENT_TIMEOUT", 90.0),
            seconds("AGREEMENT_APPROVE_TIMEOUT", 10.0, 1.0, 300.0),
            agreements or None,
            read_list(env.get("YA_PAYMENT_NETWORK", "")),
            (
                read_number(env, "YA_RT_CORES", math.inf, 1, 1e6),
                read_number(env, "YA_RT_MEM", math.inf, 0.0625, 1e6),
                read_number(env, "YA_RT_STORAGE", math.inf, 0.0625, 1e9),
            ),
            env.get(SEARCH) or None,
            seconds("RUNTIME_TEST_INTERVAL", 60.0),
        )
    except ConfigError as error:
        raise SettingsError(str(error)) from None
