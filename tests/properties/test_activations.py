"""What two forwards tell of a third: for any batch, the moment that takes most, and never less."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitlearn_manager.runtime.activations import Forward, between

MB = 2**20
MOMENTS = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 50)), min_size=1, max_size=40)
"""At each moment of a forward: MB whatever the batch, and MB for each input."""


def in_use(moments: list[tuple[int, int]], batch: int) -> tuple[int, ...]:
    return tuple((fixed + each * batch) * MB for fixed, each in moments)


@given(MOMENTS, st.integers(1, 4), st.integers(1, 4), st.integers(1, 2000))
def test_a_forward_is_foretold_exactly(
    moments: list[tuple[int, int]], small: int, more: int, batch: int
) -> None:
    """Seen to fail with only the peaks of both forwards compared, and with the first forward's use taken for
    what a forward takes whatever the batch."""
    first = Forward(small, in_use(moments, small))
    second = Forward(small + more, in_use(moments, small + more))
    found = between(first, second)
    assert found.mb(batch) == pytest.approx(max(in_use(moments, batch)) / MB)


@given(MOMENTS, MOMENTS, st.integers(3, 100))
def test_forwards_that_differ_foretell_at_least_what_both_took(
    one: list[tuple[int, int]], other: list[tuple[int, int]], batch: int
) -> None:
    """Seen to fail with a slope below nothing kept, where the larger batch took less."""
    first, second = Forward(1, in_use(one, 1)), Forward(2, in_use(other, 2))
    found = between(first, second)
    peaks = [first.peak, second.peak]
    if len(one) != len(other):
        assert found.mb(2) >= second.peak / MB - 1e-6
        assert found.mb(batch) >= max(peaks) / MB - 1e-6
