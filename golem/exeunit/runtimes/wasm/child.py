"""The inside of a sandboxed WebAssembly process: compiles one module, or runs one command, and ends.

Started by `wasm` as `python -I -S`, with a descriptor to read its orders from and one to report on. It locks itself in
(`sandbox.lockdown`) before it touches a module. Compiling writes machine code to stdout; running gives stdin, stdout
and stderr to the guest. The report is a JSON object, then a NUL and the text of /proc/self/status. Imports stay few:
they are paid for by every command.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from golem.exeunit.sandbox import lockdown, seccomp

EXIT_TRAP = 134  # as of a native program that aborted
EXIT_BAD_MODULE = 125
MAX_TABLE_ELEMENTS = 1_000_000
WASI = "wasi_snapshot_preview1"
# Part of the key of compiled code: raise it whenever `engine_config` changes.
CONFIG_TAG = "1"


class Unusable(Exception):
    """The module cannot be compiled or run here; the text is for the requestor."""


def engine_config() -> Any:
    """One configuration for compiling and running. No threads; neither epochs nor fuel, as a kill ends a run."""
    import wasmtime

    config = wasmtime.Config()
    config.wasm_threads = False
    config.shared_memory = False
    config.max_wasm_stack = 1 << 20
    return config


def lock_in(spec: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give up everything but the opened directories and the module; returns the guest's WASI set-up and a summary."""
    limits = spec["limits"]
    lockdown.limit_resources(cpu_s=limits["cpu_s"], data_bytes=limits["data"], file_bytes=limits["file"], open_files=64)
    lockdown.use_cpus(limits["cpus"])
    root = os.geteuid() == 0
    namespaces = root and lockdown.enter_namespaces()
    import wasmtime

    wasi = wasmtime.WasiConfig()
    rules = []
    if spec["module"] is not None:
        rules.append((spec["module"], lockdown.READ_ONLY))
    for host, guest, writable in spec["preopens"]:
        wasi.preopen_dir(host, guest, writable)
        descriptor = os.open(host, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        rules.append((descriptor, lockdown.READ_WRITE if writable else lockdown.READ_ONLY))
    if root:
        lockdown.become(spec["uid"])
    lockdown.drop_capabilities()
    lockdown.die_with_parent(spec["parent"])
    landlock = lockdown.landlock_abi()
    if landlock:
        landlock = lockdown.restrict_files(rules)
    elif spec["require_landlock"]:
        raise Unusable("this kernel has no Landlock, and running without it is not allowed here")
    for descriptor, _ in rules:
        if descriptor != spec["module"]:
            os.close(descriptor)
    seccomp.install()
    return wasi, {"namespaces": namespaces, "own_user": root, "landlock": landlock, "seccomp": True}


def compile_module(spec: dict[str, Any]) -> None:
    """Compile the module and write machine code to stdout.

    Errors: Unusable when the module is not one this runtime can run.
    """
    import wasmtime

    with open(spec["module"], "rb", closefd=False) as file:
        source = file.read()
    try:
        module = wasmtime.Module(wasmtime.Engine(engine_config()), source)
    except wasmtime.WasmtimeError as error:
        raise Unusable(f"not a valid WebAssembly module: {_first_line(error)}") from None
    _check_imports(module)
    code = memoryview(module.serialize())
    while code:
        code = code[os.write(1, code) :]


def _check_imports(module: Any) -> None:
    foreign = sorted({f"{item.module}.{item.name}" for item in module.imports if item.module != WASI})
    if any(name.startswith("wasi_unstable.") for name in foreign):
        raise Unusable("the module imports wasi_unstable (WASI snapshot 0), which is gone: rebuild it for " + WASI)
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise Unusable(f"the module imports what this runtime does not have: {', '.join(foreign[:5])}{more}")
    if not any(item.name == "_start" for item in module.exports):
        raise Unusable("the module has no _start: it is a library, not a command")


def run_command(spec: dict[str, Any], wasi: Any) -> tuple[int, str | None]:
    """Run the module's `_start`; returns the exit code and, if the guest did not exit by itself, the reason."""
    import wasmtime

    engine = wasmtime.Engine(engine_config())
    # The path of an inherited descriptor: Landlock allows this very file and nothing around it.
    module = wasmtime.Module.deserialize_file(engine, f"/proc/self/fd/{spec['module']}")
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    store = wasmtime.Store(engine)
    memory_limit = spec["limits"]["memory"]
    store.set_limits(memory_size=memory_limit, table_elements=MAX_TABLE_ELEMENTS, instances=1, tables=16, memories=1)
    wasi.argv = spec["argv"]
    wasi.env = list(spec["env"].items())
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    store.set_wasi(wasi)
    memory = None
    try:
        exports: Any = linker.instantiate(store, module).exports(store)
        memory = exports.get("memory")
        seccomp.forbid_new_code()
        exports["_start"](store)
    except wasmtime.ExitTrap as exit_:
        return exit_.code, None
    except wasmtime.Trap as trap:
        return EXIT_TRAP, _trap_text(trap) + _memory_note(store, memory, memory_limit)
    except wasmtime.WasmtimeError as error:
        return EXIT_BAD_MODULE, f"the module could not be run: {_first_line(error)}"
    return 0, None


def probe() -> str | None:
    """Try what must not be possible any more; returns what was, or None."""
    open_doors = []
    for name, attempt in (
        ("reading files", lambda: os.open("/etc/passwd", os.O_RDONLY)),
        ("listing directories", lambda: os.listdir("/")),
        ("sockets", seccomp.open_socket),
        ("new processes", os.fork),
        ("signals", lambda: os.kill(os.getppid(), 0)),
        ("becoming root", lambda: os.setuid(0)),
    ):
        try:
            attempt()
        except OSError:
            continue
        open_doors.append(name)
    return f"the sandbox does not stop: {', '.join(open_doors)}" if open_doors else None


def _trap_text(trap: Any) -> str:
    return f"trap: {trap.trap_code.name.lower().replace('_', ' ')}" if trap.trap_code is not None else "trap"


def _memory_note(store: Any, memory: Any, limit: int) -> str:
    """Guests mostly trap when memory cannot grow: say so where that is likely."""
    used = memory.data_len(store) if hasattr(memory, "data_len") else 0
    if used < limit * 0.9:
        return ""
    return f" (memory was at {used >> 20} of at most {limit >> 20} MiB)"


def _first_line(error: Exception) -> str:
    return " / ".join(line.strip() for line in str(error).splitlines() if line.strip())[:500]


def main() -> None:
    """`argv`: descriptor of the orders, descriptor for the report."""
    spec_fd, report_fd = int(sys.argv[-2]), int(sys.argv[-1])
    with open(spec_fd, "rb") as file:
        spec = json.load(file)
    status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    summary: dict[str, Any] = {}
    code, reason = EXIT_BAD_MODULE, None
    try:
        wasi, summary = lock_in(spec)
        if spec["do"] == "compile":
            compile_module(spec)
            code = 0
        elif spec["do"] == "probe":
            reason = probe()
            code = 0 if reason is None else 1
        else:
            code, reason = run_command(spec, wasi)
    except Unusable as error:
        reason = str(error)
    except MemoryError:
        reason = "out of memory"
    except OSError as error:
        reason = f"the sandbox could not be set up: {error}"
    report = json.dumps({"code": code, "reason": reason, "isolation": summary}).encode()
    os.write(report_fd, report + b"\0" + os.pread(status, 8192, 0))
    os._exit(code & 0xFF)
