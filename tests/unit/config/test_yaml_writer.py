"""What to_yaml writes, and above all what it leaves alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.errors import ConfigError

AUTHORED = """\
---
# The encoder that search uses.
model_path: './model.pt'   # beside this file
model_id: "encoder"

batch_size: 32  # measured in May

config:
    # batch, tokens
    input_shape:
      - 1
      # tokens
      - 10
    dtype: float16   # half is enough
    kwargs: {depth: 2, name: yes please}
# end
"""


def edited(text: str, path: Path, **changes: object) -> str:
    """The text of a file after its config, with `changes`, was written back."""
    path.write_text(text)
    config = ModelConfig.from_yaml(path)
    options = changes.pop("config", {})
    assert isinstance(options, dict)
    values = config.model_dump() | changes
    values["config"] |= options
    new = ModelConfig.model_validate(values)
    new.to_yaml(path)
    assert ModelConfig.from_yaml(path) == new
    return path.read_text()


def test_new_file_has_the_keys_that_are_not_at_their_default(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    config = ModelConfig(
        model_id="m",
        model_path="dir/m.pt",
        weight=2,
        config={"input_shape": [1, -1], "kwargs": {"a": None}},  # type: ignore[arg-type]
    )
    config.to_yaml(path)
    assert path.read_text() == (
        "model_id: m\n"
        "model_path: dir/m.pt\n"
        "weight: 2.0\n"
        "config:\n"
        "  input_shape: [1, -1]\n"
        "  kwargs:\n"
        "    a: null\n"
    )
    assert ModelConfig.from_yaml(path) == config


def test_only_the_values_that_differ_are_replaced(tmp_path: Path) -> None:
    text = edited(AUTHORED, tmp_path / "m.yaml", batch_size=8, model_path="other.pt")
    assert text == AUTHORED.replace("batch_size: 32  #", "batch_size: 8   #").replace(
        "'./model.pt'   #", "'other.pt'     #"
    )


def test_nested_values_lists_and_free_maps_change_in_place(tmp_path: Path) -> None:
    options = {"input_shape": [2, 10, 4], "dtype": None, "kwargs": {"name": "x: y", "new": [1]}}
    text = edited(AUTHORED, tmp_path / "m.yaml", config=options)
    assert "      - 2\n      # tokens\n      - 10\n      - 4\n" in text
    assert "    dtype: null      # half is enough\n" in text
    assert "    kwargs: {name: 'x: y', new: [1]}\n# end\n" in text
    assert text.startswith(AUTHORED[: AUTHORED.index("      - 1")])


def test_missing_keys_are_added_at_the_end(tmp_path: Path) -> None:
    text = edited(AUTHORED, tmp_path / "m.yaml", priority=3, config={"output": "logits"})
    assert text == AUTHORED.replace(
        "yes please}\n", "yes please}\n    output: logits\npriority: 3\n"
    )


def test_whole_options_are_added_compactly(tmp_path: Path) -> None:
    text = edited("model_id: m\nmodel_path: p\n", tmp_path / "m.yaml", config={"dtype": "float16"})
    assert text == "model_id: m\nmodel_path: p\nconfig:\n  dtype: float16\n"


@pytest.mark.parametrize("number", ["2.089715226748912e-20", "5.953735371857217e-169", "1.5e+3"])
def test_a_number_that_is_not_edited_stays_as_it_is(tmp_path: Path, number: str) -> None:
    """The first two lose their last digits when ruamel writes them in the form that they had."""
    authored = f"model_id: m\nmodel_path: p\nweight: {number}\n"
    text = edited(authored, tmp_path / "m.yaml", priority=3)
    assert text == authored + "priority: 3\n"


def test_key_back_at_its_default_is_set_and_not_removed(tmp_path: Path) -> None:
    text = edited(AUTHORED, tmp_path / "m.yaml", batch_size=32)
    assert text == AUTHORED
    text = edited(AUTHORED.replace("32", "8"), tmp_path / "m.yaml", batch_size=32)
    assert "batch_size: 32 # measured" in text


def test_same_config_leaves_the_file_untouched(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(AUTHORED)
    before = os.stat(path)
    ModelConfig.from_yaml(path).to_yaml(path)
    after = os.stat(path)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_indented_lists_crlf_and_long_lines_keep_their_layout(tmp_path: Path) -> None:
    long = "x" * 300 + " " + "y" * 300
    path = tmp_path / "m.yaml"
    path.write_bytes(
        f"model_id: m\r\nmodel_path: {long}\r\nconfig:\r\n   input_shape:\r\n"
        "      - 1\r\n   kwargs:\r\n      a: [1,\r\n          2]\r\n".encode()
    )
    config = ModelConfig.from_yaml(path)
    config.model_copy(update={"pinned": True}).to_yaml(path)
    lines = path.read_bytes().split(b"\r\n")
    assert lines[1] == f"model_path: {long}".encode()
    assert lines[3:6] == [b"   input_shape:", b"      - 1", b"   kwargs:"]
    assert lines[-2:] == [b"pinned: true", b""]
    assert not any(b"\n" in line for line in lines)


def test_anchored_values_are_edited_without_changing_their_other_uses(tmp_path: Path) -> None:
    text = (
        "model_id: m\nmodel_path: p\nconfig:\n  kwargs: &shared {a: 1}\n  forward_kwargs: *shared\n"
    )
    edited(text, tmp_path / "m.yaml", config={"kwargs": {"a": 2}})
    config = ModelConfig.from_yaml(tmp_path / "m.yaml").config
    assert (config.kwargs, config.forward_kwargs) == ({"a": 2}, {"a": 1})


def test_merged_keys_are_overridden_in_the_file(tmp_path: Path) -> None:
    text = "<<: {batch_size: 4, weight: 2}\nmodel_id: m\nmodel_path: p\n"
    assert edited(text, tmp_path / "m.yaml", batch_size=8).endswith("\nbatch_size: 8\n")


def test_awkward_text_is_written_so_that_it_reads_back(tmp_path: Path) -> None:
    for number, text in enumerate(
        [
            "2024-01-01",
            "yes",
            "null",
            "1e3",
            "0x10",
            "",
            " x ",
            "a: b",
            "#c",
            "ä\u2028b\x07",
            "\ufeff",
        ]
    ):
        path = tmp_path / f"{number}.yaml"
        config = ModelConfig.model_validate(
            {"model_id": "123", "model_path": "p", "config": {"kwargs": {"k": text, text: 1e-7}}}
        )
        config.to_yaml(path)
        assert ModelConfig.from_yaml(path) == config


def test_file_with_mistakes_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    broken = "model_id: m\nmodel_path: p\nbatch_sise: 3\n"
    path.write_text(broken)
    with pytest.raises(ConfigError, match="did you mean `batch_size`"):
        ModelConfig(model_id="m", model_path="p").to_yaml(path)
    assert path.read_text() == broken
    path.write_text("model_id: a\nmodel_path: p\n---\nmodel_id: b\nmodel_path: p\n")
    with pytest.raises(ConfigError, match="expected one model"):
        ModelConfig(model_id="a", model_path="q").to_yaml(path)


def test_mode_and_symlink_survive_a_write(tmp_path: Path) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    real.write_text("model_id: m\nmodel_path: p\n")
    real.chmod(0o640)
    link.symlink_to(real)
    ModelConfig(model_id="m", model_path="q").to_yaml(link)
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert real.read_text() == "model_id: m\nmodel_path: q\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.yaml", "real.yaml"]


def test_server_file_is_written_and_edited_likewise(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    ServerConfig().to_yaml(path)
    assert ServerConfig.from_yaml(path) == ServerConfig()
    path.write_text("port: 1  # one\nmemory_quota_mb:\n  cpu: 10 # small\n  cuda: 5\n")
    config = ServerConfig(port=2, memory_quota_mb={"cpu": 20}, log_level="DEBUG")
    config.to_yaml(path)
    assert path.read_text() == (
        "port: 2  # one\nmemory_quota_mb:\n  cpu: 20.0 # small\nlog_level: DEBUG\n"
    )
    path.write_text("prot: 1\n")
    with pytest.raises(ConfigError, match="did you mean `port`"):
        config.to_yaml(path)
