"""The safetensors reader: own memory, and a header that is not believed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from splitlearn_manager.core.loaders.file_format import CORRUPT_CHECKPOINT
from splitlearn_manager.core.loaders.own_memory import read_tensor
from splitlearn_manager.core.loaders.safetensors_reader import read_all, read_header
from splitlearn_manager.errors import InvalidModel, LoadError

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def test_reads_what_the_reference_library_wrote_in_every_dtype(tmp_path: Path) -> None:
    bits = torch.arange(48, dtype=torch.uint8)
    tensors = {
        str(d): (bits % 2).bool() if d is torch.bool else bits.clone().view(d) for d in DTYPES
    }
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "matrix": torch.rand(3, 5)}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    found = read_all([tmp_path / "m.safetensors"])
    assert found.keys() == tensors.keys()
    assert all(same_bytes(found[name], tensors[name]) for name in tensors)


def test_converts_floating_point_tensors_only(tmp_path: Path) -> None:
    save_file({"w": torch.rand(4), "ids": torch.arange(3)}, tmp_path / "m.safetensors")
    found = read_all(
        [tmp_path / "m.safetensors"], lambda stored: read_tensor(stored, torch.bfloat16)
    )
    assert found["w"].dtype is torch.bfloat16
    assert found["ids"].dtype is torch.int64


def test_a_file_that_is_cut_off_anywhere_is_corrupt_and_may_be_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.rand(4), "b": torch.rand(8)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError) as caught:
            read_header(path)
        assert caught.value.reason == CORRUPT_CHECKPOINT, length
        assert "m.safetensors" in caught.value.message


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"not json", b"", "no JSON"),
        ([1], b"", "no map"),
        ({"a": 1}, b"", "malformed"),
        ({"a": entry(0, 4, [-1])}, b"\0" * 4, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, True]}}, b"\0" * 4, "malformed"),
        ({"a": entry(0, 4, [1], "F3")}, b"\0" * 4, "dtype 'F3'"),
        ({"a": entry(0, 4, [2])}, b"\0" * 4, "needs 8 bytes"),
        ({"a": entry(0, 4, [2**62, 2**62])}, b"\0" * 4, "needs"),
        ({"a": entry(4, 8, [1])}, b"\0" * 8, "gap"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, b"\0" * 8, "overlaps"),
        ({"a": entry(0, 4, [1])}, b"\0" * 9, "5 bytes after"),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(
    tmp_path: Path, header: object, data: bytes, words: str
) -> None:
    path = write(tmp_path / "m.safetensors", header, data)
    with pytest.raises(InvalidModel, match=words):
        read_all([path])


def test_two_files_with_the_same_tensor_are_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.rand(2)}, tmp_path / name)
    with pytest.raises(InvalidModel, match="'w' is in another file"):
        read_all([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_load_error_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "arbitrary.safetensors"
    path.write_bytes(data)
    try:
        read_all([path])
    except LoadError:
        return
    assert read_header(path) == ()
