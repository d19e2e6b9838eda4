"""Runtimes: what an activity may be run in. Each is one package with one class that implements `runtime.Runtime`.

To add one, write the package, name it in `_RUNTIMES`, and give it prices in `golem/provider/presets.py`. Modules are
imported when asked for: a node without Docker need not have its client, and the children of `wasm` import this package
for every command.
A runtime that is a program of its own needs no module: a descriptor file names it
(`golem.exeunit.runtimes.plugin.descriptors`), and `plugin.runtime` speaks to it.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from golem.exeunit.runtime import Runtime

# Name in `golem.runtime.name` -> module here, class in it, which is called with a directory for what it caches.
_RUNTIMES = {"wasmtime": ("wasm.runtime", "WasmRuntime"), "vm": ("vm.runtime", "VmRuntime")}


def runtime_names() -> tuple[str, ...]:
    """The built-in runtimes; whether one works on this machine its `self_test` tells."""
    return tuple(_RUNTIMES)


def make_runtime(name: str, cache_dir: Path) -> Runtime:
    """A runtime for one activity. Descriptors are looked for where the environment variable `EXE_UNIT_PATH` says.

    Errors: ValueError for an unknown name, or a descriptor that cannot be used.
    """
    if name not in _RUNTIMES:
        return _described(name)
    module, class_name = _RUNTIMES[name]
    runtime: Runtime = getattr(import_module(f"{__name__}.{module}"), class_name)(cache_dir)
    return runtime


def _described(name: str) -> Runtime:
    from golem.exeunit.runtimes.plugin.descriptors import SEARCH, find_descriptors
    from golem.exeunit.runtimes.plugin.runtime import ExternalRuntime

    found = find_descriptors(os.environ.get(SEARCH), taken=_RUNTIMES)
    if name not in found.runtimes:
        known = ", ".join([*_RUNTIMES, *found.runtimes])
        raise ValueError("; ".join([f"unknown runtime {name!r}: this provider has {known}", *found.problems]))
    return ExternalRuntime(found.runtimes[name])
