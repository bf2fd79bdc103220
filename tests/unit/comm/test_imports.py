"""Importing the package costs nothing until something is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import splitlearn_comm
import splitlearn_comm.client
import splitlearn_comm.core
import splitlearn_comm.server

PACKAGES = [splitlearn_comm, splitlearn_comm.client, splitlearn_comm.core, splitlearn_comm.server]


def test_importing_loads_neither_torch_nor_grpc() -> None:
    code = (
        "import sys, splitlearn_comm, splitlearn_comm.core, splitlearn_comm.client, splitlearn_comm.server;"
        "from splitlearn_comm.core import InvalidRequest;"
        "assert not {'torch', 'grpc', 'google.protobuf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_can_be_imported(package: object) -> None:
    names = package.__all__
    assert sorted(names) == dir(package)
    assert all(getattr(package, name) is not None for name in names)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = splitlearn_comm.Nonsense


def test_one_name_is_one_object_wherever_it_is_imported_from() -> None:
    assert splitlearn_comm.TensorCodec is splitlearn_comm.core.TensorCodec
    assert splitlearn_comm.GRPCComputeClient is splitlearn_comm.client.GRPCComputeClient
    assert splitlearn_comm.GRPCComputeServer is splitlearn_comm.server.GRPCComputeServer
