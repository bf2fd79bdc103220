"""Our node beside other servers of PyTorch models: the same models, inputs, clients and processors.

Each round goes through all systems, one after the other, with nothing else running; the round is repeated.
Every server has one process that computes, with one thread within a forward, and joins up to 32 requests with
the least wait that it takes. All of them, and the clients, share the machine's processors.

Printed, and written to docs/benchmarks.md and its picture by a run of the usual size: requests a second, the
50th and 99th percentile of a request's time, milliseconds of processor time of the server for each request,
and the server's memory. Before anything is measured, each server's answers are compared with the model's own.

`make bench-peers`. ROUNDS (3), SECONDS (3), MODELS, SYSTEMS, CLIENTS choose less; ROWS is a file for the
figures.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from support.node import Node
from support.waiting import eventually

HERE = Path(__file__).parent / "peers"
# The servers import these as modules beside them, and so do we.
sys.path.insert(0, str(HERE))
import load_client  # noqa: E402
import models  # noqa: E402
import report  # noqa: E402
import wire  # noqa: E402

PYTHON_OF_PEERS = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"

USUAL = {"ROUNDS": "3", "SECONDS": "3", "CLIENTS": "1,8,32"}
ROUNDS = int(os.environ.get("ROUNDS", USUAL["ROUNDS"]))
SECONDS = float(os.environ.get("SECONDS", USUAL["SECONDS"]))
CLIENTS = [int(n) for n in os.environ.get("CLIENTS", USUAL["CLIENTS"]).split(",")]
MODELS = os.environ.get("MODELS", ",".join(models.NAMES)).split(",")
ALL_SYSTEMS = ("ours", "ours, streams", "mosec", "LitServe")
SYSTEMS = os.environ.get("SYSTEMS", ";".join(ALL_SYSTEMS)).split(";")
IS_USUAL = not any(name in os.environ for name in (*USUAL, "MODELS", "SYSTEMS"))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Serving:
    """A server that is up: how it is called, and its process."""

    kind: str
    address: str
    path: str
    pid: int


@dataclass(frozen=True)
class Row:
    """One measurement. Of processor time and memory: the server's, with its child processes."""

    system: str
    model: str
    clients: int
    per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    memory_mb: float


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextmanager
def our_node(name: str, directory: Path) -> Iterator[Serving]:
    directory.mkdir()
    (directory / "models.py").write_text((HERE / "models.py").read_text())
    sizes = [list(tensor.shape) for tensor in models.inputs(name)]
    shape = [-1 if len({s[i] for s in sizes}) > 1 else sizes[0][i] for i in range(len(sizes[0]))]
    shape[0] = -1
    options = {
        "input_shape": shape,
        **({"input_dtype": "int64"} if name in models.TAKES_IDS else {}),
    }
    file = {"model_id": name, "model_path": f"models:{name}", "device": "cpu", "config": options}
    (directory / f"{name}.yaml").write_text(json.dumps(file))
    with Node(directory, {"max_models": 4}, environment=ONE_THREAD) as node:
        node.wait_phase(name, "Ready")
        yield Serving("grpc", node.address, "", node.process.pid)


@contextmanager
def peer(script: str, port_option: tuple[str, ...], path: str, name: str) -> Iterator[Serving]:
    port = free_port()
    command = [str(PYTHON_OF_PEERS), script, *port_option, str(port)]
    environment = {**os.environ, **ONE_THREAD, "PEER_MODEL": name}
    with subprocess.Popen(
        command,
        cwd=HERE,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            serving = Serving("http", f"127.0.0.1:{port}", path, process.pid)
            eventually(lambda: _answers(serving, name), f"{script} answers", 120)
            yield serving
        finally:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.terminate()
            process.terminate()
            process.wait(20)


def _answers(serving: Serving, name: str) -> bool:
    try:
        ask_http(serving, models.inputs(name)[0])
    except (OSError, AssertionError):
        return False
    return True


def ask_http(serving: Serving, tensor: torch.Tensor) -> torch.Tensor:
    host, port = serving.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), 30) as connection:
        connection.sendall(load_client.encoded("http", serving.path, "", tensor))
        return wire.unpacked(load_client.read_answer(connection))


def ask(serving: Serving, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if serving.kind == "http":
        return ask_http(serving, tensor)
    from splitlearn_comm import GRPCComputeClient

    with GRPCComputeClient(serving.address) as client:
        return client.compute(tensor, name)


def check_answers(system: str, serving: Serving, name: str) -> None:
    module = getattr(models, name)()
    for tensor in models.inputs(name):
        with torch.inference_mode():
            expected = module(models.converted(name, tensor))
        torch.testing.assert_close(
            ask(serving, name, tensor), expected, rtol=1e-3, atol=1e-4, msg=f"{system}, {name}"
        )


def tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_s(pid: int) -> float:
    times = [p.cpu_times() for p in tree(pid)]
    return sum(t.user + t.system for t in times)


def memory_mb(pid: int) -> float:
    """Pages that are shared count for each of those that share them as their part."""
    return sum(p.memory_full_info().pss for p in tree(pid)) / 2**20


def measured(system: str, serving: Serving, name: str, clients: int) -> Row:
    kind = "stream" if system == "ours, streams" else serving.kind
    arguments = [kind, serving.address, serving.path, name, str(clients), str(SECONDS)]
    before = cpu_s(serving.pid)
    done = subprocess.run(
        [sys.executable, str(HERE / "load_client.py"), *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=SECONDS + 120,
    )
    found = json.loads(done.stdout)
    spent_s = cpu_s(serving.pid) - before
    return Row(
        system,
        name,
        clients,
        found["answered"] / SECONDS,
        found["p50_ms"],
        found["p99_ms"],
        spent_s * 1000 / found["answered"],
        memory_mb(serving.pid),
    )


def test_peers(tmp_path: Path) -> None:
    rows: list[Row] = []
    for name in MODELS:
        with ExitStack() as stack:
            up: dict[str, Serving] = {}
            if any(system.startswith("ours") for system in SYSTEMS):
                ours = stack.enter_context(our_node(name, tmp_path / name))
                up |= {system: ours for system in SYSTEMS if system.startswith("ours")}
            if "mosec" in SYSTEMS:
                options = ("--address", "127.0.0.1", "--port")
                up["mosec"] = stack.enter_context(
                    peer("mosec_server.py", options, "/inference", name)
                )
            if "LitServe" in SYSTEMS:
                up["LitServe"] = stack.enter_context(
                    peer("litserve_server.py", (), "/predict", name)
                )
            for system, serving in up.items():
                check_answers(system, serving, name)
                measured(system, serving, name, 1)
            for _ in range(ROUNDS):
                for clients in CLIENTS:
                    for system, serving in up.items():
                        rows.append(measured(system, serving, name, clients))
        print(f"\n{name}\n{report.table([row for row in rows if row.model == name])}")
    if "ROWS" in os.environ:
        Path(os.environ["ROWS"]).write_text(json.dumps([asdict(row) for row in rows]))
    if IS_USUAL:
        report.write(PAGE, rows, ROUNDS, SECONDS)
    assert statistics.median(row.per_second for row in rows) > 0
