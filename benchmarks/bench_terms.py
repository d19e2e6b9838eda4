"""Matching speed: 10,000 offers against one demand as yapapi writes it, its constraint compiled once.

    python benchmarks/bench_terms.py [--json FILE]

Prints the median of several rounds. A round tries both constraints of every pair, as the market does when a demand
arrives; the second figure parses the demand's constraint again for every offer, which is what compiling saves.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protocol.properties import flatten
from protocol.terms import Compiled, compile_constraint, match, parse

OFFERS = 10_000
ROUNDS = 9
SEED = 20240101

DEMAND_CONSTRAINT = """(&(golem.node.debug.subnet=public)
\t(|(golem.com.payment.platform.erc20-holesky-tglm.address=*)
\t(golem.com.payment.platform.erc20-polygon-glm.address=*))
\t(golem.com.payment.protocol.version>1)
\t(golem.com.pricing.model=linear)
\t(&(golem.inf.mem.gib>=0.5)
\t(golem.inf.storage.gib>=2.0)
\t(golem.inf.cpu.threads>=2)
\t(golem.runtime.capabilities=vpn)
\t(golem.runtime.name=vm)))"""

DEMAND_PROPERTIES = {
    "golem.srv.comp.expiration": 1_700_000_900_000,
    "golem.srv.caps.multi-activity": True,
    "golem.node.debug.subnet": "public",
    "golem.com.payment.protocol.version": "3",
    "golem.com.payment.platform.erc20-holesky-tglm.address": "0x" + "ab" * 20,
    "golem.srv.comp.task_package": "hash:sha3:" + "9a" * 28 + ":http://registry.example/image.gvmi",
    "golem.srv.comp.vm.package_format": "gvmkit-squash",
}

OFFER_CONSTRAINT = "(&\n  (golem.srv.comp.expiration>1700000000000)\n  (golem.node.debug.subnet=public)\n)"


def make_offer(number: int, draw: random.Random) -> dict[str, Any]:
    """Properties of a provider: about two thirds of them match the demand."""
    return flatten(
        {
            "golem.node": {"id.name": f"provider-{number}", "debug.subnet": draw.choice(["public"] * 9 + ["test"])},
            "golem.inf": {
                "mem.gib": draw.choice([0.25, 4.0, 16.0, 32.0, 64.0]),
                "storage.gib": 20.0 + draw.random(),
                "cpu": {
                    "cores": 4,
                    "threads": draw.choice([1, 4, 8, 16, 32]),
                    "architecture": "x86_64",
                    "vendor": "GenuineIntel",
                    "capabilities": ["sse4_2", "avx", "avx2", "aes", "fma", "bmi1", "bmi2"],
                },
            },
            "golem.runtime": {"name": "vm", "version": "0.5.3", "capabilities": ["inet", "manifest-support", "vpn"]},
            "golem.srv.caps": {"multi-activity": True, "payload-manifest": True},
            "golem.activity.caps.transfer.protocol": ["http", "https", "gftp"],
            "golem.com": {
                "scheme": {"@tag": "payu", "payu": {"debit-note.interval-sec?": 120, "payment-timeout-sec?": 120}},
                "pricing.model": {"@tag": "linear", "linear.coeffs": [0.0001, 0.0002, 0.0]},
                "usage.vector": ["golem.usage.duration_sec", "golem.usage.cpu_sec"],
                "payment": {
                    "protocol.version": 3,
                    "debit-notes.accept-timeout?": 240,
                    "platform.erc20-holesky-tglm.address": f"0x{number:040x}",
                },
            },
        }
    )


def median_ms(run: Callable[[], object], rounds: int) -> float:
    times: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = arguments.parse_args()
    draw = random.Random(SEED)
    offers = [make_offer(number, draw) for number in range(OFFERS)]
    demand, wish = compile_constraint(DEMAND_CONSTRAINT), compile_constraint(OFFER_CONSTRAINT)

    def compiled_once() -> int:
        return sum(map(bool, (match(DEMAND_PROPERTIES, demand, offer, wish) for offer in offers)))

    def parsed_each_time() -> int:
        return sum(bool(match(DEMAND_PROPERTIES, Compiled(parse(DEMAND_CONSTRAINT)), offer, wish)) for offer in offers)

    matched = compiled_once()
    once_ms, naive_ms = median_ms(compiled_once, ROUNDS), median_ms(parsed_each_time, 3)
    figures = {
        "offers": OFFERS,
        "matched": matched,
        "rounds": ROUNDS,
        "median_ms": round(once_ms, 2),
        "offers_per_s": round(OFFERS / once_ms * 1000),
        "parse_each_time_ms": round(naive_ms, 2),
        "parse_each_time_ratio": round(naive_ms / once_ms, 1),
        "python": platform.python_version(),
    }
    print(f"{OFFERS} offers, {matched} matched, median of {ROUNDS} rounds: {once_ms:.1f} ms", end=" ")
    print(f"({figures['offers_per_s']} offers/s)")
    print(f"parsing the demand for every offer: {naive_ms:.1f} ms, {figures['parse_each_time_ratio']} times as long")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
