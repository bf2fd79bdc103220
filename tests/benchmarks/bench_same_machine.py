"""What a tensor costs between two processes of one machine: by a port, a Unix socket, shared memory.

The server doubles nothing and computes nothing: it gives back its input. Rounds alternate between the ways.
Prints, asserts nothing but that the answers are right.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from splitlearn_comm import GRPCComputeClient, Int8Codec, TensorCodec, Zstd

SIZES_MB = (0.03, 1, 16, 64)
ROUNDS = 5
SECONDS = 1.0
SERVER = """
import sys
from pathlib import Path
from splitlearn_comm.server import ComputeServicer, SingleFunctionBackend, SystemMonitor, build_server
from splitlearn_comm.core import ComputeFunction

class Echo(ComputeFunction):
    def compute(self, input_tensor):
        return input_tensor

servicer = ComputeServicer(SingleFunctionBackend(Echo()), SystemMonitor())
server = build_server(servicer, "127.0.0.1:0", unix_socket=Path(sys.argv[1]))
server.start()
print(server.port, flush=True)
sys.stdin.read()
server.stop(0)
"""


def test_same_machine(tmp_path: Path) -> None:
    path = tmp_path / "node.sock"
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        server = psutil.Process(process.pid)
        announced = {"announce_dtype": True}
        ways: dict[str, Callable[[], GRPCComputeClient]] = {
            "port": lambda: GRPCComputeClient(f"127.0.0.1:{port}"),
            "socket": lambda: GRPCComputeClient(f"unix:{path}"),
            "shared memory": lambda: GRPCComputeClient(f"unix:{path}", shared_memory=True),
            "port, zstd": lambda: GRPCComputeClient(
                f"127.0.0.1:{port}", codec=TensorCodec(compression=Zstd()), **announced
            ),
            "port, int8": lambda: GRPCComputeClient(
                f"127.0.0.1:{port}", codec=Int8Codec(), **announced
            ),
        }
        clients = {name: make() for name, make in ways.items()}
        print("\nMB     way              ms a request   ms of the server's processors   / port")
        for size_mb in SIZES_MB:
            tensor = torch.randn(max(1, int(size_mb * 1024)), 256)
            took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(ROUNDS):
                for name, client in clients.items():
                    answer = client.compute(tensor)
                    assert torch.allclose(answer, tensor, atol=0.05)
                    before, began, count = sum(server.cpu_times()[:2]), time.perf_counter(), 0
                    while time.perf_counter() - began < SECONDS:
                        client.compute(tensor)
                        count += 1
                    passed = time.perf_counter() - began
                    cpu = sum(server.cpu_times()[:2]) - before
                    took[name].append((passed * 1000 / count, cpu * 1000 / count))
            port_ms = statistics.median(ms for ms, _ in took["port"])
            for name, runs in took.items():
                ms = statistics.median(ms for ms, _ in runs)
                cpu_ms = statistics.median(cpu for _, cpu in runs)
                print(f"{size_mb:<6} {name:15}  {ms:12.2f}   {cpu_ms:29.2f}   {ms / port_ms:6.2f}")
        for client in clients.values():
            client.close()
        process.communicate()
