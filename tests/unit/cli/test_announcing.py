"""What `run` lists once it has converged."""

from __future__ import annotations

import pytest

from splitlearn_manager.cli.run import listed
from splitlearn_manager.reconcile.facts import Phase


def lines(phases: dict[str, Phase]) -> list[str]:
    def describe(model_id: str) -> dict[str, object]:
        return {
            "model_id": model_id,
            "phase": str(phases[model_id]),
            "memory_mb": None,
            "device": None,
            "source": f"{model_id}.yaml:1",
            "reason": "MaxModels",
            "message": "no room",
        }

    return [line.plain for line in listed(phases, describe)]


@pytest.mark.parametrize("count", [0, 1, 50])
def test_each_model_has_its_line_in_the_order_of_ids(count: int) -> None:
    phases = {f"m{i:02}": Phase.READY if i % 2 else Phase.PENDING for i in reversed(range(count))}
    assert [line.split()[0] for line in lines(phases)] == sorted(phases)


def test_of_thousands_those_that_serve_are_listed_and_the_others_counted() -> None:
    phases = dict.fromkeys((f"m{i:04}" for i in range(3000)), Phase.PENDING)
    phases["m2000"] = Phase.READY
    told = lines(phases)
    assert [line.split()[0] for line in told[:3]] == ["m2000", "m0000", "m0001"]
    assert told[50:] == ["  … and 2,950 more; `status` lists them"]
