"""What an activity has used: of the container that runs, of those that are gone, and of reading packages.

Neighbours: `meter` reads the kernel's counters; `golem.exeunit.runtimes.vm.runtime` says when.
"""

from __future__ import annotations

from golem.exeunit.runtime import GIB, Limits, Usage
from golem.exeunit.runtimes.vm.meter import Layer, Meter
from golem.exeunit.storage import Storage


class Tally:
    """Totals that never fall. `meter` and `layer` belong to the container that runs, if there is one."""

    def __init__(self) -> None:
        self.meter: Meter | None = None
        self.layer: Layer | None = None
        self._past_cpu_s, self._peak_bytes, self._storage_bytes = 0.0, 0, 0

    def spend(self, cpu_s: float) -> None:
        """Count what was used outside of a container."""
        self._past_cpu_s += cpu_s

    def cpu_s(self) -> float:
        """Processor seconds of all."""
        return self._past_cpu_s + (self.meter.read()[0] if self.meter is not None else 0.0)

    def usage(self, storage: Storage | None) -> Usage:
        """As of now, but for storage that the kernel does not limit: that is as of the last `measure`."""
        peak = max(self._peak_bytes, self.meter.read()[1] if self.meter is not None else 0)
        found = storage.used_bytes() if storage is not None and self.layer is None else self._storage_bytes
        return Usage(self.cpu_s(), peak / GIB, found / GIB)

    async def measure(self, storage: Storage | None, limits: Limits) -> None:
        """Look at the storage: the volumes and what the container wrote over its image."""
        found = 0
        if storage is not None:
            found += await storage.measure()
        if self.layer is not None:
            found += await self.layer.measure()
            if not self.layer.complete:
                found = max(found, limits.storage_bytes + 1)
        self._storage_bytes = found
        if self.meter is not None:
            self.meter.read()

    def settle(self) -> None:
        """Add what a container used to the totals; it is gone."""
        if self.meter is not None:
            cpu_s, peak_bytes = self.meter.read()
            self._past_cpu_s += cpu_s
            self._peak_bytes = max(self._peak_bytes, peak_bytes)
        self.meter = self.layer = None
        self._storage_bytes = 0
