"""WebAssembly programs for the tests, written as text and assembled on the spot: small, and some of them hostile."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import wasmtime

_IMPORTS = {
    "fd_write": "(param i32 i32 i32 i32) (result i32)",
    "fd_read": "(param i32 i32 i32 i32) (result i32)",
    "fd_close": "(param i32) (result i32)",
    "path_open": "(param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)",
    "path_create_directory": "(param i32 i32 i32) (result i32)",
    "path_unlink_file": "(param i32 i32 i32) (result i32)",
    "path_symlink": "(param i32 i32 i32 i32 i32) (result i32)",
    "poll_oneoff": "(param i32 i32 i32 i32) (result i32)",
    "args_get": "(param i32 i32) (result i32)",
    "args_sizes_get": "(param i32 i32) (result i32)",
    "environ_get": "(param i32 i32) (result i32)",
    "environ_sizes_get": "(param i32 i32) (result i32)",
    "proc_exit": "(param i32)",
}
# path_open with every right a preview 1 guest can ask for on a file.
_RIGHTS = "(i64.const 0x1fffffff) (i64.const 0x1fffffff)"


def program(body: str, *, data: str = "", pages: int = 1, more: str = "") -> bytes:
    """A command whose `_start` is `body`; `data` lies at 1024; the first 1024 bytes are scratch."""
    imports = "\n".join(f'(import "wasi_snapshot_preview1" "{name}" (func ${name} {kind}))' for name, kind in _IMPORTS.items())
    return bytes(
        wasmtime.wat2wasm(
            f"""(module {imports}
            (memory (export "memory") {pages})
            (data (i32.const 1024) "{data}")
            {more}
            (func $print (param $fd i32) (param $at i32) (param $len i32) (result i32)
              (i32.store (i32.const 0) (local.get $at)) (i32.store (i32.const 4) (local.get $len))
              (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8)))
            (func (export "_start") (local $i i32) (local $r i32) {body}))"""
        )
    )


def say(text: str, code: int = 0, stderr: str = "") -> bytes:
    """Print to both sides and exit."""
    body = f"""(drop (call $print (i32.const 1) (i32.const 1024) (i32.const {len(text)})))
               (drop (call $print (i32.const 2) (i32.const {1024 + len(text)}) (i32.const {len(stderr)})))"""
    return program(body + (f"(call $proc_exit (i32.const {code}))" if code else ""), data=text + stderr)


LOOP = program("(loop $again (br $again))")
FLOOD = program("(loop $again (drop (call $print (i32.const 1) (i32.const 1024) (i32.const 60000))) (br $again))", pages=2)
UP_AND_LOOP = program("(drop (call $print (i32.const 1) (i32.const 1024) (i32.const 3))) (loop $again (br $again))", data="up!")
TRAP = program("unreachable")
DEEP = program("(call $deep)", more="(func $deep (call $deep))")
# Grow a MiB at a time, touch it, trap when there is no more.
MEMORY_BOMB = program(
    """(loop $again
         (local.set $r (memory.grow (i32.const 16)))
         (if (i32.lt_s (local.get $r) (i32.const 0)) (then unreachable))
         (memory.fill (i32.mul (local.get $r) (i32.const 65536)) (i32.const 1) (i32.const 1048576))
         (br $again))"""
)
# One relative clock subscription of 100 s.
SLEEP = program(
    """(i32.store (i32.const 128) (i32.const 0)) (i32.store (i32.const 144) (i32.const 1))
       (i64.store (i32.const 152) (i64.const 100000000000))
       (call $proc_exit (call $poll_oneoff (i32.const 128) (i32.const 256) (i32.const 1) (i32.const 8)))"""
)


def print_strings(sizes_get: str, get: str) -> bytes:
    """Print argv (or the environment) as NUL-ended strings."""
    return program(
        f"""(drop (call ${sizes_get} (i32.const 16) (i32.const 20)))
            (drop (call ${get} (i32.const 32) (i32.const 2048)))
            (drop (call $print (i32.const 1) (i32.const 2048) (i32.load (i32.const 20))))"""
    )


ARGS = print_strings("args_sizes_get", "args_get")
ENVIRONMENT = print_strings("environ_sizes_get", "environ_get")


def _open(path_at: int, length: int, oflags: int, directory_fd: int = 3, lookup: int = 1, rights: str = _RIGHTS) -> str:
    return f"""(call $path_open (i32.const {directory_fd}) (i32.const {lookup}) (i32.const {path_at})
        (i32.const {length}) (i32.const {oflags}) {rights} (i32.const 0) (i32.const 12))"""


def write_file(path: str, text: str, directory_fd: int = 3) -> bytes:
    """Create a file below a preopened directory; exits with the WASI error number of what fails."""
    return program(
        f"""(local.set $r {_open(1024, len(path), 9, directory_fd)})
            (if (local.get $r) (then (call $proc_exit (local.get $r))))
            (call $proc_exit
              (call $print (i32.load (i32.const 12)) (i32.const {1024 + len(path)}) (i32.const {len(text)})))""",
        data=path + text,
    )


def read_file(path: str, directory_fd: int = 3) -> bytes:
    """Print the first bytes of a file; exits with the WASI error number of what fails."""
    rights = "(i64.const 2) (i64.const 2)"
    return program(
        f"""(local.set $r {_open(1024, len(path), 0, directory_fd, rights=rights)})
            (if (local.get $r) (then (call $proc_exit (local.get $r))))
            (i32.store (i32.const 0) (i32.const 4096)) (i32.store (i32.const 4) (i32.const 4096))
            (local.set $r (call $fd_read (i32.load (i32.const 12)) (i32.const 0) (i32.const 1) (i32.const 8)))
            (if (local.get $r) (then (call $proc_exit (local.get $r))))
            (drop (call $print (i32.const 1) (i32.const 4096) (i32.load (i32.const 8))))""",
        data=path,
    )


READ_STDIN = program(
    """(i32.store (i32.const 0) (i32.const 4096)) (i32.store (i32.const 4) (i32.const 16))
       (local.set $r (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
       (if (local.get $r) (then (call $proc_exit (local.get $r))))
       (call $proc_exit (i32.load (i32.const 8)))"""
)

# Append 60 kB a time to one file until that fails; exits with the error number.
FILE_BOMB = program(
    f"""(local.set $r {_open(1024, 4, 9)})
        (loop $again
          (local.set $r (call $print (i32.load (i32.const 12)) (i32.const 2048) (i32.const 60000)))
          (br_if $again (i32.eqz (local.get $r))))
        (call $proc_exit (local.get $r))""",
    data="bomb",
    pages=2,
)


# Make files named by a counter until that fails, and do something to each; exits with the error number.
def _files(then: str) -> bytes:
    letters = "".join(
        f"""(i32.store8 (i32.const {1024 + at}) (i32.add (i32.const 65)
            (i32.and (i32.shr_u (local.get $i) (i32.const {4 * at})) (i32.const 15))))"""
        for at in range(5)
    )
    return program(
        f"""(loop $again
          (local.set $i (i32.add (local.get $i) (i32.const 1)))
          {letters}
          (local.set $r {_open(1024, 5, 9)})
          (if (local.get $r) (then (call $proc_exit (local.get $r))))
          {then}
          (if (local.get $r) (then (call $proc_exit (local.get $r))))
          (br $again))""",
        data="AAAAA",
        pages=2,
    )


_WRITE = "(local.set $r (call $print (i32.load (i32.const 12)) (i32.const 2048) (i32.const 60000)))"
_CLOSE = "(drop (call $fd_close (i32.load (i32.const 12))))"
MANY_FILES = _files(_WRITE + _CLOSE)  # 60 kB each
EMPTY_FILES = _files(_CLOSE)
# Files without a name, each written until that fails: then the next one.
HIDDEN_FILES = _files(
    f"""(drop (call $path_unlink_file (i32.const 3) (i32.const 1024) (i32.const 5)))
        (loop $more {_WRITE} (br_if $more (i32.eqz (local.get $r)))) (local.set $r (i32.const 0))"""
)


# A directory in a directory in a directory ... `depth` levels; each level is opened to make the next.
def nested_directories(depth: int) -> bytes:
    return program(
        f"""(local.set $r (i32.const 3))
            (loop $again
              (drop (call $path_create_directory (local.get $r) (i32.const 1024) (i32.const 1)))
              (drop (call $path_open (local.get $r) (i32.const 0) (i32.const 1024) (i32.const 1) (i32.const 2)
                (i64.const 0x6200) (i64.const 0x6200) (i32.const 0) (i32.const 12)))
              (if (i32.ne (local.get $r) (i32.const 3)) (then (drop (call $fd_close (local.get $r)))))
              (local.set $r (i32.load (i32.const 12)))
              (local.set $i (i32.add (local.get $i) (i32.const 1)))
              (br_if $again (i32.lt_s (local.get $i) (i32.const {depth}))))""",
        data="d",
    )


def plant_symlink(target: str, name: str) -> bytes:
    """Make a symlink in the first preopened directory; exits with the error number."""
    return program(
        f"""(call $proc_exit (call $path_symlink (i32.const 1024) (i32.const {len(target)}) (i32.const 3)
              (i32.const {1024 + len(target)}) (i32.const {len(name)})))""",
        data=target + name,
    )


def importing(module: str, name: str) -> bytes:
    """A command that wants a function nobody offers (or an old WASI)."""
    return bytes(wasmtime.wat2wasm(f'(module (import "{module}" "{name}" (func)) (func (export "_start")))'))


def _leb(number: int) -> bytes:
    out = b""
    while True:
        byte, number = number & 0x7F, number >> 7
        out += bytes([byte | (0x80 if number else 0)])
        if not number:
            return out


def compile_bomb(local_count: int = 10_000) -> bytes:
    """A small, valid module with one function of very many live locals: minutes of work for an optimising compiler."""
    body = _leb(1) + _leb(local_count) + b"\x7f"
    for number in range(local_count):
        body += b"\x20\x00\x04\x40" + b"\x20\x00\x21" + _leb(1 + number) + b"\x0b"
    for number in range(local_count):
        body += b"\x20" + _leb(1 + number) + b"\x20\x00\x6a\x21\x00"
    body += b"\x20\x00\x0b"

    def section(kind: int, content: bytes) -> bytes:
        return bytes([kind]) + _leb(len(content)) + content

    return (
        b"\0asm\1\0\0\0"
        + section(1, b"\x01\x60\x01\x7f\x01\x7f")
        + section(3, b"\x01\x00")
        + section(10, b"\x01" + _leb(len(body)) + body)
    )


def package(modules: dict[str, bytes], manifest: dict[str, Any] | None = None, **changes: Any) -> bytes:
    """A WASI package: `modules` by path in the zip, one entry point each unless a manifest is given."""
    points = [{"id": name.removesuffix(".wasm"), "wasm-path": name} for name in modules]
    content = manifest or {"id": "test", "name": "test", "entry-points": points, "mount-points": [], **changes}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", json.dumps(content))
        for name, data in modules.items():
            archive.writestr(name, data)
    return buffer.getvalue()
