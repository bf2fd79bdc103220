"""`AsyncGRPCComputeClient`: the client for programs on asyncio.

It is `GRPCComputeClient` underneath: requests go over its stream, and what waits, waits in the event loop. A
tensor is encoded on the loop's thread; health and service information, and what the server knows of what
requests announce, are asked for on another one.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import Any

import torch

from splitlearn_comm.client.errors import RemoteComputeError
from splitlearn_comm.client.grpc_client import GRPCComputeClient
from splitlearn_comm.client.messages import ServiceDescription
from splitlearn_comm.client.prepared import Prepared
from splitlearn_comm.client.retry import ExponentialBackoff, RetryStrategy
from splitlearn_comm.client.statistics import Statistics


class AsyncGRPCComputeClient:
    """A client of one server; also an asynchronous context manager.

    Args:
        server_address: `host:port` or `unix:PATH`.
        timeout: seconds for each request, its retries and the waits between them included.
        retry_strategy: three attempts, 1 s and 2 s apart, unless given.
        options: as for `GRPCComputeClient`: max_message_length, codec, announce_dtype, credentials, metadata.
    """

    def __init__(
        self,
        server_address: str,
        timeout: float = 30.0,
        retry_strategy: RetryStrategy | None = None,
        **options: Any,
    ) -> None:
        self.timeout = timeout
        self._retries = retry_strategy or ExponentialBackoff()
        self._client = GRPCComputeClient(
            server_address, timeout, retry_strategy=self._retries, **options
        )

    async def __aenter__(self) -> AsyncGRPCComputeClient:
        await self.connect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def connect(self) -> bool:
        """As `GRPCComputeClient.connect`."""
        return await asyncio.to_thread(self._client.connect)

    async def close(self) -> None:
        """Drop the connection; what waits for an answer fails."""
        await asyncio.to_thread(self._client.close)

    async def compute(self, tensor: torch.Tensor, model_id: str | None = None) -> torch.Tensor:
        """Run a model. A task that is cancelled withdraws its request.

        Args:
            tensor: any device; sent in the codec's dtype, token ids too.
            model_id: None lets the server choose.

        Returns:
            A CPU tensor in the codec's dtype.

        Raises:
            RemoteComputeError: with the gRPC status, after the retries.
            ValueError: if integers in `tensor` cannot be sent exactly in the codec's dtype.
        """
        await self._check_server()
        prepared = self._client._prepared(tensor, model_id)
        try:
            return await self._answer(prepared)
        finally:
            prepared.give_up()

    async def _check_server(self) -> None:
        if not self._client._carriage.server_is_known:
            await asyncio.to_thread(self._client._carriage.check_server)

    def _begun(self, tensor: torch.Tensor, model_id: str | None) -> asyncio.Task[torch.Tensor]:
        # The tensor is encoded here and now, and not when the task has its turn.
        prepared = self._client._prepared(tensor, model_id)
        task = asyncio.create_task(self._answer(prepared))
        task.add_done_callback(lambda _: prepared.give_up())
        return task

    async def _answer(self, prepared: Prepared) -> torch.Tensor:
        attempt = 1
        while True:
            try:
                return await asyncio.wrap_future(self._client._ask(prepared))
            except RemoteComputeError as error:
                delay_s = self._retries.delay_s(attempt)
                too_late = time.monotonic() + delay_s >= prepared.until_s
                if too_late or not self._retries.should_retry(attempt, error.code()):
                    raise
            await asyncio.sleep(delay_s)
            prepared.renew()
            attempt += 1

    async def compute_many(
        self,
        tensors: Iterable[torch.Tensor] | AsyncIterable[torch.Tensor],
        model_id: str | None = None,
        in_flight: int = 32,
    ) -> AsyncIterator[torch.Tensor]:
        """Run a model on many tensors, so many at a time, and give the answers in the tensors' order.

        Args:
            tensors: taken from as answers are taken; one may be written to again once the next is asked for.
            model_id: None lets the server choose.
            in_flight: requests that are under way at most.

        Raises:
            RemoteComputeError: with the gRPC status of the first tensor that was not answered; later ones
                are withdrawn.
        """
        if in_flight < 1:
            raise ValueError(f"in_flight: expected at least 1, got {in_flight}")
        await self._check_server()
        waiting: deque[asyncio.Task[torch.Tensor]] = deque()
        try:
            async for tensor in _each(tensors):
                waiting.append(self._begun(tensor, model_id))
                if len(waiting) >= in_flight:
                    yield await waiting.popleft()
            while waiting:
                yield await waiting.popleft()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def health_check(self) -> bool:
        """Ask once; False if the server cannot be reached or is not healthy."""
        return await asyncio.to_thread(self._client.health_check)

    async def get_service_info(self) -> ServiceDescription | None:
        """Return what the server says of itself, None if it cannot be reached."""
        return await asyncio.to_thread(self._client.get_service_info)

    def get_statistics(self) -> Statistics:
        """Return the number of answered requests and their mean times in milliseconds."""
        return self._client.get_statistics()


async def _each(
    tensors: Iterable[torch.Tensor] | AsyncIterable[torch.Tensor],
) -> AsyncIterator[torch.Tensor]:
    if isinstance(tensors, AsyncIterable):
        async for tensor in tensors:
            yield tensor
    else:
        for tensor in tensors:
            yield tensor
