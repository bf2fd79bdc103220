"""From bytes to configs, and each mistake with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.config.yaml_reader import MAX_BYTES
from splitlearn_manager.config.yaml_source import ParsedModels, Problem, parse_models, parse_server
from splitlearn_manager.errors import ConfigError

DOCUMENTED = """\
# model_config.yaml
model_id: "my_model"
model_path: "/path/to/model.pt"
model_type: "pytorch"  # pytorch, huggingface, custom
device: "cuda:0"
batch_size: 32
max_memory_mb: 4096
warmup: true

config:
  input_shape: [1, 10, 768]
  max_sequence_length: 512
"""

DOCUMENTED_SERVER = """\
# server_config.yaml
host: "0.0.0.0"
port: 50051
max_workers: 10
max_models: 5
metrics_port: 8000
health_check_interval: 30.0
enable_monitoring: true
log_level: "INFO"
"""


def parse(text: str | bytes) -> ParsedModels:
    data = text.encode() if isinstance(text, str) else text
    return parse_models(data, file="a.yaml", base_dir=None)


def problems(text: str | bytes) -> list[str]:
    parsed = parse(text)
    return [str(problem).removeprefix("a.yaml:") for problem in parsed.problems]


def model(extra: str = "", model_id: str = "m") -> str:
    return f"model_id: {model_id}\nmodel_path: m.pt\n{extra}"


def test_documented_model_file_is_read() -> None:
    (found,) = parse(DOCUMENTED).models
    assert found.config == ModelConfig(
        model_id="my_model",
        model_path="/path/to/model.pt",
        model_type="pytorch",
        device="cuda:0",
        batch_size=32,
        max_memory_mb=4096,
        config={"input_shape": [1, 10, 768], "max_sequence_length": 512},  # type: ignore[arg-type]
    )
    assert (found.line, found.index) == (2, 0)


def test_documented_server_file_is_read() -> None:
    assert parse_server(DOCUMENTED_SERVER.encode(), file="s.yaml") == (
        ServerConfig(host="0.0.0.0"),
        (),
    )


def test_problem_has_the_documented_shape() -> None:
    text = model("\n\n\n\nmax_memory_mb: 4gb\n").replace("4gb", '"4gb"')
    (problem,) = parse_models(text.encode(), file="gpt2.yaml", base_dir=None).problems
    assert str(problem) == 'gpt2.yaml:7:16  max_memory_mb: expected an integer, got "4gb"'
    assert problem == Problem("gpt2.yaml", 7, 16, "max_memory_mb", 'expected an integer, got "4gb"')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model_id: m\n", "1:1  model_path: expected this key, which every such file needs"),
        ("# c\n\n  \nmodel_id: m\n", "4:1  model_path: expected this key"),
        (model("max_memroy_mb: 3"), "3:1  max_memroy_mb: unknown key: did you mean `max_memory_m"),
        (model("input_shape: [1]"), "3:1  input_shape: expected no such key here: it belongs und"),
        (model("config:\n  trusted: true"), "4:3  config.trusted: expected no such key here"),
        (model("config:\n  input_shape: [1,  0]"), "4:21  config.input_shape[1]: expected a size"),
        (model("config: {kwargs: {a: [1, 2001-01-01]}}"), "3:26  config.kwargs.a[1]: expected t"),
        (model("device:\n\n# c\nwarmup: true"), "3:1  device: expected text, got nothing"),
        (model("device: ~"), "3:9  device: expected text, got nothing"),
        (model("optimize: faster"), "3:11  optimize: expected none, compile, freeze, bfloat16 or"),
        (
            model("optimize: bfloat16\nconfig: {dtype: float16}"),
            "4:17  config.dtype: expected bfloat1",
        ),
        (model("model_type: custom"), "2:13  model_path: expected package.module:factory"),
        (
            "model_id: 2024-01-01\nmodel_path: m\n",
            "1:11  model_id: expected text, got the date 2024-01-01: put it in quotes",
        ),
        ("model_id: 12\nmodel_path: m\n", "1:11  model_id: expected text, got 12"),
        ("model_id: true\nmodel_path: m\n", "1:11  model_id: expected text, got true"),
        (model("warmup: yes"), '3:9  warmup: expected true or false, got "yes"'),
        (model("weight: .inf"), "3:9  weight: expected a finite number, got .inf"),
        (model("weight: 1e999"), "3:9  weight: expected a finite number, got .inf"),
        (model("priority: 0o17\nbatch_size: 0x0"), "4:13  batch_size: expected an integer ≥ 1"),
        (
            model("batch_size: " + "9" * 5000),
            "3:13  batch_size: expected a valid int",
        ),
        (model("batch_size: " + "9" * 80), "3:13  batch_size: expected an integer ≤ 2147483647"),
        (
            model("batch_size: 1\nwarmup: true\nbatch_size: 2"),
            "5:1  batch_size: expected each key once, got it twice: first on line 3",
        ),
        (model("config:\n  dtype: null\n  dtype: null"), "5:3  config.dtype: expected each key on"),
        (model("1: 2"), "3:1  expected a key that is text, got 1"),
        (model("true: 2"), "3:1  expected a key that is text, got true"),
        (model("2024-01-01: 2"), "3:1  expected a key that is text, got the date 2024-01-01"),
        (model("[1, 2]: 3"), "3:1  expected a key that is text, got a list"),
        (model("? {a: 1}\n: 3"), "3:3  expected a key that is text, got a map"),
        (model("~: 3"), "3:1  expected a key that is text, got nothing"),
        ("- model_id: m\n", "1:1  expected a model as `key: value` lines, got a list"),
        ("just text\n", '1:1  expected a model as `key: value` lines, got "just text"'),
        ("42\n", "1:1  expected a model as `key: value` lines, got 42"),
        ("", "1:1  expected a model, got an empty file"),
        ("# only\n# comments\n", "1:1  expected a model, got an empty file"),
        ("---\n", "2:1  expected a model, got an empty file"),
        (model("---\n"), "4:1  expected a model, got an empty document"),
        (model("\tbatch_size: 1"), "3:1  expected spaces, got a tab"),
        (model("device: [cpu"), "3:9  expected a list that ends with `]`"),
        (model("config: {dtype: float16"), "3:9  expected a map that ends with `}`"),
        (model('device: "cpu\n'), "3:9  expected text that ends with the same quote"),
        (model("device: a: b"), "3:10  expected one `key: value` a line"),
        (model("batch_size 3\n"), "4:1  expected `key: value`, got text without a colon"),
        (model("device: @cpu"), "3:9  expected a value, got a character that needs quotes"),
        (model("device: *cpu"), "3:9  expected an anchor of this name further up"),
        (model('device: "\\q"'), "3:11  expected an escape that YAML knows"),
        (model('device: "\\xzz"'), "3:12  expected hexadecimal digits"),
        (model(" batch_size: 3\n"), "3:12  expected one `key: value` a line"),
        (model("config:\n  dtype: null\n output: a\n"), "5:2  expected the indentation of the l"),
        ("%YAML 3.0\n---\na: 1\n", "1:1  expected YAML 1.1 or 1.2"),
        (model("device: !cpu x"), "3:9  device: expected plain data, got the tag !cpu"),
        (
            model("device: !!python/object/apply:os.system [id]"),
            "3:9  device: expected plain data, got the tag !!python/object/apply:os.system",
        ),
        (model("device: !!binary aGk="), "3:9  device: expected plain data, got the tag !!binary"),
        (model("config: !!set {a}"), "3:9  config: expected plain data, got the tag !!set"),
        (model("device: !a!b x"), "expected plain data, got a tag"),
        (model("batch_size: !!int x"), '3:13  batch_size: expected a valid int, got "x"'),
        (model('device: "\\ud800"'), "3:9  device: expected text that is valid Unicode"),
        (model("<<: 3"), "3:5  <<: expected a map to merge, got 3"),
        (b"model_id: m\nmodel_path: \xff\n", "2:13  expected text in UTF-8, got the byte 0xff"),
        ("model_id: ä".encode("latin-1"), "1:11  expected text in UTF-8, got the byte 0xe4"),
        (model().encode("utf-16"), "1:1  expected text in UTF-8, got UTF-16"),
        (model("device: \0"), "3:9  expected plain text, got the control character a NUL"),
        (model("device: \x1b[0m"), "3:9  expected plain text, got the control character U+001B"),
        (b"#" * (MAX_BYTES + 1), "a.yaml  expected a file of at most 1 MiB, got a larger one"),
        ("[" * 200, "1:65  expected a few levels of nesting, got many"),
        (model("config: {kwargs: {a: " + "[" * 40 + "]" * 40 + "}}"), "expected at most 32 level"),
        (model("config: {kwargs: {a: &x [1, *x]}}"), "3:26  expected at most 32 levels of nesting"),
    ],
)
def test_mistake_is_told_in_plain_words_where_it_is(text: str | bytes, expected: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith(expected) or expected in found[0]
    assert parse(text).models == () or "empty document" in found[0]
    message = parse(text).problems[0].message
    assert "expected " in message or "did you mean" in message
    assert "\n" not in message


def test_alias_bomb_is_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, 12)]
    text = model("config:\n  kwargs:\n    " + "\n    ".join(lines))
    assert any("expected at most 50,000 values, got more" in line for line in problems(text))


def test_anchors_and_merge_keys_work() -> None:
    text = """\
model_id: m
model_path: m.pt
config:
  kwargs:
    base: &base {a: 1, b: 2}
    other: &other {b: 3, c: 4}
    one: {<<: *base, b: 5}
    two:
      <<: [*base, *other]
    three: *base
"""
    (found,) = parse(text).models
    kwargs = found.config.config.kwargs
    assert kwargs["one"] == {"a": 1, "b": 5}
    assert kwargs["two"] == {"a": 1, "b": 2, "c": 4}
    assert kwargs["three"] == {"a": 1, "b": 2}


def test_mistake_in_a_merged_map_is_shown_where_it_is_written() -> None:
    text = "config: &c\n  dtype: int8\nmodel_path: m.pt\nmodel_id: m\n"
    assert problems(text)[0].startswith("2:10  config.dtype: ")
    merged = "<<: {batch_size: no}\nmodel_path: m.pt\nmodel_id: m\n"
    assert problems(merged) == ['1:18  batch_size: expected an integer, got "no"']


def test_anchor_used_twice_is_no_warning() -> None:
    parsed = parse(model("config: {kwargs: {a: &x 1, b: &x 2, c: *x}}"))
    assert parsed.models[0].config.config.kwargs == {"a": 1, "b": 2, "c": 2}


def test_one_bad_document_hides_neither_the_others_nor_their_mistakes() -> None:
    text = "\n---\n".join(
        [model(model_id="a"), model("batch_size: no", "b"), model("warmup: 1", "c"), model("", "d")]
    )
    parsed = parse(text)
    assert [(one.config.model_id, one.index) for one in parsed.models] == [("a", 0), ("d", 3)]
    assert [problem.line for problem in parsed.problems] == [7, 11]
    assert parsed.invalid_ids == {"b", "c"}


def test_documents_before_unreadable_text_still_count() -> None:
    parsed = parse(model(model_id="a") + "---\n" + model("x: [", "b"))
    assert [one.config.model_id for one in parsed.models] == ["a"]
    assert [problem.line for problem in parsed.problems] == [6]


def test_model_id_twice_in_a_file_names_both_lines() -> None:
    parsed = parse(model() + "---\n# again\n" + model())
    assert [str(problem) for problem in parsed.problems] == [
        'a.yaml:5:11  model_id: expected each model_id once, got "m" again: first on line 1'
    ]
    assert [one.line for one in parsed.models] == [1, 5]


def test_byte_order_mark_and_crlf_are_fine() -> None:
    text = "\ufeff" + model("batch_size: 4 # four\n").replace("\n", "\r\n")
    (found,) = parse(text).models
    assert found.config.batch_size == 4


def test_yaml_1_1_is_read_as_such_when_the_file_says_so() -> None:
    (found,) = parse("%YAML 1.1\n---\n" + model("warmup: no")).models
    assert found.config.warmup is False


def test_json_is_yaml() -> None:
    (found,) = parse(json.dumps({"model_id": "m", "model_path": "p", "weight": 2})).models
    assert found.config.weight == 2.0


def test_base_dir_is_handed_to_the_config(tmp_path: Path) -> None:
    (found,) = parse_models(model().encode(), file="a.yaml", base_dir=tmp_path).models
    assert found.config.resolved_model_path == str(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("port: 99999\n", "s.yaml:1:7  port: expected an integer ≤ 65535, got 99999"),
        ("model_id: a\n", "s.yaml:1:1  model_id: expected no such key here: it belongs in a mod"),
        ("", "s.yaml:1:1  expected at least one key, got an empty file"),
        ("# port: 1\n", "s.yaml:1:1  expected at least one key, got an empty file"),
        ("---\n", "s.yaml:1:1  expected at least one key, got an empty file"),
        ("port: 1\n---\nport: 2\n", "s.yaml:3:1  expected one document, got 2"),
        ("[1]", "s.yaml:1:1  expected the server's keys as `key: value` lines, got a list"),
        ("port: [1", "s.yaml:1:7  expected a list that ends with `]`"),
        ("port: [", "s.yaml:1:8  expected a value or the end of the list or map, got neither"),
        ("memory_quota_mb:\n  cpu: 1\n  gpu: 2\n", "s.yaml:3:3  memory_quota_mb.gpu: expected c"),
    ],
)
def test_server_file_mistakes_are_told_likewise(text: str, expected: str) -> None:
    config, found = parse_server(text.encode(), file="s.yaml")
    assert config is None
    assert [str(problem)[: len(expected)] for problem in found] == [expected]


def test_from_yaml_reads_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(model())
    config = ModelConfig.from_yaml(tmp_path / "m.yaml")
    assert config.base_dir == tmp_path
    assert config.resolved_model_path == str(tmp_path / "m.pt")


def test_from_yaml_raises_all_problem_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(model("batch_size: no\nwarmup: 1\n"))
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_yaml(path)
    assert caught.value.message.splitlines() == [
        f'{path}:3:13  batch_size: expected an integer, got "no"',
        f"{path}:4:9  warmup: expected true or false, got 1",
    ]
    assert [str(problem) for problem in caught.value.problems] == caught.value.message.splitlines()


def test_from_yaml_refuses_a_file_of_several_models(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(model(model_id="a") + "---\n" + model(model_id="b"))
    with pytest.raises(ConfigError, match="expected one model, got 2 documents"):
        ModelConfig.from_yaml(path)


def test_from_yaml_of_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml  cannot be read: No such file"):
        ModelConfig.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        ServerConfig.from_yaml(tmp_path)


def test_server_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(DOCUMENTED_SERVER)
    assert ServerConfig.from_yaml(str(path)).host == "0.0.0.0"
    path.write_text("port: x\n")
    with pytest.raises(ConfigError, match="port: expected an integer"):
        ServerConfig.from_yaml(path)
