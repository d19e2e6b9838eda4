"""What a WebAssembly command costs: compiling, finding compiled code, and one locked-down process per run.

Run: python benchmarks/bench_wasm.py [--runs N] [--json FILE] [module.wasm [argument ...]]
Without a module it assembles a small one (hello), and one of a few thousand functions to compile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import trio
import wasmtime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golem.exeunit.runtime import DeployOptions, Limits, Side
from golem.exeunit.runtimes.wasm.runtime import WasmRuntime

HELLO = """
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 8) "hello\\n")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 8)) (i32.store (i32.const 4) (i32.const 6))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 20))))
  %s)
"""


def large_module(functions: int = 4000) -> bytes:
    """Hello with many functions of some arithmetic each."""
    body = "(i32.mul (i32.add (local.get 0) (i32.const 7)) (i32.const 3))"
    for _ in range(4):
        body = f"(i32.xor {body} (i32.rotl {body} (i32.const 5)))"
    return bytes(wasmtime.wat2wasm(HELLO % (f"(func (param i32) (result i32) {body})" * functions)))


async def _ignore(side: Side, chunk: bytes) -> None:
    """Output is not what is measured here."""


async def start_time_s(module: bytes, directory: Path, cache: Path) -> tuple[WasmRuntime, float]:
    """Deploy and start; returns the runtime and the seconds that start took."""
    work = directory / f"work-{time.monotonic_ns()}"
    work.mkdir()
    image = directory / "image"
    image.write_bytes(module)
    runtime = WasmRuntime(cache)
    await runtime.deploy(image, DeployOptions(work, Limits(mem_gib=1, cpu_threads=2)))
    begin = time.perf_counter()
    await runtime.start([])
    return runtime, time.perf_counter() - begin


async def bench(name: str, module: bytes, args: list[str], runs: int) -> dict[str, float]:
    """Print the figures of a module and return them, times in milliseconds."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        cache = directory / "compiled"
        first, compile_s = await start_time_s(module, directory, cache)
        charged_s, peak_gib = first.usage().cpu_sec, first.usage().gib
        await first.stop()
        runtime, cached_s = await start_time_s(module, directory, cache)
        times = []
        for _ in range(runs):
            begin = time.perf_counter()
            status = await runtime.run("bench", args, _ignore)
            times.append((time.perf_counter() - begin) * 1000)
        cpu_ms = runtime.usage().cpu_sec / runs * 1000
        await runtime.stop()
    print(f"{name}: {len(module) / 1e6:.3f} MB, exit {status.code} {status.reason or ''}")
    print(f"  start, compiling   {compile_s * 1000:9.1f} ms   ({charged_s:.2f} CPU s, peak {peak_gib:.2f} GiB)")
    print(f"  start, from cache  {cached_s * 1000:9.1f} ms")
    spread = f"{min(times):.1f} best, {max(times):.1f} worst, CPU {cpu_ms:.1f} ms, {runs} runs"
    print(f"  run                {statistics.median(times):9.1f} ms median ({spread})")
    return {
        "compile_ms": compile_s * 1000, "compile_cpu_s": charged_s, "compile_peak_gib": peak_gib, "cached_ms": cached_s * 1000,
        "run_median_ms": statistics.median(times), "run_max_ms": max(times), "run_cpu_ms": cpu_ms,
    }  # fmt: skip


def bare_run_ms(module: bytes, runs: int) -> float:
    """The same module in this process without any sandbox: what is left of a run's time is the sandbox's price."""
    engine = wasmtime.Engine()
    compiled = wasmtime.Module(engine, module)
    times = []
    with tempfile.NamedTemporaryFile() as out:
        for _ in range(runs):
            begin = time.perf_counter()
            linker, store, wasi = wasmtime.Linker(engine), wasmtime.Store(engine), wasmtime.WasiConfig()
            linker.define_wasi()
            wasi.stdout_file = out.name
            store.set_wasi(wasi)
            linker.instantiate(store, compiled).exports(store)["_start"](store)  # type: ignore[operator]
            times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("module", nargs="?", type=Path)
    parser.add_argument("args", nargs="*")
    options = parser.parse_args()
    refused = await WasmRuntime(Path(tempfile.mkdtemp())).self_test()
    if refused:
        raise SystemExit(refused)
    if options.module:
        name = options.module.name
        figures = {name: await bench(name, options.module.read_bytes(), options.args, options.runs)}
    else:
        hello = bytes(wasmtime.wat2wasm(HELLO % ""))
        figures = {"hello": await bench("hello", hello, [], options.runs)}
        figures["hello"]["run_in_process_ms"] = bare_run_ms(hello, options.runs)
        print(f"  same, in process   {figures['hello']['run_in_process_ms']:9.1f} ms median (no sandbox)")
        figures["4000 functions"] = await bench("4000 functions", large_module(), [], max(3, options.runs // 3))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    trio.run(main)
