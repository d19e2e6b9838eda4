"""The inside of the sandboxed process that reads a stranger's image: locks itself in, converts one package, ends.

Started by `images` as `python -I -S`, with a descriptor to read its orders from, one to report on, and the open files it
works with; it opens none itself. Progress goes to stdout as lines of a percentage; the report is a JSON object with
`layers` (digests of what was written) or `problem` (a text for the requestor).
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from golem.exeunit.sandbox import lockdown, seccomp
from golem.exeunit.unpack import archives, squashfs
from golem.exeunit.unpack.inflate import BadImage

MAX_OPEN_FILES = 32


def lock_in(spec: dict[str, Any]) -> None:
    """Give up everything but the open files. Errors: OSError."""
    limits = spec["limits"]
    lockdown.limit_resources(
        cpu_s=limits["cpu_s"], data_bytes=limits["memory_bytes"], file_bytes=spec["room"], open_files=MAX_OPEN_FILES
    )
    if os.geteuid() == 0:
        lockdown.enter_namespaces()
        lockdown.become(spec["uid"])
    lockdown.drop_capabilities()
    lockdown.die_with_parent(spec["parent"])
    if lockdown.landlock_abi():
        lockdown.restrict_files(())
    if seccomp.supported():
        seccomp.install()
        seccomp.forbid_new_code()


def convert(spec: dict[str, Any], report: Callable[[bytes], object]) -> tuple[list[str], int]:
    """Convert the package; returns the digests of its layers as they were written, and how many files it has.
    Errors: BadImage, OSError.

    `report` is given lines of a growing percentage.
    """
    last = 0

    def progress(share: float) -> None:
        nonlocal last
        percent = int(100 * share)
        if percent > last:
            last = percent
            report(b"%d\n" % percent)

    limits = {name: spec["limits"][name] for name in ("unpacked_bytes", "members", "layers", "ratio", "free_bytes")}
    package = archives.Package(
        descriptor=spec["package"],
        size=os.fstat(spec["package"]).st_size,
        inflated_to=spec["inflated"],
        machine=spec["machine"],
        limits=archives.ArchiveLimits(**limits, room=spec["room"]),
        progress=progress,
    )
    output = archives.ArchiveOutput(spec["archive"], spec["tag"])
    if spec["format"] == "GVMI":
        archives.convert_gvmi(package, output)
    elif spec["format"] == "ROOTFS_ARCHIVE":
        archives.convert_rootfs(package, output)
    else:
        archives.convert_blobs(package, output)
    return output.diff_ids, output.members


def main() -> None:
    """`argv`: descriptor of the orders, descriptor for the report."""
    spec_fd, report_fd = int(sys.argv[-2]), int(sys.argv[-1])
    with open(spec_fd, "rb") as file:
        spec = json.load(file)
    report: dict[str, Any]
    try:
        squashfs.load_libraries()
        lock_in(spec)
        layers, members = convert(spec, lambda line: os.write(1, line))
        report = {"layers": layers, "members": members}
    except BadImage as problem:
        report = {"problem": str(problem)}
    except MemoryError:
        report = {"problem": "its parts take more memory than there is for reading it"}
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        report = {"problem": "there is not enough disk space to unpack it" if full else f"it cannot be read: {error}"}
    os.write(report_fd, json.dumps(report).encode())
    os._exit(0 if "layers" in report else 1)
