"""What ModelConfig accepts and refuses, and what its hashes and changes say."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest

from splitlearn_manager.config.model_config import (
    IN_PLACE_KEYS,
    LoaderOptions,
    ModelConfig,
    changes,
)
from splitlearn_manager.errors import ConfigError


def make(**keys: object) -> ModelConfig:
    return ModelConfig.model_validate({"model_id": "m", "model_path": "model.pt", **keys})


def refusal(**keys: object) -> str:
    with pytest.raises(ConfigError) as caught:
        make(**keys)
    return caught.value.message


def test_documented_python_call_gives_the_documented_values() -> None:
    config = ModelConfig(
        model_id="my_model",
        model_path="model.pt",
        model_type="pytorch",
        device="cuda",
        batch_size=32,
    )
    assert (config.model_id, config.device, config.batch_size) == ("my_model", "cuda", 32)


def test_defaults_are_those_of_the_contract() -> None:
    values = make().model_dump()
    del values["model_id"], values["model_path"]
    options = values.pop("config")
    assert values == {
        "model_type": "auto",
        "device": "auto",
        "batch_size": 32,
        "max_memory_mb": None,
        "warmup": True,
        "priority": 0,
        "pinned": False,
        "endpoint": None,
        "weight": 1.0,
        "update": "auto",
        "runtime": "auto",
        "trusted": False,
        "optimize": "none",
        "optimize_tolerance": 1e-3,
        "max_queue_delay_ms": 0.0,
        "max_queue": 1024,
        "keep_alive_s": None,
        "verify": None,
        "rollout": None,
        "load_timeout_s": 600.0,
        "drain_timeout_s": 30.0,
    }
    assert {value for key, value in options.items() if "kwargs" not in key} == {None}
    assert (options["kwargs"], options["forward_kwargs"]) == ({}, {})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("batch_size", "32", 'batch_size: expected an integer, got "32"'),
        ("batch_size", True, "batch_size: expected an integer, got true"),
        ("batch_size", 3.0, "batch_size: expected an integer, got 3.0"),
        ("batch_size", 0, "batch_size: expected an integer ≥ 1, got 0"),
        ("batch_size", None, "batch_size: expected an integer, got nothing"),
        ("max_memory_mb", "4gb", 'max_memory_mb: expected an integer, got "4gb"'),
        ("max_memory_mb", -5, "max_memory_mb: expected an integer ≥ 1, got -5"),
        ("warmup", "yes", 'warmup: expected true or false, got "yes"'),
        ("warmup", 1, "warmup: expected true or false, got 1"),
        ("priority", [1], "priority: expected an integer, got a list"),
        ("weight", -0.5, "weight: expected a number ≥ 0, got -0.5"),
        ("weight", float("inf"), "weight: expected a finite number, got .inf"),
        ("weight", float("nan"), "weight: expected a finite number, got .nan"),
        ("weight", True, "weight: expected a number, got true"),
        ("weight", "1", 'weight: expected a number, got "1"'),
        ("load_timeout_s", 0, "load_timeout_s: expected a number > 0, got 0"),
        ("keep_alive_s", -1, "keep_alive_s: expected a number > 0, got -1"),
        (
            "drain_timeout_s",
            1e300,
            "drain_timeout_s: expected a number ≤ 1000000000, got 1e+300",
        ),
        ("endpoint", "", "endpoint: expected up to 128 letters"),
        ("model_id", 7, "model_id: expected text, got 7"),
        ("model_id", "a b", "model_id: expected up to 128 letters"),
        ("model_id", "-a", "model_id: expected up to 128 letters"),
        ("model_id", "a" * 129, "model_id: expected up to 128 letters"),
        ("model_id", "a\n", "model_id: expected up to 128 letters"),
        ("model_id", "ä", "model_id: expected up to 128 letters"),
        ("model_path", "", "model_path: expected a path or name"),
        ("model_path", "a\0b", "model_path: expected a path or name"),
        ("model_path", "hf:", "model_path: expected hf:org/name or hf:org/name@revision"),
        ("model_path", "hf:a/b/c", "model_path: expected hf:org/name"),
        ("model_path", "hf:a/b@../x", "model_path: expected hf:org/name"),
        ("model_path", "package:", "model_path: expected package:NAME"),
        ("model_path", "package:a/../b", "model_path: expected package:NAME"),
        ("device", "gpu", "device: expected auto, cpu, cuda, cuda:N or mps"),
        ("device", "cuda:", "device: expected auto, cpu, cuda, cuda:N or mps"),
        ("device", "cuda:01", "device: expected auto, cpu, cuda, cuda:N or mps"),
        ("device", "cpu\n", "device: expected auto, cpu, cuda, cuda:N or mps"),
        ("update", "Surge", 'got "Surge"; did you mean "surge"?'),
        ("model_type", "onnx", "model_type: expected auto, pytorch, huggingface or custom"),
        ("verify", 3, "verify: expected a map, got 3"),
        ("config", [], "config: expected a map, got an empty list"),
        ("config", None, "config: expected a map, got nothing"),
        ("config", {"input_shape": []}, "config.input_shape: expected a list of 1 to 64 sizes"),
        ("config", {"input_shape": [0]}, "config.input_shape[0]: expected a size ≥ 1, or -1"),
        ("config", {"input_shape": [-2]}, "config.input_shape[0]: expected a size ≥ 1, or -1"),
        ("config", {"input_shape": "1,2"}, "config.input_shape: expected a list"),
        ("config", {"input_shape": [1.5]}, "config.input_shape[0]: expected an integer, got 1.5"),
        ("config", {"input_dtype": "float"}, "config.input_dtype: expected float32, float16"),
        ("config", {"dtype": "int8"}, "config.dtype: expected float32, float16 or bfloat16"),
        ("config", {"factory": "build"}, "config.factory: expected package.module:name"),
        ("config", {"auto_class": "BertModel"}, "config.auto_class: expected the name of a"),
        ("config", {"output": " "}, "config.output: expected text that is not empty"),
        ("config", {"max_sequence_length": 0}, "expected an integer ≥ 1, got 0"),
        ("config", {"pad_token_id": "0"}, "config.pad_token_id: expected an integer"),
        ("config", {"kwargs": [1]}, "config.kwargs: expected a map, got a list"),
        ("config", {"kwargs": {"a": {"b": [0, {1}]}}}, "config.kwargs.a.b[1]: expected text, a"),
        ("config", {"kwargs": {1: 2}}, "config.kwargs: expected keys that are text"),
        ("config", {"kwargs": {"a": "\ud800"}}, "config.kwargs.a: expected text that is valid"),
    ],
)
def test_wrong_value_is_refused_in_plain_words(key: str, value: object, expected: str) -> None:
    message = refusal(**{key: value})
    assert expected in message
    assert message.startswith(key)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_id", "A.b-c_9"),
        ("model_id", "a" * 128),
        ("weight", 0),
        ("weight", 2),
        ("load_timeout_s", 1),
        ("keep_alive_s", 0.5),
        ("priority", -3),
        ("device", "cuda:0"),
        ("device", "cuda:12"),
        ("device", "mps"),
        ("runtime", "thread"),
        ("max_queue", 1024),
        ("max_queue_delay_ms", 0),
        ("model_path", "hf:org/name@v1.0"),
        ("model_path", "hf:name"),
        ("model_path", "package:some_package"),
        ("model_path", "pkg.mod:factory"),
        ("model_path", "~/modèle 1.pt"),
        ("config", {"input_shape": [-1, 10, 768]}),
        ("config", {"kwargs": {"a": [1, 2.5, None, {"b": True}]}}),
        ("config", {}),
    ],
)
def test_legal_value_is_accepted(key: str, value: object) -> None:
    assert getattr(make(**{key: value}), key) == (
        LoaderOptions.model_validate(value) if key == "config" else value
    )


def test_every_mistake_is_listed_at_once() -> None:
    lines = refusal(batch_size="x", warmup=3, config={"dtype": 1, "nope": 2}).splitlines()
    assert [re.split(":", line)[0] for line in lines] == [
        "batch_size",
        "warmup",
        "config.dtype",
        "config.nope",
    ]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"max_memroy_mb": 1}, "max_memroy_mb: unknown key: did you mean `max_memory_mb`?"),
        ({"Batch-Size": 1}, "did you mean `batch_size`?"),
        ({"zzz": 1}, "zzz: expected a key that is documented, got an unknown one"),
        ({"input_shape": [1]}, "input_shape: expected no such key here: it belongs under"),
        ({"port": 1}, "port: expected no such key here: it belongs in server.yaml"),
        ({"config": {"trusted": True}}, "it belongs at the top level, not under `config:`"),
        ({"config": {"input_shap": [1]}}, "config.input_shap: unknown key: did you mean"),
    ],
)
def test_unknown_key_is_refused_with_what_was_probably_meant(
    keys: dict[str, object], expected: str
) -> None:
    assert expected in refusal(**keys)


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        ({}, "rollout: expected either canary or shadow"),
        ({"canary": []}, "rollout.canary: expected a list of 1 to 50 steps"),
        (
            {"canary": [{"percent": 0, "for_s": 1}]},
            "rollout.canary[0].percent: expected a number > 0",
        ),
        ({"canary": [{"percent": 5}]}, "rollout.canary[0].for_s"),
        ({"shadow": {"percent": 101, "for_s": 1}}, "percent: expected a number ≤ 100, got 101"),
        (
            {"shadow": {"percent": 1, "for_s": 1}, "canary": [{"percent": 1, "for_s": 1}]},
            "rollout: expected either canary or shadow",
        ),
        ({"shadow": {"percent": 1, "for_s": 1}, "min_request": 1}, "did you mean `min_requests`?"),
    ],
)
def test_a_rollout_that_makes_no_sense_is_refused(rollout: object, expected: str) -> None:
    assert expected in refusal(rollout=rollout)


def test_a_rollout_needs_both_versions_at_a_time() -> None:
    rollout = {"canary": [{"percent": 5, "for_s": 10}]}
    assert "rollout: expected no such key, or another update" in refusal(
        rollout=rollout, update="recreate"
    )
    assert make(rollout=rollout).load_hash() == make().load_hash()
    assert make(rollout=rollout).spec_hash() != make().spec_hash()


@pytest.mark.parametrize(
    ("verify", "expected"),
    [
        ({"golden": "g.pt"}, "a file whose name ends in .safetensors or .npz"),
        ({"rtol": -1}, "verify.rtol: expected a number ≥ 0, got -1"),
        ({"max_diference": 1}, "did you mean `max_difference`?"),
    ],
)
def test_a_verification_that_makes_no_sense_is_refused(verify: object, expected: str) -> None:
    assert expected in refusal(verify=verify)


@pytest.mark.parametrize("how", ["none", "compile", "freeze", "bfloat16", "auto"])
def test_every_optimization_is_accepted_and_needs_a_load(how: str) -> None:
    config = make(optimize=how)
    assert config.weights_dtype == ("bfloat16" if how == "bfloat16" else None)
    assert (config.load_hash() == make().load_hash()) == (how == "none")
    assert make(optimize_tolerance=0.1).load_hash() != make().load_hash()


def test_bfloat16_is_no_other_dtype() -> None:
    message = refusal(optimize="bfloat16", config={"dtype": "float16"})
    assert message == (
        "config.dtype: expected bfloat16 or no such key, because optimize is bfloat16, "
        'got "float16"'
    )
    assert make(optimize="bfloat16", config={"dtype": "bfloat16"}).weights_dtype == "bfloat16"
    assert make(optimize="auto", config={"dtype": "float16"}).weights_dtype == "float16"


def test_custom_model_type_needs_a_factory() -> None:
    message = refusal(model_type="custom")
    assert message == (
        'model_path: expected package.module:factory, because model_type is custom, got "model.pt"'
    )
    assert make(model_type="custom", model_path="a.b:c").model_type == "custom"


def test_two_factories_are_refused() -> None:
    message = refusal(model_path="a.b:c", config={"factory": "d:e"})
    assert message.startswith("config.factory: expected no such key")


def test_config_is_frozen() -> None:
    config = make()
    with pytest.raises(ValueError, match="frozen"):
        config.batch_size = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.config.dtype = "float16"  # type: ignore[misc]


def test_options_given_as_a_dict_read_like_one() -> None:
    options = make(config={"input_shape": (1, -1), "kwargs": {"a": 1}}).config
    assert options["input_shape"] == [1, -1]
    assert options.get("kwargs") == {"a": 1}
    assert options.get("dtype") is None
    assert options.get("dtype", "float32") == "float32"
    with pytest.raises(KeyError):
        options["dtype"]


def test_path_objects_and_tuples_are_welcome_from_python() -> None:
    config = make(model_path=Path("dir") / "m.pt", config={"kwargs": {"sizes": (1, 2)}})
    assert config.model_path == str(Path("dir") / "m.pt")
    assert config.config.kwargs == {"sizes": [1, 2]}


def test_base_dir_survives_copies_and_stays_out_of_equality_and_dumps(tmp_path: Path) -> None:
    plain = make()
    placed = plain.with_base_dir(tmp_path)
    assert (plain.base_dir, placed.base_dir) == (None, tmp_path)
    assert placed == plain
    assert hash(placed) == hash(plain)
    assert "base_dir" not in str(placed.model_dump())
    copies = (placed.model_copy(), copy.deepcopy(placed), pickle.loads(pickle.dumps(placed)))
    assert [one.base_dir for one in copies] == [tmp_path] * 3
    assert placed.with_base_dir(None).base_dir is None
    assert plain != make(priority=1)
    assert plain != "m"


def test_endpoint_defaults_to_the_model_id() -> None:
    assert make().effective_endpoint == "m"
    assert make(endpoint="e").effective_endpoint == "e"


def test_spec_hash_ignores_how_the_same_thing_is_said(tmp_path: Path) -> None:
    one = make(weight=1, config={"kwargs": {"a": 1, "b": 2}}).with_base_dir(tmp_path)
    same = [
        make(
            weight=1.0, endpoint="m", config={"kwargs": {"b": 2, "a": 1}}, model_path="./model.pt"
        ),
        make(config={"kwargs": {"a": 1, "b": 2}}, model_path=str(tmp_path / "model.pt")),
        make(config={"kwargs": {"a": 1, "b": 2}}, model_path="x/../model.pt", batch_size=32),
    ]
    assert {config.with_base_dir(tmp_path).spec_hash() for config in same} == {one.spec_hash()}
    assert re.fullmatch("[0-9a-f]{64}", one.spec_hash())


def test_spec_hash_tells_files_in_different_directories_apart(tmp_path: Path) -> None:
    here, there = make().with_base_dir(tmp_path), make().with_base_dir(tmp_path / "sub")
    assert here.spec_hash() != there.spec_hash()
    factory = make(model_path="pkg.mod:build")
    assert (
        factory.with_base_dir(tmp_path).spec_hash()
        == factory.with_base_dir(tmp_path / "sub").spec_hash()
    )


IN_PLACE_SAMPLES = {
    "rollout": {"canary": [{"percent": 5, "for_s": 10}]},
    "priority": 3,
    "pinned": True,
    "endpoint": "e",
    "weight": 2.0,
    "batch_size": 4,
    "load_timeout_s": 5.0,
    "drain_timeout_s": 5.0,
    "keep_alive_s": 9.0,
    "max_memory_mb": 100,
    "update": "surge",
    "max_queue": 10,
    "max_queue_delay_ms": 5.0,
}

RELOADING_SAMPLES = {
    "verify": {"rtol": 0.5},
    "model_path": "other.pt",
    "model_type": "pytorch",
    "device": "cpu",
    "warmup": False,
    "trusted": True,
    "runtime": "thread",
    "config": {"dtype": "float16"},
}


def test_only_keys_that_shape_the_instance_change_the_load_hash() -> None:
    base = make()
    for key, value in IN_PLACE_SAMPLES.items():
        other = make(**{key: value})
        assert other.spec_hash() != base.spec_hash(), key
        assert other.load_hash() == base.load_hash(), key
    for key, value in RELOADING_SAMPLES.items():
        other = make(**{key: value})
        assert other.load_hash() != base.load_hash(), key
    assert set(IN_PLACE_SAMPLES) == IN_PLACE_KEYS


def test_changes_name_each_key_with_both_values(tmp_path: Path) -> None:
    old = make(config={"dtype": "float16"})
    new = make(priority=2, config={"dtype": "bfloat16", "input_shape": [1, 2]})
    assert [str(change) for change in changes(old, new)] == [
        "priority 0 → 2",
        "input_shape none → [1, 2]",
        "dtype float16 → bfloat16",
    ]
    assert [change.key for change in changes(old, new)][-1] == "config.dtype"
    assert changes(old, old) == ()
    moved = changes(old.with_base_dir(tmp_path), old.with_base_dir(tmp_path / "b"))
    assert [(change.key, change.old) for change in moved] == [
        ("model_path", str(tmp_path / "model.pt"))
    ]


def test_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make(model_path="~/m.pt").resolved_model_path == str(tmp_path / "m.pt")


def test_problems_of_a_refusal_carry_key_and_message() -> None:
    with pytest.raises(ConfigError) as caught:
        make(batch_size=0)
    (problem,) = caught.value.problems
    assert str(problem) == "batch_size: expected an integer ≥ 1, got 0"
    assert caught.value.reason == "InvalidConfig"
