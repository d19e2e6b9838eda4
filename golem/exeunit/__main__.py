"""`python -m golem.exeunit`: one activity's process, as the provider agent starts it.

python -m golem.exeunit --runtime wasmtime --activity ID --bus PATH --agreement FILE --work DIR --cache DIR
python -m golem.exeunit offer-template --runtime wasmtime      the runtime's part of an offer, as JSON
python -m golem.exeunit test --runtime wasmtime                status 0 if the runtime works here, else why not
python -m golem.exeunit sweep --runtime vm --work-root DIR     remove what dead exe-units left behind; says what
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from golem.base.printing import quoted, set_up_logs
from protocol.property_names import (
    DEPLOY_PROGRESS,
    RUNTIME_CAPABILITIES,
    TRANSFER_PROGRESS,
    TRANSFER_PROTOCOLS,
    TRANSFER_REACH,
    VECTOR,
)

if TYPE_CHECKING:
    from golem.exeunit.runtime import Interaction, Runtime

MAX_LOG_BYTES = 4 << 20
MAX_DATA_BYTES = 1 << 30  # of the exe-unit itself, threads' stacks and all; it needs about a tenth


def main() -> int:
    """Do what the command line says; returns the exit status."""
    args = _parser().parse_args()
    level = os.environ.get("GOLEM_LOG", "INFO").upper()
    set_up_logs(level, "%(asctime)s %(levelname)s %(name)s %(message)s", most_bytes=MAX_LOG_BYTES)
    from golem.exeunit.interaction import allowed_interactions
    from golem.exeunit.runtimes import make_runtime

    with tempfile.TemporaryDirectory() as scratch:
        try:
            if args.command == "run":
                return _run(args)
            runtime = make_runtime(args.runtime, args.cache or Path(scratch))
            allowed = allowed_interactions(args.interaction, runtime)
        except ValueError as error:
            print(f"exe-unit: {quoted(str(error))}", file=sys.stderr)
            return 2
        if args.command == "offer-template":
            print(json.dumps(offer_template(runtime.offer_properties(), allowed, args.transfer_policy)))
            return 0
        if args.command == "sweep":
            return _sweep(runtime, args.work_root)
        problem = trio.run(runtime.self_test)
        if problem is not None:
            print(f"exe-unit: {quoted(problem)}", file=sys.stderr)
            return 1
        return 0


def _sweep(runtime: Runtime, work_root: Path | None) -> int:
    from golem.exeunit.runtime import RuntimeFault

    if work_root is None:
        print("exe-unit: missing --work-root", file=sys.stderr)
        return 2
    try:
        for line in trio.run(runtime.sweep, work_root):
            print(line)
    except RuntimeFault as fault:
        print(f"exe-unit: {quoted(str(fault))}", file=sys.stderr)
        return 1
    return 0


def offer_template(
    runtime_properties: dict[str, Any], allowed: frozenset[Interaction] = frozenset(), reach: str = "public"
) -> dict[str, Any]:
    """Return the part of an offer that an exe-unit of this runtime contributes; `allowed` of shell and proxy-http, and what
    transfers may `reach`."""
    from golem.exeunit.interaction import capabilities
    from golem.exeunit.transfer.transfers import OFFERED_PROTOCOLS
    from golem.exeunit.usage import COUNTERS

    properties = {
        VECTOR: list(COUNTERS),
        TRANSFER_PROTOCOLS: list(OFFERED_PROTOCOLS),
        TRANSFER_REACH: reach,
        TRANSFER_PROGRESS: True,
        DEPLOY_PROGRESS: True,
        **runtime_properties,
    }
    if named := capabilities(properties.get(RUNTIME_CAPABILITIES), allowed):
        properties[RUNTIME_CAPABILITIES] = named
    return {"properties": properties, "constraints": ""}


def _run(args: argparse.Namespace) -> int:
    from actors.kernel.records import JournalError
    from golem.exeunit.process import UnitSettings, serve
    from golem.exeunit.sandbox.lockdown import limit_memory
    from golem.exeunit.terms import AgreementError
    from golem.exeunit.transfer.spool import TransferPolicy

    missing = [name for name in ("activity", "bus", "agreement", "work", "cache") if getattr(args, name) is None]
    if missing:
        print(f"exe-unit: missing --{', --'.join(missing)}", file=sys.stderr)
        return 2
    if not re.fullmatch(r"[0-9a-f]{32}", args.activity):
        print("exe-unit: an activity id has 32 hex digits", file=sys.stderr)
        return 2
    local = args.transfer_policy == "local"
    policy = TransferPolicy(allow_loopback=local, allow_private=local, file_roots=tuple(args.file_root))
    settings = UnitSettings(
        args.runtime, args.activity, args.bus, args.agreement, args.work, args.cache, policy, args.interaction
    )
    limit_memory(MAX_DATA_BYTES)
    try:
        return serve(settings)
    except (AgreementError, JournalError) as error:
        print(f"exe-unit: {quoted(str(error))}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="golem-exeunit", description="Run one activity.")
    parser.add_argument("command", nargs="?", choices=("run", "offer-template", "test", "sweep"), default="run")
    parser.add_argument("--runtime", default="wasmtime", help="name of the runtime")
    parser.add_argument("--activity", help="id of the activity")
    parser.add_argument("--bus", type=Path, help="the node's bus socket")
    parser.add_argument("--agreement", type=Path, help="the agreement as JSON")
    parser.add_argument("--work", type=Path, help="working directory of this activity alone")
    parser.add_argument("--work-root", type=Path, help="directory of all activities' working directories, to sweep")
    parser.add_argument("--cache", type=Path, help="cache directory, shared by activities")
    parser.add_argument(
        "--transfer-policy",
        choices=("public", "local"),
        default="public",
        help="whether transfers may reach loopback for requestors of this machine, and private addresses for those of its "
        "networks (default: public addresses only)",
    )
    parser.add_argument(
        "--interaction",
        metavar="KINDS",
        help="what the provider allows of shell,proxy-http ('' is nothing; default: all that the runtime has)",
    )
    parser.add_argument(
        "--file-root", type=Path, action="append", default=[], help="directory for file: task packages; repeatable"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
