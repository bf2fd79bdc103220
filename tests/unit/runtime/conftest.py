"""Models in worker processes, for the tests beside this."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from splitlearn_manager.runtime.process import RunningInProcess


@pytest.fixture
def started() -> Iterator[list[RunningInProcess]]:
    """What is put into it is closed in the end."""
    running: list[RunningInProcess] = []
    yield running
    for each in running:
        each.close()
