"""What `run` does while it reads thousands of files for the first time."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from splitlearn_manager.cli.run import files_read


@pytest.fixture(autouse=True)
def collection() -> Iterator[None]:
    """Nothing is exempted before, nor after, and nothing is set for the tests that follow."""
    usual = gc.get_threshold()
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.set_threshold(*usual)


def test_what_was_read_is_exempted_from_garbage_collection_at_the_end() -> None:
    told = files_read(None, lambda: False)
    told(0, 200)
    told(199, 200)
    assert gc.get_freeze_count() == 0
    told(200, 200)
    assert gc.get_freeze_count() > 0


def test_garbage_is_collected_seldom_while_files_are_read() -> None:
    usual = gc.get_threshold()
    told = files_read(None, lambda: True)
    try:
        told(0, 200)
        assert gc.get_threshold()[0] > 50 * usual[0]
        while_reading = gc.get_threshold()[0]
        told(200, 200)
        assert usual[0] < gc.get_threshold()[0] < while_reading
    finally:
        gc.set_threshold(*usual)


def test_nothing_is_exempted_while_there_are_models_whose_memory_must_come_back() -> None:
    files_read(None, lambda: True)(200, 200)
    assert gc.get_freeze_count() == 0
