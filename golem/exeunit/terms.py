"""What an exe-unit needs to know of its agreement, read from the `agreement.json` that the provider agent writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golem.exeunit.runtime import Limits
from golem.exeunit.usage import COUNTERS
from protocol.property_names import CPU_THREADS, EXPIRATION, MEM_GIB, STORAGE_GIB, TASK_PACKAGE, VECTOR
from protocol.types import node_id

MAX_FILE_BYTES = 4 << 20


class AgreementError(Exception):
    """The agreement file cannot be used; the text says why."""


@dataclass(frozen=True)
class AgreedTerms:
    """An agreement, as far as the exe-unit cares."""

    agreement_id: str
    requestor: str  # node id
    provider: str  # node id
    task_package: str | None
    usage_vector: tuple[str, ...]
    limits: Limits
    expires_at: float | None  # seconds since the epoch


def read_terms(path: Path) -> AgreedTerms:
    """Read an agreement as the REST API shows it; properties may be flat or a tree. Raises `AgreementError`."""
    try:
        raw = path.read_bytes()
        if len(raw) > MAX_FILE_BYTES:
            raise AgreementError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        agreement = json.loads(raw)
        demand, offer = agreement["demand"], agreement["offer"]
        wanted, offered = flat(demand["properties"]), flat(offer["properties"])
        parties = node_id(demand["requestorId"]), node_id(offer["providerId"])
        agreement_id = str(agreement["agreementId"])
    except OSError as error:
        raise AgreementError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AgreementError(f"{path} is not an agreement: {error!r}") from None
    package = wanted.get(TASK_PACKAGE)
    vector = offered.get(VECTOR)
    expiration = _number(wanted, EXPIRATION, math.inf)
    return AgreedTerms(
        agreement_id,
        *parties,
        task_package=package if isinstance(package, str) else None,
        usage_vector=tuple(map(str, vector)) if isinstance(vector, list) else COUNTERS,
        limits=Limits(
            cpu_threads=max(1, int(_number(offered, CPU_THREADS, 1))),
            mem_gib=_number(offered, MEM_GIB, Limits.mem_gib),
            storage_gib=_number(offered, STORAGE_GIB, Limits.storage_gib),
        ),
        expires_at=expiration / 1000 if math.isfinite(expiration) else None,
    )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return properties by their full name; in a tree, `@tag` holds the value of a name that is a prefix as well."""
    if not isinstance(tree, dict):
        raise ValueError("properties are an object")
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix if key == "@tag" else f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            found |= flat(value, name)
        else:
            found[name] = value
    return found


def _number(properties: dict[str, Any], name: str, default: float) -> float:
    value = properties.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        return default
    return float(value)
