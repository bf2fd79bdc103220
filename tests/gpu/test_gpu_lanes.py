"""Calls side by side on a real GPU: none sees another's numbers, or half a step."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from splitlearn_comm.core import ModelComputeFunction, TensorCodec
from splitlearn_comm.core.packed import Packed, joined
from support.real_gpu import RealGpu

MB = 2**20
LONG_CYCLES = 20_000_000
"""Some 10 ms."""


def at_once(count: int, work: Callable[[int], None]) -> None:
    """Run `work` in so many threads; what one raises is raised."""
    wrong: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if wrong:
        raise wrong[0]


class Tells(nn.Module):
    """Answers twice its input; knows the streams on which it ran. Takes long if it is told to."""

    def __init__(self, *, long: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.streams: list[int] = []
        self.long = long

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.streams.append(torch.cuda.current_stream().cuda_stream)
        if self.long:
            torch.cuda._sleep(LONG_CYCLES)
        return x * self.scale


def test_what_takes_long_has_a_stream_for_each_thread_and_those_of_ended_ones_are_used_again(
    gpu: RealGpu,
) -> None:
    module = Tells(long=True)
    function = ModelComputeFunction(module, gpu.device)
    function.compute(torch.ones(2, 2))
    together = threading.Barrier(3)
    module.streams.clear()

    def work(_: int) -> None:
        together.wait(30)
        function.compute(torch.ones(2, 2))
        together.wait(30)

    at_once(3, work)
    first = set(module.streams)
    assert len(first) == 3
    assert torch.cuda.default_stream().cuda_stream not in first
    module.streams.clear()
    for _ in range(40):
        at_once(1, lambda _: function.compute(torch.ones(2, 2)))
    assert set(module.streams) <= first


def test_what_is_short_runs_in_the_stream_that_all_share(gpu: RealGpu) -> None:
    module = Tells(long=False)
    function = ModelComputeFunction(module, gpu.device)
    for _ in range(20):
        at_once(1, lambda _: function.compute(torch.ones(2, 2)))
    # Its first forward may take long.
    assert set(module.streams[2:]) == {torch.cuda.default_stream().cuda_stream}


@pytest.mark.parametrize("long", [False, True])
def test_answers_come_where_their_inputs_were(gpu: RealGpu, long: bool) -> None:
    function = ModelComputeFunction(Tells(long=long), gpu.device)
    function.compute(torch.ones(2, 2))
    there = function.compute(torch.ones(2, 2, device=gpu.device))
    assert there.is_cuda
    assert torch.equal(there.cpu(), torch.full((2, 2), 2.0))
    for size, pinned in ((1, False), (MB, True), (8 * MB, False)):
        x = torch.arange(float(size))
        answer = function.compute(x)
        assert answer.is_pinned() is (pinned and long)
        assert torch.equal(answer, 2 * x)
    assert function.compute(torch.ones(0, 4)).shape == (0, 4)
    assert function.compute(torch.tensor(3.0)).item() == 6.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_rows_are_joined_in_pinned_memory(gpu: RealGpu, dtype: torch.dtype) -> None:
    codec = TensorCodec(dtype)
    width = MB // dtype.itemsize
    tensors = [torch.arange(rows * width).reshape(rows, width).to(dtype) for rows in (1, 3, 2)]
    parts = [codec.unpack(*codec.encode(tensor)) for tensor in tensors]
    whole = joined(parts, pinned=True)
    assert whole.is_pinned()
    assert torch.equal(whole, torch.cat(tensors))
    assert joined(parts[:1], pinned=True).is_pinned()
    views = [Packed(memoryview(bytearray(part.data)), part.shape, part.dtype) for part in parts]
    assert torch.equal(joined(views, pinned=True), torch.cat(tensors))
    small = codec.unpack(*codec.encode(tensors[0][:, :4]))
    assert not joined([small, small], pinned=True).is_pinned()
    flags = TensorCodec(torch.bool)
    packed = flags.unpack(*flags.encode(torch.tensor([True, False])))
    assert joined([packed], pinned=True).tolist() == [True, False]


def sometimes_long(module: nn.Module, given: object, output: torch.Tensor) -> None:
    if output.is_cuda and len(output) > 4:
        torch.cuda._sleep(LONG_CYCLES // 4)


def test_callers_at_the_same_time_get_their_own_numbers(gpu: RealGpu) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512)).double()
    layers.register_forward_hook(sometimes_long)
    functions = [ModelComputeFunction(copy.deepcopy(layers), gpu.device) for _ in range(2)]

    def work(number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        for turn in range(40):
            x = torch.randn(1 + turn % 7, 512, generator=draw)
            with torch.inference_mode():
                expected = layers(x.double())
            answer = functions[turn % 2].compute(x)
            torch.testing.assert_close(answer, expected, rtol=1e-9, atol=1e-9)

    at_once(8, work)


class Wide(nn.Module):
    """Takes 512 MB while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.sum() * torch.ones(64 * MB, device=x.device)
        for _ in range(10):
            wide.mul_(1.0)
        torch.cuda._sleep(LONG_CYCLES)
        return x * self.scale + (wide.sum() - wide.sum())


def test_forwards_of_one_model_take_the_memory_of_one(gpu: RealGpu) -> None:
    function = ModelComputeFunction(Wide(), gpu.device)
    expected = function.compute(torch.ones(4, 4))
    before = gpu.torch_mb
    gpu.forget_peak()

    def work(_: int) -> None:
        for _ in range(5):
            function.compute(torch.ones(4, 4))

    at_once(6, work)
    assert gpu.torch_peak_mb - before <= 512 + 64
    assert torch.equal(function.compute(torch.ones(4, 4)), expected)


class Scaled(nn.Module):
    """Answers its input times one number, which is held many times."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2 * MB))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_no_forward_sees_half_a_step(gpu: RealGpu) -> None:
    module = Scaled()
    function = ModelComputeFunction(module, gpu.device)
    x = torch.ones(2 * MB)
    done = threading.Event()

    def work(number: int) -> None:
        if number == 0:
            for step in range(60):
                function.forward_for_training(x, f"forward-{step}")
                grad = function.backward(f"forward-{step}", torch.ones(2 * MB), 0.5)
                # d(x * s) / dx is s as it was in the forward.
                assert bool((grad == 1 - 0.5 * step).all())
            done.set()
            return
        while not done.is_set():
            answer = function.compute(x)
            assert bool((answer == answer[0]).all())
            assert (2 * (1 - answer[0].item())).is_integer()

    at_once(5, work)
    assert module.scale[0].item() == 1 - 0.5 * 60
