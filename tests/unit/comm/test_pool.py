"""A pool counts what it has, and nothing else."""

from __future__ import annotations

import pytest

from splitlearn_comm.server.pool import BoundedPool


def test_what_a_pool_does_not_take_does_not_count() -> None:
    """It counted for ever: a server that had stopped said that a model still ran."""
    pool = BoundedPool("test", 1, 0)
    assert pool.submit(lambda: 1).result() == 1
    pool.shutdown()
    with pytest.raises(RuntimeError):
        pool.submit(lambda: 1)
    assert pool.wait_idle(0.0)
    assert not pool.full
