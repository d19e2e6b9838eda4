"""The small parts around runtimes: sizes, volume requests, packages, counters, trees, the lock-down itself."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import wat_modules as wat
from worlds.patience import patience

from golem.exeunit.runtime import GIB, RuntimeFault, Usage, VolumeRequest, check_arguments, guest_path, parse_size, parse_volumes
from golem.exeunit.runtimes.wasm.package import Mount, copy_module, read_package
from golem.exeunit.usage import COUNTERS, Counters, measure_tree, process_cpu_s, process_peak_bytes, remove_tree

# -- what a deploy command says -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512", 512), ("1g", 10**9), ("1.5 GiB", 3 << 29), ("2MB", 2 * 10**6), ("4ki", 4096), (7, 7), ("1TiB", 1 << 40)],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "g", "-1", "1x", "1e9", "0x10", "1" * 40])
def test_no_sizes(text: str) -> None:
    with pytest.raises(RuntimeFault, match="not a size"):
        parse_size(text)


def test_volume_requests() -> None:
    assert parse_volumes(None) == ()
    assert parse_volumes(["/a", "b/"]) == (VolumeRequest("/a"), VolumeRequest("/b"))
    raw = {"/a": {"host": {}}, "/b": {"ram": {"size": "1g"}}, "/c": {"storage": {"size": "1gib", "errors": "panic"}}}
    assert parse_volumes(raw) == (
        VolumeRequest("/a"), VolumeRequest("/b", "ram", 10**9), VolumeRequest("/c", "storage", GIB)
    )  # fmt: skip
    bad_maps = ({"/a": {}}, {"/a": {"nfs": {}}}, {"/a": None}, {"/a": {"ram": {"size": "x"}}})
    for bad in ("/a", 5, ["/a/../b"], [5], *bad_maps):
        with pytest.raises(RuntimeFault):
            parse_volumes(bad)


def test_guest_paths() -> None:
    assert [guest_path(path) for path in ("a//b/", "/", "/a")] == ["/a/b", "/", "/a"]
    for bad in ("", "a/./b", "..", "a\0", "x" * 5000, None):
        with pytest.raises(RuntimeFault):
            guest_path(bad)


def test_arguments_are_bounded() -> None:
    check_arguments(["x"] * 100)
    for bad in (["x"] * 5000, ["x" * (1 << 20)]):
        with pytest.raises(RuntimeFault, match="too"):
            check_arguments(bad)


# -- packages -----------------------------------------------------------------------------------------------------


def zipped(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_package_is_read(tmp_path: Path) -> None:
    manifest = {
        "id": "i", "name": "n", "runtime": "wasi", "future": 1,
        "entry-points": [{"id": "e", "wasm-path": "bin/a.wasm"}, {"id": "e", "wasm-path": "other.wasm"}],
        "mount-points": [{"ro": "in"}, {"wo": "/out/x"}, {"private": "tmp"}],
    }  # fmt: skip
    package = read_package(zipped(tmp_path / "p", wat.package({"bin/a.wasm": b"code"}, manifest)))
    assert package.entry_points == {"e": "bin/a.wasm"}  # the first of a name counts
    assert package.mounts == (Mount("ro", "/in"), Mount("wo", "/out/x"), Mount("private", "/tmp"))
    out = io.BytesIO()
    copy_module(tmp_path / "p", "bin/a.wasm", out, max_bytes=4)
    assert out.getvalue() == b"code"
    with pytest.raises(RuntimeFault, match="too large: 4 bytes, at most 3"):
        copy_module(tmp_path / "p", "bin/a.wasm", io.BytesIO(), max_bytes=3)


GOOD = {"id": "i", "name": "n", "entry-points": [{"id": "a", "wasm-path": "a.wasm"}]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": 5}, "id must be a text"),
        ({"runtime": "aswasm"}, "only wasi packages"),
        ({"entry-points": []}, "no entry-points"),
        ({"entry-points": ["x"]}, "list of at most"),
        ({"entry-points": [{"id": "a", "wasm-path": "../a.wasm"}]}, "leads out of the package"),
        ({"entry-points": [{"id": "a", "wasm-path": "/a.wasm"}]}, "leads out of the package"),
        ({"entry-points": [{"id": "a", "wasm-path": "b.wasm"}]}, "not in the package"),
        ({"mount-points": [{"rw": "../.."}]}, r"\.\."),
        ({"mount-points": [{"rw": "a"}, {"ro": "/a"}]}, "twice"),
        ({"mount-points": [{"xx": "a"}]}, "unknown mount point kind"),
        ({"mount-points": [{"ro": "a", "rw": "b"}]}, "one key"),
        ({"mount-points": [{"rw": f"/{n}"} for n in range(99)]}, "at most 64"),
    ],
)
def test_bad_manifests(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(RuntimeFault, match=reason):
        read_package(zipped(tmp_path / "p", wat.package({"a.wasm": b""}, {**GOOD, **changes})))


def test_zip_bombs_and_oddities(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b"[" * (2 << 20))
    with pytest.raises(RuntimeFault, match="too large"):
        read_package(zipped(tmp_path / "big", buffer.getvalue()))

    # A lie about the size: the true stream is longer than the directory says.
    honest = wat.package({"a.wasm": b"x" * 5_000_000}, GOOD)
    at = honest.rindex(b"PK\x01\x02")
    assert struct.unpack_from("<I", honest, at + 24) == (5_000_000,)
    lie = honest[: at + 24] + struct.pack("<I", 10) + honest[at + 28 :]
    with pytest.raises(RuntimeFault, match=r"damaged|too large"):
        copy_module(zipped(tmp_path / "lie", lie), "a.wasm", io.BytesIO(), max_bytes=1000)

    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("manifest.json", "{}")
    with pytest.raises(RuntimeFault, match="only stored or deflated"):
        read_package(zipped(tmp_path / "lzma", buffer.getvalue()))

    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for number in range(10_001):
            archive.writestr(str(number), b"")
    with pytest.raises(RuntimeFault, match="too many entries"):
        read_package(zipped(tmp_path / "many", buffer.getvalue()))

    for content in (b"PK\x03\x04", b"", b"PK\x05\x06" + b"\0" * 10, honest[:-30]):
        with pytest.raises(RuntimeFault, match="zip"):
            read_package(zipped(tmp_path / "cut", content))
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("manifest.json", "[" * 200_000)
    with pytest.raises(RuntimeFault, match="not valid JSON"):
        read_package(zipped(tmp_path / "deep", buffer.getvalue()))


# -- counters and trees -------------------------------------------------------------------------------------------


def test_counters_never_go_down() -> None:
    usage = Usage(cpu_sec=2, gib=0.5, storage_gib=1)
    counters = Counters(lambda: usage, now_s=100)
    assert counters.vector([COUNTERS[1], COUNTERS[0], "golem.usage.other"], now_s=110) == [2, 10, 0]
    usage = Usage(cpu_sec=1, gib=0.7, storage_gib=0)
    assert list(counters.read(now_s=105).values()) == [10, 2, 0.7, 1]


def test_own_process_has_usage() -> None:
    assert process_cpu_s(os.getpid()) > 0
    assert process_peak_bytes(os.getpid()) > 1 << 20
    assert (process_cpu_s(2**22 + 1), process_peak_bytes(2**22 + 1)) == (0, 0)


def test_tree_size_counts_links_once_and_follows_no_symlink(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    (root / "d/f").write_bytes(b"x" * 100_000)
    os.link(root / "d/f", root / "g")
    (root / "s").symlink_to("/usr")
    size = measure_tree(root)
    assert size.complete
    assert size.entries == 4
    assert 100_000 <= size.size_bytes < 150_000
    assert not measure_tree(root, max_entries=3).complete
    assert measure_tree(tmp_path / "none").size_bytes == 0


def test_any_tree_can_be_removed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "s").symlink_to(tmp_path)
    os.mkfifo(root / "p")
    fd = os.open(root, os.O_RDONLY)
    for _ in range(2000):
        os.mkdir("d", dir_fd=fd)
        os.mkdir("e", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    assert not measure_tree(root).complete
    (tmp_path / "stays").write_text("x")
    remove_tree(root)
    assert [path.name for path in tmp_path.iterdir()] == ["stays"]
    remove_tree(root)


# -- the lock-down, from Python inside it -------------------------------------------------------------------------

LOCKED = """
    import os, ctypes, mmap, threading, time, sys
    from golem.exeunit.sandbox import lockdown, seccomp
    libc = ctypes.CDLL(None, use_errno=True)
    allowed, readable, parent = (os.open(path, os.O_PATH) for path in sys.argv[1:4])
    lockdown.restrict_files([(allowed, lockdown.READ_WRITE), (readable, lockdown.READ_ONLY)])
    seccomp.install()

    def outcome(attempt):
        try:
            attempt()
        except OSError as error:
            return "refused"
        return "done"

    def call(number, *args):
        ctypes.set_errno(0)
        if libc.syscall(number, *args) >= 0:
            return
        if ctypes.get_errno() in (1, 38):  # EPERM, ENOSYS: the filter's answers; the kernel's own would be others
            raise OSError(ctypes.get_errno(), "filtered")

    def write(path):
        with open(path, "w") as file:
            file.write("x")

    thread = threading.Thread(target=lambda: None); thread.start(); thread.join()
    print("threads done")
    print("write inside", outcome(lambda: write(sys.argv[1] + "/f")))
    print("write read-only", outcome(lambda: write(sys.argv[2] + "/f")))
    print("read read-only", outcome(lambda: os.listdir(sys.argv[2])))
    print("fifo", outcome(lambda: os.mkfifo(sys.argv[1] + "/p")))
    print("read outside", outcome(lambda: open("/etc/hostname").read()))
    print("list outside", outcome(lambda: os.listdir(sys.argv[3])))
    for name, number in (("socket", 41), ("socketpair", 53), ("ptrace", 101), ("io_uring_setup", 425), ("bpf", 321),
                         ("memfd_create", 319), ("execve", 59), ("fork", 57), ("vfork_clone3", 435), ("mount", 165),
                         ("unshare", 272), ("kill", 62), ("pidfd_open", 434), ("userfaultfd", 323), ("keyctl", 250)):
        print(name, outcome(lambda: call(number, 0, 0, 0, 0, 0, 0)))
    print("fork", outcome(os.fork))
    print("tgkill other", outcome(lambda: call(234, os.getppid(), os.getppid(), 0)))
    print("set dumpable", outcome(lambda: call(157, 4, 1, 0, 0, 0)))
    print("terminal input", outcome(lambda: call(16, 1, 0x5412, 0)))
    print("code before", outcome(lambda: mmap.mmap(-1, 4096, prot=7)))
    seccomp.forbid_new_code()
    print("code after", outcome(lambda: mmap.mmap(-1, 4096, prot=7)))
    print("filter after", outcome(seccomp.forbid_new_code))
    sys.stdout.flush()
    os._exit(0)
"""


def test_lock_down(tmp_path: Path) -> None:
    for name in ("rw", "ro"):
        (tmp_path / name).mkdir()
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n" + textwrap.dedent(LOCKED)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "rw"), str(tmp_path / "ro"), str(tmp_path)],
        capture_output=True, text=True, timeout=patience(30),
    )  # fmt: skip
    assert done.stderr == ""
    may = {"threads", "write inside", "read read-only", "code before"}
    lines = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert len(lines) == 29
    assert dict(lines) == {name: "done" if name in may else "refused" for name, _ in lines}
