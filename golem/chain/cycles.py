"""How often payments are gathered."""

from __future__ import annotations

from golem.chain.port import Chain
from golem.config import Config


def cycles_of(config: Config, chain: Chain) -> dict[str, float]:
    """Return how often each platform pays out, in seconds: what the user set, else the network's own pace."""
    paces = {row.platform: 1.0 if row.simulated_by else 300.0 if row.is_test else 86400.0 for row in chain.networks}
    return {platform: config.payment_cycle_s or pace for platform, pace in paces.items()}
