"""Pickles written by hand, as an attacker would: each is refused, and nothing of it takes effect."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from splitlearn_manager.core.loaders.module_records import (
    MalformedPickle,
    RefusedGlobals,
    read_records,
)
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import InvalidModel, UntrustedCheckpoint
from support.models import model_config

LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
SEQUENTIAL = b"ctorch.nn.modules.container\nSequential\n"
RELU = b"ctorch.nn.functional\nrelu\n"
ORDERED_DICT = b"ccollections\nOrderedDict\n"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def module(kind: bytes, /, **state: bytes) -> bytes:
    parts = {"_parameters": b"}", "_buffers": b"}", "_modules": b"}", "training": b"\x89"}
    return kind + b")\x81" + mapping(**{**parts, **state}) + b"b"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def archive(path: Path, body: bytes, members: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {"data.pkl": pickled(body), "version": b"3\n", **(members or {})}.items():
            file.writestr(f"archive/{name}", data)
    return path


def load(path: Path) -> nn.Module:
    return ModelLoader().load(model_config(path), "cpu").module


def test_the_smallest_module_is_rebuilt(tmp_path: Path) -> None:
    """The writer of these tests can write what is accepted, so what it is refused for is what it says."""
    loaded = load(archive(tmp_path / "m.pt", module(SEQUENTIAL)))
    assert torch.equal(loaded(torch.ones(2)), torch.ones(2))


@pytest.mark.parametrize(
    "body",
    [
        LINEAR + b"K\x02K\x02\x86R",
        RELU + b"K\x02\x85R",
        ORDERED_DICT + b"](K\x01K\x02\x86e\x85R",
        SEQUENTIAL + b"K\x01\x85\x81",
        RELU + b")\x81",
        ORDERED_DICT + b")\x81",
        LINEAR + mapping(forward=b"N") + b"b",
        RELU + mapping(__code__=b"N") + b"b",
        ORDERED_DICT + b")R" + mapping(items=RELU) + b"b",
        module(SEQUENTIAL) + mapping(training=b"\x88") + b"b",
        SEQUENTIAL + b")\x81N" + mapping(forward=RELU) + b"\x86b",
        SEQUENTIAL + b")\x81}(K\x01K\x02ub",
        module(SEQUENTIAL) + b"K\x01a",
        module(SEQUENTIAL) + text("forward") + RELU + b"s",
        b"c__builtin__\nset\n](" + SEQUENTIAL + b"e\x85R",
        b"(K\x01itorch.nn.modules.linear\nLinear\n",
        b"(" + LINEAR + b"K\x02K\x02o",
        b"Parchive\n",
        text("storage") + b"Q",
        b"\x82\x01",
        b"\x97",
        b"a",
        b"h\x07",
        b"",
        b"NN",
        b"(N",
    ],
)
def test_operations_that_no_module_needs_are_refused(body: bytes) -> None:
    with pytest.raises((MalformedPickle, RefusedGlobals)):
        read_records(pickled(body))


@pytest.mark.parametrize(
    "state",
    [
        {"forward": RELU},
        {"__call__": RELU},
        {"__class__": LINEAR},
        {"_call_impl": RELU},
        {"_apply": RELU},
        {"to": RELU},
        {"_compiled_call_impl": RELU},
        {"_forward_hooks": b"}K\x01" + RELU + b"s"},
        {"_forward_pre_hooks": RELU},
        {"cls": LINEAR},
        {"_modules": RELU},
        {"_modules": mapping(forward=module(SEQUENTIAL))},
        {"_modules": mapping(a=RELU)},
        {"_modules": b"}K\x01" + module(SEQUENTIAL) + b"s"},
        {"_parameters": mapping(weight=b"K\x01")},
        {"_buffers": b"]"},
    ],
)
def test_a_module_whose_behaviour_would_change_is_refused(
    tmp_path: Path, state: dict[str, bytes]
) -> None:
    with pytest.raises(InvalidModel):
        load(archive(tmp_path / "m.pt", module(SEQUENTIAL, **state)))
    assert nn.Sequential()(torch.ones(1)) == 1


def test_module_that_contains_itself_is_refused(tmp_path: Path) -> None:
    inner = SEQUENTIAL + b")\x81q\x01}(" + text("_modules") + b"}" + text("a") + b"h\x01s"
    body = inner + text("_parameters") + b"}" + text("_buffers") + b"}ub"
    with pytest.raises(InvalidModel, match="contains itself"):
        load(archive(tmp_path / "m.pt", body))


def tensor(size: bytes, stride: bytes, offset: bytes = b"K\x00", numel: bytes = b"K\x04") -> bytes:
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + numel + b"tQ"
    )
    arguments = b"(" + storage + offset + size + stride + b"\x89" + ORDERED_DICT + b")Rt"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (tensor(b"K\x05\x85", b"K\x01\x85"), "beyond its data"),
        (tensor(b"K\x02\x85", b"K\x04\x85"), "beyond its data"),
        (tensor(b"K\x01\x85", b"K\x01\x85", b"K\x04"), "beyond its data"),
        (tensor(b"K\x01\x85", b"K\x01\x85", b"J\xff\xff\xff\xff"), "≥ 0"),
        (tensor(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "≥ 0"),
        (tensor(b"K\x02\x85", b"K\x01K\x01\x86"), "more sizes"),
        (tensor(b"K\x01\x85", b"K\x01\x85", numel=b"K\x05"), "not as long"),
        (tensor(b"K\x01\x85", b"K\x01\x85", numel=b"\x88"), "not as long"),
    ],
)
def test_a_tensor_cannot_reach_beyond_its_data(tmp_path: Path, record: bytes, words: str) -> None:
    """Four floats are there; whatever else a record claims would read the process's memory."""
    body = module(SEQUENTIAL, _buffers=mapping(b=record))
    path = archive(tmp_path / "m.pt", body, {"data/0": bytes(16)})
    with pytest.raises(InvalidModel, match=words):
        load(path)


def test_the_tensor_of_these_tests_is_accepted_within_its_data(tmp_path: Path) -> None:
    body = module(SEQUENTIAL, _buffers=mapping(b=tensor(b"K\x04\x85", b"K\x01\x85")))
    data = struct.pack("<4f", 1, 2, 3, 4)
    loaded = load(archive(tmp_path / "m.pt", body, {"data/0": data}))
    (buffer,) = loaded.buffers()
    assert buffer.tolist() == [1, 2, 3, 4]


def test_missing_tensor_data_is_refused(tmp_path: Path) -> None:
    body = module(SEQUENTIAL, _buffers=mapping(b=tensor(b"K\x04\x85", b"K\x01\x85")))
    with pytest.raises(InvalidModel, match="data/0 is missing"):
        load(archive(tmp_path / "m.pt", body))


def test_all_refused_names_are_listed(tmp_path: Path) -> None:
    body = b"(cos\nsystem\ncbuiltins\neval\n" + module(SEQUENTIAL) + b"t"
    with pytest.raises(UntrustedCheckpoint, match=r"builtins\.eval, os\.system"):
        load(archive(tmp_path / "m.pt", body))
