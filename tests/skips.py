"""What a machine lacks for the tests that were skipped, in one line: their reasons name it."""

from __future__ import annotations

import re
from collections.abc import Sequence


def what_to_install(reasons: Sequence[str]) -> str | None:
    """Say what runs the skipped tests, by the reason of each; None where nothing was skipped."""
    if not reasons:
        return None
    packages: set[str] = set()
    needs_root, helped = False, 0
    for reason in reasons:
        named = re.search(r"apt-get install ([a-z0-9][a-z0-9 .+-]*)", reason)
        as_root = re.search(r"\broot\b", reason) is not None
        packages.update(named[1].split() if named else ())
        needs_root |= as_root
        helped += bool(named or as_root)
    means = [*(["root"] if needs_root else []), *([f"apt-get install {' '.join(sorted(packages))}"] if packages else [])]
    if not means:
        return f"{len(reasons)} tests were skipped; their reasons stand above"
    others = f"; {len(reasons) - helped} others say why above" if helped < len(reasons) else ""
    return f"{len(reasons)} tests were skipped; {helped} of them run with {' and '.join(means)}{others}"
