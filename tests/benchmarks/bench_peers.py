"""Our node beside other servers of PyTorch models: the same models, inputs, clients and processors.

Each round goes through all systems, one after the other, with nothing else running; the round is repeated.
Every server has one process that computes, with one thread within a forward, and joins up to 32 requests with
the least wait that it takes. All of them, and the clients, share the machine's processors.

Printed, and written to docs/benchmarks.md and its picture by a run of the usual size: requests a second, the
50th and 99th percentile of a request's time, milliseconds of processor time of the server for each request,
and the server's memory. Before anything is measured, each server's answers are compared with the model's own.
A server that does not start or answer here is not left out in silence: its rows say why, in its own words.

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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import grpc
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
import v2  # noqa: E402
import wire  # noqa: E402

PYTHON_OF_PEERS = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"

USUAL = {"ROUNDS": "3", "SECONDS": "3", "CLIENTS": "1,8,32"}
ROUNDS = int(os.environ.get("ROUNDS", USUAL["ROUNDS"]))
SECONDS = float(os.environ.get("SECONDS", USUAL["SECONDS"]))
CLIENTS = [int(n) for n in os.environ.get("CLIENTS", USUAL["CLIENTS"]).split(",")]
MODELS = os.environ.get("MODELS", ",".join(models.NAMES)).split(",")
ALL_SYSTEMS = (
    "ours",
    "ours, streams",
    "ours, freeze",
    "ours, directory",
    "mosec",
    "LitServe",
    "MLServer",
    "MLServer, bytes",
    "Triton",
)
SYSTEMS = os.environ.get("SYSTEMS", ";".join(ALL_SYSTEMS)).split(";")
IS_USUAL = not any(name in os.environ for name in (*USUAL, "MODELS", "SYSTEMS"))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
STARTS_WITHIN_S = 120


@dataclass(frozen=True)
class Peer:
    """A server of others: its script, what comes before the port, and its HTTP path.

    It is measured once for each of the kinds of requests that it is sent.
    """

    script: str
    kinds: dict[str, str]
    port_option: tuple[str, ...] = ()
    path: str = ""


PEERS = (
    Peer(
        "mosec_server.py",
        {"mosec": "http"},
        port_option=("--address", "127.0.0.1", "--port"),
        path="/inference",
    ),
    Peer("litserve_server.py", {"LitServe": "http"}, path="/predict"),
    Peer("mlserver_server.py", {"MLServer": "v2-grpc", "MLServer, bytes": "v2-grpc-bytes"}),
    Peer("triton_server.py", {"Triton": "v2-http"}, path="/v2/models/{model}/infer"),
)


@dataclass(frozen=True)
class Serving:
    """A server that is up: how it is called, and its process."""

    kind: str
    address: str
    path: str
    pid: int


class CannotServe(Exception):
    """A server of others did not start, or did not answer; with its own words."""


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
def our_node(name: str, directory: Path, **keys: object) -> Iterator[Serving]:
    directory.mkdir()
    (directory / "models.py").write_text((HERE / "models.py").read_text())
    sizes = [list(tensor.shape) for tensor in models.inputs(name)]
    shape = [-1 if len({s[i] for s in sizes}) > 1 else sizes[0][i] for i in range(len(sizes[0]))]
    shape[0] = -1
    options = {
        "input_shape": shape,
        **({"input_dtype": "int64"} if name in models.TAKES_IDS else {}),
    }
    file = {
        "model_id": name,
        "model_path": f"models:{name}",
        "device": "cpu",
        "config": options,
        **keys,
    }
    (directory / f"{name}.yaml").write_text(json.dumps(file))
    with Node(directory, {"max_models": 4}, environment=ONE_THREAD) as node:
        node.wait_phase(name, "Ready")
        yield Serving("grpc", node.address, "", node.process.pid)


@contextmanager
def peer_node(peer: Peer, kind: str, name: str, files: Path) -> Iterator[Serving]:
    """The server, answering; what it writes and says is kept in `files`.

    Triton hands that path to a shell unquoted, so it must have no spaces.
    """
    port = free_port()
    command = [str(PYTHON_OF_PEERS), peer.script, *peer.port_option, str(port)]
    files.mkdir(parents=True)
    environment = {**os.environ, **ONE_THREAD, "PEER_MODEL": name, "PEER_FILES": str(files)}
    said = files / "said.txt"
    with (
        said.open("wb") as output,
        subprocess.Popen(
            command,
            cwd=HERE,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            path = peer.path.format(model=name)
            serving = Serving(kind, f"127.0.0.1:{port}", path, process.pid)
            _wait_for_answer(serving, name, process, said)
            yield serving
        finally:
            _end(process)


def _wait_for_answer(
    serving: Serving, name: str, process: subprocess.Popen[bytes], said: Path
) -> None:
    def looked() -> bool:
        if process.poll() is not None:
            raise CannotServe(_last_line(said.read_text(errors="replace")))
        return _answers(serving, name)

    try:
        eventually(looked, "it answers", STARTS_WITHIN_S)
    except AssertionError:
        last = _last_line(said.read_text(errors="replace"))
        raise CannotServe(f"no answer within {STARTS_WITHIN_S} s; it said: {last}") from None


def _last_line(text: str) -> str:
    """Where a traceback or a server that gives up says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process, then those of its own that it left behind."""
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def _answers(serving: Serving, name: str) -> bool:
    try:
        ask(serving, name, models.inputs(name)[0])
    except (OSError, AssertionError, CannotServe):
        return False
    return True


def ask_http(serving: Serving, tensor: torch.Tensor) -> torch.Tensor:
    host, port = serving.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), 30) as connection:
        connection.sendall(load_client.encoded(serving.kind, serving.path, "", tensor))
        head, body = load_client.read_answer(connection)
    return wire.unpacked(body) if serving.kind == "http" else v2.http_answer(head, body)


def ask_v2_grpc(serving: Serving, name: str, tensor: torch.Tensor) -> torch.Tensor:
    with grpc.insecure_channel(serving.address) as channel:
        request = load_client.encoded(serving.kind, "", name, tensor)
        try:
            answer: bytes = channel.unary_unary(v2.METHOD)(request, timeout=30)
        except grpc.RpcError as error:
            raise CannotServe(f"{error.code().name}: {error.details()}") from None
    return v2.grpc_answer(answer) if serving.kind == "v2-grpc" else v2.grpc_answer_in_bytes(answer)


def ask(serving: Serving, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if serving.kind in ("http", "v2-http"):
        return ask_http(serving, tensor)
    if serving.kind.startswith("v2-grpc"):
        return ask_v2_grpc(serving, name, tensor)
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
        capture_output=True,
        text=True,
        timeout=SECONDS + 120,
    )
    if done.returncode != 0:
        raise CannotServe(_last_line(done.stderr))
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


class Results:
    """What was measured, and what could not be; ours always can."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.missing: list[report.Missing] = []

    def begin(self, system: str, serving: Serving, name: str) -> None:
        """Its answers compared, and a measurement that counts for nothing."""
        try:
            check_answers(system, serving, name)
            measured(system, serving, name, 1)
        except CannotServe as failure:
            self.leave_out(system, name, CLIENTS, failure)

    def measure(self, system: str, serving: Serving, name: str, clients: int) -> None:
        if self._is_missing(system, name, clients):
            return
        try:
            self.rows.append(measured(system, serving, name, clients))
        except CannotServe as failure:
            self.leave_out(system, name, [clients], failure)

    def leave_out(self, system: str, name: str, loads: Sequence[int], failure: CannotServe) -> None:
        """Rounds that went well before do not stand for one that did not."""
        if system.startswith("ours"):
            raise failure
        self.missing += [report.Missing(system, name, load, str(failure)) for load in loads]
        self.rows = [r for r in self.rows if not self._is_missing(r.system, r.model, r.clients)]

    def _is_missing(self, system: str, name: str, clients: int) -> bool:
        return (system, name, clients) in {(m.system, m.model, m.clients) for m in self.missing}


def start_peers(
    stack: ExitStack, name: str, files: Path, results: Results
) -> Iterator[tuple[str, Serving]]:
    for peer in PEERS:
        kinds = {system: kind for system, kind in peer.kinds.items() if system in SYSTEMS}
        if not kinds:
            continue
        first = next(iter(kinds.values()))
        try:
            serving = stack.enter_context(peer_node(peer, first, name, files / peer.script))
        except CannotServe as failure:
            for system in kinds:
                results.leave_out(system, name, CLIENTS, failure)
            continue
        for system, kind in kinds.items():
            yield system, replace(serving, kind=kind)


def test_peers(tmp_path: Path) -> None:
    results = Results()
    for name in MODELS:
        with ExitStack() as stack:
            up: dict[str, Serving] = {}
            plain = {"ours", "ours, streams"} & set(SYSTEMS)
            if plain:
                ours = stack.enter_context(our_node(name, tmp_path / name))
                up |= {system: ours for system in SYSTEMS if system in plain}
            if (system := "ours, freeze") in SYSTEMS:
                node = our_node(name, tmp_path / f"{name}-freeze", optimize="freeze")
                up[system] = stack.enter_context(node)
            if (system := "ours, directory") in SYSTEMS and name in models.DIRECTORIES:
                path, config = models.DIRECTORIES[name]
                node = our_node(
                    name, tmp_path / f"{name}-directory", model_path=path, config=config
                )
                up[system] = stack.enter_context(node)
            up |= start_peers(stack, name, tmp_path / f"peers-{name}", results)
            for system, serving in up.items():
                results.begin(system, serving, name)
            for _ in range(ROUNDS):
                for clients in CLIENTS:
                    for system, serving in up.items():
                        results.measure(system, serving, name, clients)
        print(f"\n{name}\n{report.table(name, results.rows, results.missing)}")
    if "ROWS" in os.environ:
        found = {
            "rows": [asdict(row) for row in results.rows],
            "missing": [asdict(one) for one in results.missing],
        }
        Path(os.environ["ROWS"]).write_text(json.dumps(found))
    if IS_USUAL:
        report.write(PAGE, results.rows, results.missing, ROUNDS, SECONDS)
    assert statistics.median(row.per_second for row in results.rows) > 0
