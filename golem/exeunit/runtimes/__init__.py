"""Runtimes: what an activity may be run in. Each is one module with one class that implements `base.Runtime`.

To add one, write the module and name it in `_RUNTIMES`. Modules are imported when asked for: a node without Docker need
not have its client, and the children of `wasm` import this package for every command.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from golem.exeunit.runtimes.base import Runtime

# Name in `golem.runtime.name` -> module here, class in it, which is called with a directory for what it caches.
_RUNTIMES = {"wasmtime": ("wasm", "WasmRuntime")}


def runtime_names() -> tuple[str, ...]:
    """All runtimes this build knows; whether one works on this machine its `self_test` tells."""
    return tuple(_RUNTIMES)


def make_runtime(name: str, cache_dir: Path) -> Runtime:
    """A runtime for one activity.

    Errors: ValueError for an unknown name.
    """
    if name not in _RUNTIMES:
        raise ValueError(f"unknown runtime {name!r}: this provider has {', '.join(_RUNTIMES)}")
    module, class_name = _RUNTIMES[name]
    runtime: Runtime = getattr(import_module(f"{__name__}.{module}"), class_name)(cache_dir)
    return runtime
