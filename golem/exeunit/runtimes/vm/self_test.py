"""Whether the runtime `vm` can be offered on this machine: who the Engine is, and what a container of it can do.

Engines differ: with remapped user ids and without, old ones whose own filter leaves doors open, podman's socket. What
counts is tried in a container made like any activity's, of an image of our own with one tiny program: it must run and be
heard, and it must not reach AF_VSOCK, io_uring or the i386 table.
Neighbours: `golem.exeunit.runtimes.vm.runtime` calls it; `init_program` has the programs.
"""

from __future__ import annotations

import io
import logging
import os
import platform
import signal
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

import trio

from golem.exeunit.runtime import Limits, RuntimeFault
from golem.exeunit.runtimes.vm.admin import Admin, EngineFacts
from golem.exeunit.runtimes.vm.client import EngineClient
from golem.exeunit.runtimes.vm.container import Plan, capability_mask, container_config, lay_out
from golem.exeunit.runtimes.vm.init_program import (
    PROBE_CLOSED,
    PROBE_I386,
    PROBE_IO_URING,
    PROBE_TEXT,
    PROBE_VSOCK,
    probe_program,
    supported,
)
from golem.exeunit.runtimes.vm.kernel_tables import bound, piped_cores
from golem.exeunit.runtimes.vm.meter import Meter, MeterError
from golem.exeunit.runtimes.vm.program import Program

log = logging.getLogger("golem.exeunit")

TIMEOUT_S = 30.0
NAME = "golem-self-test"
_PROBE = "/probe"
_LIMITS = Limits(mem_gib=1 / 16)
_SYSTEM_CALL_FILTERED = 128 + signal.SIGSYS
_OPEN = {
    PROBE_VSOCK: "AF_VSOCK sockets, which lead out of any network",
    PROBE_IO_URING: "io_uring",
    PROBE_I386: "system calls of the i386 table",
}


async def self_test(admin: Admin, client: EngineClient) -> str | None:
    """Return None if the runtime works here, else in one sentence why not; who the Engine is goes to the log."""
    if not supported():
        return f"the vm runtime has no programs for {platform.machine()}: it needs x86-64 or aarch64"
    admin.abandons = True  # whatever the Engine does with our calls, the answer comes in time
    try:
        with trio.fail_after(TIMEOUT_S):
            facts = await admin.facts()
            log.info("%s", facts.text)
            if (handler := piped_cores()) is not None:
                log.warning("kernel.core_pattern is a pipe: crashes in containers start %s on this machine", handler)
            client.api = admin.api or client.api
            return _unfit(facts) or await _try_container(admin, client, facts)
    except RuntimeFault as fault:
        return str(fault)
    except trio.TooSlowError:
        return f"the Docker Engine at {admin.path} took more than {TIMEOUT_S:g} s for one container"
    except OSError as error:
        return f"this machine failed: {error}"


def _unfit(facts: EngineFacts) -> str | None:
    if tuple(int(part) for part in facts.api.split(".")[:2]) < (1, 41):
        return f"the Engine is too old: {facts.text}; API 1.41 (Docker 20.10) is needed"
    if not facts.seccomp:
        return f"the Engine has no system-call filter (seccomp): {facts.text}"
    if not facts.pids_limit and not facts.podman:
        return f"the Engine cannot limit processes: {facts.text}"
    return None


async def _try_container(admin: Admin, client: EngineClient, facts: EngineFacts) -> str | None:
    name, image = f"{NAME}-{os.getpid()}", f"{NAME}:{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="golem-self-test-") as folder:
        Path(folder).chmod(0o711)
        lay_out(Path(folder), facts)
        config = container_config(Plan(image, "self-test", Path(folder), _LIMITS), facts)
        try:
            await admin.import_image(io.BytesIO(_image()), image)
            await admin.remove_container(name)
            await admin.create_container(name, config)
            await admin.start_container(name)
            return await _probe(client, name, facts)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(5), suppress(RuntimeFault):
                await admin.remove_container(name)
                await admin.remove_image(image)


async def _probe(client: EngineClient, name: str, facts: EngineFacts) -> str | None:
    exec_id = await client.create_exec(name, [_PROBE])
    heard = bytearray()
    async with await client.start_exec(exec_id) as stream:
        program = Program(client, stream)
        while (part := await program.receive()) is not None:
            heard += part[1][: 1 << 10]
        code = await program.exit_code()
    if program.problem is not None:
        return f"a program in a container could not be started: {program.problem}"
    if bytes(heard) != PROBE_TEXT:
        return f"a program in a container was not heard: {bytes(heard)[:100]!r} with exit code {code}"
    if code in _OPEN:
        return f"containers of this Engine can reach {_OPEN[code]}, although our filter forbids it: {facts.text}"
    if code not in (PROBE_CLOSED, _SYSTEM_CALL_FILTERED):
        return f"the test program in a container ended with exit code {code}"
    return await _check_process(client, name, facts)


async def _check_process(client: EngineClient, name: str, engine: EngineFacts) -> str | None:
    """Look at the container's first process from outside: what the kernel says of it counts."""
    pid = int((await client.inspect(name))["State"]["Pid"])
    try:
        await bound(pid, engine.root_id, _LIMITS.mem_bytes)
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        Meter(pid)
    except (OSError, MeterError) as error:
        return f"the Engine's containers cannot be seen from here, is it on another machine? {error}"
    status = dict(line.split(":", 1) for line in lines)
    facts = {key: status.get(key, "").strip() for key in ("CapBnd", "NoNewPrivs", "Seccomp")}
    too_much = int(facts["CapBnd"] or "100", 16) & ~capability_mask(engine.root_id)
    if too_much or facts["NoNewPrivs"] != "1" or facts["Seccomp"] != "2":
        return f"the Engine did not lock its container down as it was told: {facts}"
    return None


def _image() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo(_PROBE.lstrip("/"))
        member.mode, member.size = 0o755, len(probe_program())
        archive.addfile(member, io.BytesIO(probe_program()))
    return out.getvalue()
