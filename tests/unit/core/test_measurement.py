"""What is kept of loads: one measurement for a version, and what larger batches take."""

from __future__ import annotations

from splitlearn_manager.core.measurement import KEPT, Measurement, of_version, with_newest
from splitlearn_manager.runtime.base import Activations


def measured(version: str, weights_mb: float = 100.0, *lines: tuple[float, float]) -> Measurement:
    return Measurement(version, "w", "cpu", 90.0, weights_mb, Activations(lines) if lines else None)


def test_the_total_is_of_the_weights_and_a_forward_of_the_largest_batch() -> None:
    found = measured("a", 100.0, (8.0, 0.5), (0.0, 1.0))
    assert [found.total_mb(batch) for batch in (1, 16, 32)] == [108.5, 116.0, 132.0]
    assert found.activations_mb(32) == 32.0


def test_without_a_forward_the_weights_are_all_that_is_known() -> None:
    found = measured("a")
    assert (found.total_mb(32), found.activations_mb(32)) == (100.0, None)


def test_in_words_activations_are_told_apart_unless_there_are_none_to_speak_of() -> None:
    assert measured("a", 1500.0, (0.0, 0.5)).in_words(32) == (
        "1,516 MB (1,500 MB of weights, 16 MB of activations for batches of 32)"
    )
    assert measured("a").in_words(32) == "100 MB"
    assert measured("a", 1.0, (0.0, 0.01)).in_words(8) == "1 MB"


def test_one_measurement_is_kept_for_a_version_and_the_newest_versions_are() -> None:
    kept: tuple[Measurement, ...] = ()
    for number in range(KEPT + 2):
        kept = with_newest(kept, measured(str(number)))
    assert [m.load_hash for m in kept] == [str(n) for n in range(2, KEPT + 2)]
    kept = with_newest(kept, measured("3", 200.0))
    assert [m.load_hash for m in kept] == ["2", "4", "5", "3"]
    found = of_version(kept, ("3", "w"))
    assert found is not None
    assert found.weights_mb == 200.0
    assert of_version(kept, ("3", "other weights")) is None
