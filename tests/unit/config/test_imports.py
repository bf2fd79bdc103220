"""Reading configuration loads neither torch nor the user's code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
import splitlearn_manager.config
from splitlearn_manager.config import model_source, schema, yaml_source, yaml_writer

data = b"model_id: m\\nmodel_path: net:build\\n"
parsed = yaml_source.parse_models(data, file="m.yaml", base_dir=Path.cwd())
source = model_source.resolve_source(parsed.models[0].config)
model_source.fingerprint(source)
model_source.resolve_source(parsed.models[0].config.model_copy(update={"model_path": "hf:a/b"}))
schema.model_schema()
heavy = {"torch", "transformers", "grpc", "numpy", "huggingface_hub", "net"}
print(sorted(heavy & set(sys.modules)))
"""


def test_parsing_and_resolving_loads_no_torch_and_no_user_code(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("raise RuntimeError('imported')")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[]\n"
