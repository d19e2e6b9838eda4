"""What an offer says: the runtime's template, the machine's share for one agreement, prices, payment platforms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from actors.provider.credit import offered_credit
from actors.provider.rules import Terms
from golem.provider.hardware import Profile, cpu_properties
from golem.provider.presets import Preset
from golem.provider.runtimes import Template
from protocol.payment_terms import address_key
from protocol.property_names import (
    ACCEPT_TIMEOUT,
    COEFFS,
    CPU_CORES,
    CPU_THREADS,
    CREDIT,
    EXPIRATION,
    INTERVAL,
    IS_PUBLIC,
    LOCAL_CHAIN,
    MEM_GIB,
    MULTI_ACTIVITY,
    NODE_NAME,
    PAYMENT_TIMEOUT,
    PAYMENT_VERSION,
    PRICING_MODEL,
    RUNTIME_NAME,
    SCHEME,
    STORAGE_GIB,
    SUBNET,
    VECTOR,
)
from protocol.provider import OfferSpec

PROTOCOL_VERSION = 3


def offer_spec(
    preset: Preset,
    template: Template,
    share: Profile,
    accounts: Sequence[Mapping[str, Any]],
    name: str,
    subnet: str,
    terms: Terms,
) -> OfferSpec:
    """Return the offer of a preset. Raises `ValueError` where the preset prices what the runtime does not count."""
    counted = template.properties.get(VECTOR, [])
    if unknown := [counter for counter in preset.vector() if counter not in counted]:
        raise ValueError(f"preset {preset.name}: runtime {preset.runtime} does not count {', '.join(unknown)}")
    cpu = cpu_properties()
    properties: dict[str, Any] = {
        **template.properties,
        **cpu,
        CPU_CORES: min(cpu[CPU_CORES], share.cpu_threads),
        CPU_THREADS: share.cpu_threads,
        MEM_GIB: share.mem_gib,
        STORAGE_GIB: share.storage_gib,
        NODE_NAME: name,
        SUBNET: subnet,
        IS_PUBLIC: False,
        RUNTIME_NAME: preset.runtime,
        MULTI_ACTIVITY: True,
        SCHEME: "payu",
        INTERVAL: terms.interval_s,
        PAYMENT_TIMEOUT: terms.payment_timeout_s,
        ACCEPT_TIMEOUT: terms.accept_timeout_s,
        PRICING_MODEL: "linear",
        COEFFS: preset.prices(),
        VECTOR: preset.vector(),
        PAYMENT_VERSION: PROTOCOL_VERSION,
    }
    for account in accounts:
        properties[address_key(account["platform"])] = account["address"]
        if isinstance(account.get("chain"), str):  # a dev chain: only who is on the same one can pay
            properties[LOCAL_CHAIN] = account["chain"]
    properties[CREDIT] = offered_credit(terms, properties, [str(account["platform"]) for account in accounts])
    return OfferSpec(preset.name, preset.runtime, json.dumps(properties, sort_keys=True), subnet)


def wanted_accounts(accounts: Any, networks: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return the accounts to be paid on: all, or those whose platform or network is named in `networks`."""
    found = [
        one
        for one in (accounts if isinstance(accounts, list) else ())
        if isinstance(one, dict) and isinstance(one.get("platform"), str) and isinstance(one.get("address"), str)
        and (not networks or one["platform"] in networks or one.get("network") in networks)
    ]  # fmt: skip
    return sorted(found, key=lambda one: str(one["platform"]))


def constraints(subnet: str, now: float, local_chain: str | None = None) -> str:
    """Return the constraints of an offer that is published now; `local_chain` names the dev chain it is paid on, if any.

    A demand of another dev chain never matches. One that names none may look: without payment it gets no agreement.
    """
    chain = f"  (|({LOCAL_CHAIN}={local_chain})(!({LOCAL_CHAIN}=*)))\n" if local_chain else ""
    return f"(&\n  ({EXPIRATION}>{int(now * 1000)})\n  ({SUBNET}={subnet})\n{chain})"
