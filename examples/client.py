"""Calls a running server and prints what it answers and how long that took.

python examples/client.py [ADDRESS] [MODEL_ID]
"""

from __future__ import annotations

import argparse
import sys

import torch

from splitlearn_comm import GRPCComputeClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", nargs="?", default="127.0.0.1:50051")
    parser.add_argument("model_id", nargs="?", default=None)
    arguments = parser.parse_args()

    with GRPCComputeClient(arguments.address) as client:
        if not client.connect():
            sys.exit(f"nobody answers on {arguments.address}; is the server running?")
        info = client.get_service_info()
        print(f"connected to {info and info['service_name']} on {arguments.address}")
        for _ in range(10):
            output = client.compute(torch.randn(1, 10, 768), model_id=arguments.model_id)
        statistics = client.get_statistics()
        print(f"output shape: {tuple(output.shape)}")
        print(f"requests: {statistics['total_requests']}")
        print(f"average latency: {statistics['avg_total_time_ms']:.2f} ms")


if __name__ == "__main__":
    main()
