"""What must be quick to start loads no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPORT = "\nimport sys; print('HEAVY', [m for m in ('torch', 'transformers', 'grpc') if m in sys.modules])"
COMMAND = """
from splitlearn_manager.cli import reconcile_main
try:
    reconcile_main()
except SystemExit as end:
    print("CODE", end.code)
"""


def lines_of(code: str, *arguments: str) -> list[str]:
    """What the code prints, then the heavy packages that it has imported."""
    ran = subprocess.run(
        [sys.executable, "-c", code + REPORT, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return ran.stdout.splitlines()


def test_importing_the_package_imports_no_torch() -> None:
    assert lines_of("import splitlearn_manager, splitlearn_comm") == ["HEAVY []"]


@pytest.mark.parametrize(("command", "code"), [("plan", 1), ("validate", 0)])
def test_plan_and_validate_import_no_torch(command: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("model_id: m\nmodel_path: m.pt\n")
    (tmp_path / "m.pt").write_bytes(b"weights")
    assert lines_of(COMMAND, command, str(tmp_path))[-2:] == [f"CODE {code}", "HEAVY []"]


def test_schema_imports_no_torch() -> None:
    assert lines_of(COMMAND, "schema")[-2:] == ["CODE 0", "HEAVY []"]


def test_torch_would_be_noticed() -> None:
    assert lines_of("import torch") == ["HEAVY ['torch']"]
