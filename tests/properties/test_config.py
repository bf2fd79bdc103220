"""Promises of configuration that hold for every input, not just for samples.

Each property has been seen to fail on a bug put in for the purpose; its docstring names that bug.
"""

from __future__ import annotations

import io
import random
import string
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, SingleQuotedScalarString

from splitlearn_manager.config.model_config import ModelConfig, changes
from splitlearn_manager.config.server_config import ServerConfig
from splitlearn_manager.config.yaml_source import Problem, parse_models, parse_server

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(1, 2**31 - 1)
seconds = st.floats(min_value=1e-6, max_value=1e9)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
paths = st.one_of(
    st.sampled_from(["m.pt", "dir/m.safetensors", "/abs/m.pt", "pkg.mod:build", "hf:org/name@v1"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Z"]), min_size=1).filter(
        lambda path: not path.startswith(("hf:", "package:"))
    ),
)
options = st.fixed_dictionaries(
    {},
    optional={
        "input_shape": st.lists(st.just(-1) | st.integers(1, 4096), min_size=1, max_size=5),
        "input_dtype": st.sampled_from(["float32", "float16", "int64"]),
        "output": names,
        "max_sequence_length": counts,
        "kwargs": st.dictionaries(text, plain, max_size=3),
        "auto_class": st.just("AutoModelForCausalLM"),
        "pad_token_id": st.integers(-10, 10),
        "dtype": st.sampled_from(["float32", "float16", "bfloat16"]),
        "forward_kwargs": st.dictionaries(text, plain, max_size=2),
    },
)
model_values = st.fixed_dictionaries(
    {"model_id": names, "model_path": paths},
    optional={
        "model_type": st.sampled_from(["auto", "pytorch", "huggingface"]),
        "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:3", "mps"]),
        "batch_size": counts,
        "max_memory_mb": st.none() | counts,
        "warmup": st.booleans(),
        "priority": st.integers(-100, 100),
        "pinned": st.booleans(),
        "endpoint": st.none() | names,
        "weight": st.floats(0, 1e9) | st.integers(0, 10),
        "update": st.sampled_from(["auto", "surge", "recreate"]),
        "trusted": st.booleans(),
        "keep_alive_s": st.none() | seconds,
        "load_timeout_s": seconds,
        "config": options,
    },
)
models = model_values.map(ModelConfig.model_validate)
servers = st.fixed_dictionaries(
    {},
    optional={
        "host": st.sampled_from(["127.0.0.1", "0.0.0.0", "::1", "node-1.local"]),
        "port": st.integers(0, 65535),
        "max_models": counts,
        "log_level": st.sampled_from(["DEBUG", "info", "Warning"]),
        "max_memory_percent": st.floats(0.5, 100),
        "memory_quota_mb": st.dictionaries(
            st.sampled_from(["cpu", "cuda:0", "mps"]), st.floats(1, 1e6)
        ),
        "routing": st.sampled_from(["round_robin", "random", "pkg.mod:Own"]),
        "settle_s": seconds,
    },
).map(ServerConfig.model_validate)

quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# Two writes to disk an example.
fewer = settings(quick, max_examples=60)


def written(*configs: ModelConfig | ServerConfig) -> bytes:
    """The bytes after each config in turn was written to one file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file.yaml"
        for config in configs:
            config.to_yaml(path)
        return path.read_bytes()


@quick
@given(models)
def test_written_config_reads_back_equal(config: ModelConfig) -> None:
    """Fails when the writer leaves out falsy values (`pinned: false`, `weight: 0`)."""
    parsed = parse_models(written(config), file="f", base_dir=None)
    assert parsed.problems == ()
    assert [model.config for model in parsed.models] == [config]
    assert parsed.models[0].config.spec_hash() == config.spec_hash()
    assert changes(config, parsed.models[0].config) == ()


@fewer
@given(models, models)
def test_config_written_over_another_reads_back_equal(old: ModelConfig, new: ModelConfig) -> None:
    """Fails when keys that go back to their default are skipped by the edit."""
    parsed = parse_models(written(old, new), file="f", base_dir=None)
    assert [model.config for model in parsed.models] == [new]


@fewer
@given(servers, servers)
def test_written_server_config_reads_back_equal(old: ServerConfig, new: ServerConfig) -> None:
    """Fails when keys that go back to their default are skipped by the edit."""
    assert parse_server(written(old, new), file="f") == (new, ())


def restyled(values: object, chance: random.Random) -> object:
    """The same values with keys shuffled and text in other quotes."""
    if isinstance(values, dict):
        items = list(values.items())
        chance.shuffle(items)
        return {restyled(key, chance): restyled(value, chance) for key, value in items}
    if isinstance(values, list):
        return [restyled(value, chance) for value in values]
    if isinstance(values, str) and not values.isprintable():
        return DoubleQuotedScalarString(values)
    if isinstance(values, str):
        return chance.choice([str, DoubleQuotedScalarString, SingleQuotedScalarString])(values)
    return values


def are_printable(values: object) -> bool:
    """Whether no text among the values needs an escape."""
    if isinstance(values, dict):
        return all(are_printable(part) for pair in values.items() for part in pair)
    if isinstance(values, list):
        return all(map(are_printable, values))
    return not isinstance(values, str) or values.isprintable()


@quick
@given(model_values, st.randoms(use_true_random=False))
def test_layout_of_the_file_does_not_change_the_hashes(
    values: dict[str, object], chance: random.Random
) -> None:
    """Fails when the canonical JSON is written without sorting its keys."""
    expected = ModelConfig.model_validate(values)
    yaml = YAML()
    yaml.default_flow_style = chance.choice([True, False])
    yaml.indent(mapping=chance.choice([2, 4, 7]), sequence=6, offset=3)
    # ruamel folds a text with escapes in the wrong place, where it is longer than a line.
    yaml.width = chance.choice([20, 80, 1000]) if are_printable(values) else 1000
    stream = io.StringIO()
    yaml.dump(restyled(values, chance), stream)
    lines = stream.getvalue().split("\n")
    # Comments and empty lines where no text of several lines can be under way.
    layout = "# top\n\n" + "\n".join(lines) + "\n\n  # bottom\n"
    parsed = parse_models(layout.encode(), file="f", base_dir=None)
    assert parsed.problems == ()
    (found,) = parsed.models
    assert found.config == expected
    assert found.config.spec_hash() == expected.spec_hash()
    assert found.config.load_hash() == expected.load_hash()


TOKENS = [
    "model_id: m\n", "model_path: p\n", "batch_size: ", "config:", "\n", "  ", "\t", "- ", "? ", ": ",
    "[", "]", "{", "}", ",", "#", "&a ", "*a", "!", "!!int ", "!!python/name:os.system ", "|", ">",
    "'", '"', "%YAML 1.1\n", "---\n", "...\n", "<<: ", "~", "1", "1e999", "0x", "2024-02-31", "@", "`",
    "\\", "\0", "\x85", "\u2028", "\ufeff", "\ud7ff", "é", ".inf", "=", "\r\n", "\r",
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(
    st.binary(max_size=200)
    | st.lists(st.sampled_from(TOKENS), max_size=30).map(lambda tokens: "".join(tokens).encode())
)
@example(b"")
@example(b"\xef\xbb\xbf")
@example(b"? [")
@example(b'a: "\\U99999999"')
@example(b"!!int _: !!float _")
@example(b"a: !!timestamp x\nb: !!bool x\nc: !!float -\nd: !!int ''\n")
def test_bytes_of_any_kind_give_models_or_problems_and_never_raise(data: bytes) -> None:
    """Fails when only the YAML library's own exceptions are caught."""
    parsed = parse_models(data, file="f", base_dir=None)
    assert parsed.models or parsed.problems
    assert all(isinstance(problem, Problem) for problem in parsed.problems)
    for problem in parsed.problems:
        assert "\n" not in str(problem)
        assert str(problem).isprintable()
        assert problem.line is None or 1 <= problem.line <= data.count(b"\n") + len(data) + 1
    config, problems = parse_server(data, file="f")
    assert (config is None) == bool(problems)


CORRUPTIONS = {
    "model_id": ["a b", "''", "[x]", "3", "2024-01-01", "true"],
    "model_path": ["''", "'hf:'", "{}", "3", "null"],
    "model_type": ["onnx", "1", "[auto]"],
    "device": ["gpu", "cuda:x", "0", "null"],
    "batch_size": ["0", "'8'", "1.5", "true", "null", "4gb"],
    "max_memory_mb": ["0", "4gb", "1.0", "false"],
    "warmup": ["1", "yes please", "null"],
    "priority": ["high", "1.0"],
    "pinned": ["'true'", "0"],
    "endpoint": ["a/b", "7"],
    "weight": ["-1", ".nan", "'1'", "true"],
    "update": ["rolling", "null"],
    "runtime": ["fork", "container"],
    "trusted": ["1", "'yes'"],
    "optimize": ["faster", "3"],
    "optimize_tolerance": ["small", "-1"],
    "max_queue_delay_ms": ["-5", "x", ".inf"],
    "max_queue": ["1.5", "0"],
    "keep_alive_s": ["0", "1m"],
    "verify": ["{golden: g}", "3"],
    "rollout": ["{canary: []}", "x"],
    "load_timeout_s": ["0", "-1", ".inf"],
    "drain_timeout_s": ["1e300", "soon"],
    "config.input_shape": ["[]", "[0]", "[1, x]", "3"],
    "config.input_dtype": ["float", "3"],
    "config.output": ["' '", "3"],
    "config.max_sequence_length": ["0", "x"],
    "config.kwargs": ["[]", "{a: 2024-01-01}", "{1: 2}"],
    "config.factory": ["build", "3"],
    "config.auto_class": ["Bert", "3"],
    "config.pad_token_id": ["x", "1.0"],
    "config.dtype": ["int8", "16"],
    "config.forward_kwargs": ["3", "{a: !x y}"],
}


def test_every_key_is_corrupted_in_some_way() -> None:
    keys = {*ModelConfig.model_fields} - {"config"}
    nested = {
        f"config.{key}" for key in type(ModelConfig.model_fields["config"].default).model_fields
    }
    assert set(CORRUPTIONS) == keys | nested


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(CORRUPTIONS)), st.data())
def test_single_bad_value_is_reported_at_its_key_and_line(key: str, data: st.DataObject) -> None:
    """Fails when marks are looked up in the first map that has a key of that name."""
    bad = data.draw(st.sampled_from(CORRUPTIONS[key]))
    good = {"model_id": "m", "model_path": "p", "batch_size": "4", "warmup": "false"}
    nested = {"dtype": "float16", "input_shape": "[1, 2]"}
    target, name = (nested, key[7:]) if key.startswith("config.") else (good, key)
    target[name] = bad
    lines = []
    for block in data.draw(st.permutations([*good, "config"])):
        lines += data.draw(st.sampled_from([[], [""], ["# note"]]))
        if block != "config":
            lines.append(f"{block}: {good[block]}")
            continue
        lines.append("config:")
        lines += [
            f"  {inner}: {nested[inner]}" for inner in data.draw(st.permutations(list(nested)))
        ]
    expected = f"{name}: {bad}"
    line = next(i for i, text in enumerate(lines, 1) if text.strip() == expected)
    parsed = parse_models("\n".join(lines).encode(), file="f", base_dir=None)
    assert parsed.models == ()
    assert {problem.line for problem in parsed.problems} == {line}
    for problem in parsed.problems:
        assert problem.key is not None
        assert problem.key.startswith(key)
        assert problem.column is not None
        assert problem.column > len(lines[line - 1]) - len(expected)


@quick
@given(
    st.sampled_from(sorted(CORRUPTIONS)), st.text(string.ascii_lowercase, min_size=1, max_size=2)
)
def test_misspelt_key_is_reported_at_its_line(key: str, ending: str) -> None:
    """Fails when unknown keys are dropped before validation."""
    name = key.removeprefix("config.") + "_" + ending
    indent = "  " if key.startswith("config.") else ""
    body = f"model_id: m\nmodel_path: p\nconfig:\n  dtype: null\n{indent}{name}: 1\n"
    (problem,) = parse_models(body.encode(), file="f", base_dir=None).problems
    assert (problem.line, problem.column) == (5, 1 + len(indent))
    assert problem.key == ("config." if indent else "") + name


@pytest.mark.parametrize("size", [10, 500])
def test_good_documents_are_unaffected_by_bad_neighbours(size: int) -> None:
    """Fails when reading stops at the first invalid document."""
    texts = [
        f"model_id: m{i}\nmodel_path: p\nbatch_size: {i if i % 3 else 0}\n" for i in range(size)
    ]
    parsed = parse_models("---\n".join(texts).encode(), file="f", base_dir=None)
    assert [model.index for model in parsed.models] == [i for i in range(size) if i % 3]
    assert len(parsed.problems) == len([i for i in range(size) if i % 3 == 0])
