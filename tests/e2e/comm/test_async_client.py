"""The client for asyncio answers, retries and withdraws like the other one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
import torch

from splitlearn_comm import AsyncGRPCComputeClient, GRPCComputeServer, RemoteComputeError
from splitlearn_comm.client.retry import FixedDelay
from splitlearn_comm.core import ComputeFunction, NotReady

PATIENCE_S = 20.0


class Sometimes(ComputeFunction):
    """Twice its input; not ready for so many requests first; waits for the gate if there is one."""

    def __init__(self) -> None:
        self.not_ready = 0
        self.calls = 0
        self.gate: threading.Event | None = None
        self.lock = threading.Lock()

    def compute(self, input_tensor: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.calls += 1
            self.not_ready -= 1
            refuses = self.not_ready >= 0
        if self.gate is not None:
            assert self.gate.wait(PATIENCE_S)
        if refuses:
            raise NotReady("a moment, please")
        return input_tensor * 2


@pytest.fixture
def function() -> Sometimes:
    return Sometimes()


@pytest.fixture
def server(function: Sometimes) -> Iterator[GRPCComputeServer]:
    with GRPCComputeServer(function, port=0, max_workers=4) as server:
        yield server


def client_of(server: GRPCComputeServer, attempts: int = 3) -> AsyncGRPCComputeClient:
    retries = FixedDelay(max_attempts=attempts, delay_s=0.01)
    return AsyncGRPCComputeClient(f"127.0.0.1:{server.port}", PATIENCE_S, retries)


def test_many_at_a_time_each_get_their_own(server: GRPCComputeServer) -> None:
    async def run() -> list[float]:
        async with client_of(server) as client:
            assert await client.health_check()
            info = await client.get_service_info()
            assert info is not None
            answers = await asyncio.gather(
                *(client.compute(torch.full((1,), float(n))) for n in range(50))
            )
            assert client.get_statistics()["total_requests"] == 50
            return [answer.item() for answer in answers]

    assert asyncio.run(run()) == [2.0 * n for n in range(50)]


def test_what_passes_is_tried_again_and_what_does_not_is_raised(
    server: GRPCComputeServer, function: Sometimes
) -> None:
    async def run() -> None:
        async with client_of(server) as client:
            function.not_ready = 2
            assert (await client.compute(torch.ones(1))).item() == 2.0
            assert function.calls == 3
            function.not_ready = 5
            with pytest.raises(RemoteComputeError, match="a moment, please"):
                await client.compute(torch.ones(1))
            assert function.calls == 6

    asyncio.run(run())


def test_many_come_in_order_from_any_kind_of_iterable(server: GRPCComputeServer) -> None:
    async def tensors() -> AsyncIterator[torch.Tensor]:
        for number in range(20):
            yield torch.full((1,), float(number))

    async def run() -> None:
        async with client_of(server) as client:
            found = [a.item() async for a in client.compute_many(tensors(), in_flight=3)]
            assert found == [2.0 * n for n in range(20)]
            given = [torch.full((1,), float(n)) for n in range(5)]
            assert [a.item() async for a in client.compute_many(given)] == [0, 2, 4, 6, 8]

    asyncio.run(run())


def test_a_tensor_is_sent_as_it_was_when_it_was_taken_also_when_it_is_tried_again(
    server: GRPCComputeServer, function: Sometimes
) -> None:
    tensor = torch.zeros(1)

    def one_that_changes() -> Iterator[torch.Tensor]:
        for number in range(8):
            yield tensor.fill_(float(number))

    async def run() -> None:
        async with client_of(server) as client:
            for function.not_ready in (0, 2):
                found = [a.item() async for a in client.compute_many(one_that_changes())]
                assert found == [2.0 * n for n in range(8)]

    asyncio.run(run())


def test_the_loop_goes_on_while_the_server_is_asked_what_it_knows(
    server: GRPCComputeServer, function: Sometimes, monkeypatch: pytest.MonkeyPatch
) -> None:
    went_on = threading.Event()

    def slowly() -> tuple[str, ...]:
        return ("dtype:float32",) if went_on.wait(PATIENCE_S / 2) else ()

    monkeypatch.setattr("splitlearn_comm.server.servicer.extensions", slowly)

    async def run(many: bool) -> None:
        address = f"127.0.0.1:{server.port}"
        async with AsyncGRPCComputeClient(address, PATIENCE_S, announce_dtype=True) as client:
            asyncio.get_running_loop().call_later(0.1, went_on.set)
            if many:
                assert [a.item() async for a in client.compute_many([torch.ones(1)])] == [2.0]
            else:
                assert (await client.compute(torch.ones(1))).item() == 2.0

    for many in (False, True):
        went_on.clear()
        asyncio.run(run(many))


def test_a_cancelled_task_withdraws_its_request(
    server: GRPCComputeServer, function: Sometimes
) -> None:
    async def run() -> None:
        function.gate = threading.Event()
        async with client_of(server) as client:
            running = [asyncio.create_task(client.compute(torch.ones(1))) for _ in range(4)]
            while function.calls < 4:
                await asyncio.sleep(0)
            waiting = asyncio.create_task(client.compute(torch.ones(1)))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            last = asyncio.create_task(client.compute(torch.ones(1)))
            info = await client.get_service_info()
            while info is None or info["total_requests"] < 6:
                info = await client.get_service_info()
            function.gate.set()
            assert [t.item() for t in await asyncio.gather(*running, last)] == [2.0] * 5
            assert function.calls == 5

    asyncio.run(run())


def test_a_server_that_says_nothing_is_not_waited_for_beyond_the_time_limit(
    server: GRPCComputeServer, function: Sometimes
) -> None:
    async def run() -> None:
        function.gate = threading.Event()
        hasty = AsyncGRPCComputeClient(f"127.0.0.1:{server.port}", timeout=0.2)
        with pytest.raises(RemoteComputeError, match="DEADLINE_EXCEEDED"):
            await asyncio.wait_for(hasty.compute(torch.ones(1)), PATIENCE_S / 2)
        function.gate.set()
        await hasty.close()

    asyncio.run(run())
