"""Compile the Vyper sources beside this module: `python -m golem.chain.contracts.build [--check] [--vyper PATH]`.

Vyper 0.4.3 pins packages that the node uses in other versions, so it lives in an environment of its own: name its
executable by `--vyper` or the variable VYPER, else it is looked for on the PATH and in `.venv-vyper`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = ("TestToken", "MultiTransfer")
VERSION = "0.4.3"


def find_vyper(named: str | None = None) -> str | None:
    """Path of a vyper executable of the pinned version, or None."""
    beside = HERE.parents[2] / ".venv-vyper" / "bin" / "vyper"
    for path in (named, os.environ.get("VYPER"), shutil.which("vyper"), str(beside)):
        if path and Path(path).exists():
            told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
            if told.returncode == 0 and told.stdout.startswith(VERSION):
                return path
    return None


def compile_contract(vyper: str, name: str) -> dict[str, Any]:
    """Compile one source. Returns {"compiler", "abi", "bytecode"}; raises CalledProcessError on bad source."""
    command = [vyper, "-f", "abi,bytecode", f"{name}.vy"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300, check=True)
    abi, bytecode = done.stdout.split("\n")[:2]
    return {"compiler": f"vyper {VERSION}", "abi": json.loads(abi), "bytecode": bytecode.strip()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the shipped files, write nothing")
    parser.add_argument("--vyper", help="the vyper executable")
    options = parser.parse_args(argv)
    vyper = find_vyper(options.vyper)
    if vyper is None:
        print(f"vyper {VERSION} not found: install it in an environment of its own and pass --vyper", file=sys.stderr)
        return 2
    stale = 0
    for name in NAMES:
        made, path = compile_contract(vyper, name), HERE / f"{name}.json"
        if not options.check:
            path.write_text(json.dumps(made, indent=1) + "\n")
        elif not path.exists() or json.loads(path.read_text()) != made:
            print(f"{path.name} differs from what {name}.vy compiles to", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
