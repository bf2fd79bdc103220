"""What tests of desired state share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from splitlearn_manager.desired import reading


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was parsed."""
    counter: Counter[str] = Counter()
    real = reading.parse_models

    def counting(data: bytes, *, file: str, base_dir: Path | None) -> object:
        counter[file] += 1
        return real(data, file=file, base_dir=base_dir)

    monkeypatch.setattr(reading, "parse_models", counting)
    return counter
