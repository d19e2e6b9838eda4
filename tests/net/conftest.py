"""Every test of the network layer also asserts that no host crashed unnoticed and no handler of ours had a bug."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

EXPECTED = ("crash", "bug", "raises", "refus", "bulk")  # tests that provoke an error of ours say so in their name


@pytest.fixture(autouse=True)
def no_silent_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    errors: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(self.format(record))

    collector = Collector(logging.ERROR)
    logger = logging.getLogger("golem.net")
    logger.addHandler(collector)
    yield
    logger.removeHandler(collector)
    if not any(word in request.node.name for word in EXPECTED):
        assert errors == []
