"""Kept forwards, real gradients and steps that nobody sees half done."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from splitlearn_comm.core import ComputeFailed, InvalidRequest, ModelComputeFunction, UnknownTarget


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))


def copy_of(original: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(original).eval()


class Time:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_backward_returns_the_gradient_of_local_autograd() -> None:
    served = model()
    local = copy_of(served)
    function = ModelComputeFunction(served)
    x, grad = torch.randn(2, 4), torch.randn(2, 3)
    output = function.forward_for_training(x, "a")
    leaf = x.clone().requires_grad_()
    expected = local(leaf)
    expected.backward(grad)
    assert torch.equal(output, expected)
    assert torch.equal(function.backward("a", grad), leaf.grad)
    assert not output.requires_grad


def test_input_shape_and_output_shape_may_differ() -> None:
    function = ModelComputeFunction(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
    function.forward_for_training(torch.randn(5, 3, 4), "a")
    assert function.backward("a", torch.randn(5, 2)).shape == (5, 3, 4)


def test_model_that_works_in_place_on_its_input_can_be_trained() -> None:
    function = ModelComputeFunction(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)))
    x = torch.tensor([[-1.0, 2.0, -3.0, 4.0]])
    function.forward_for_training(x, "a")
    grad = function.backward("a", torch.ones(1, 2))
    assert grad[0, 0] == grad[0, 2] == 0
    assert x.tolist() == [[-1.0, 2.0, -3.0, 4.0]]


def test_forward_is_used_once() -> None:
    function = ModelComputeFunction(model())
    function.forward_for_training(torch.randn(2, 4), "a")
    function.backward("a", torch.randn(2, 3))
    with pytest.raises(UnknownTarget, match="'a'"):
        function.backward("a", torch.randn(2, 3))


def test_only_one_of_many_backwards_at_once_gets_the_forward() -> None:
    function = ModelComputeFunction(model())
    function.forward_for_training(torch.randn(2, 4), "a")
    grad, together = torch.randn(2, 3), threading.Barrier(8)

    def backward() -> bool:
        together.wait(60)
        try:
            function.backward("a", grad)
        except UnknownTarget:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        got = [pool.submit(backward) for _ in range(8)]
        assert sum(done.result(60) for done in got) == 1


def test_gradient_of_the_wrong_shape_is_refused_and_leaves_the_forward() -> None:
    function = ModelComputeFunction(model())
    function.forward_for_training(torch.randn(2, 4), "a")
    with pytest.raises(InvalidRequest, match=r"\[2, 4\].*\[2, 3\]"):
        function.backward("a", torch.randn(2, 4))
    assert function.backward("a", torch.randn(2, 3)).shape == (2, 4)


def test_forward_id_that_is_kept_is_refused() -> None:
    function = ModelComputeFunction(model())
    function.forward_for_training(torch.randn(2, 4), "a")
    with pytest.raises(InvalidRequest, match="'a' is kept already"):
        function.forward_for_training(torch.randn(2, 4), "a")
    function.backward("a", torch.randn(2, 3))
    function.forward_for_training(torch.randn(2, 4), "a")


def test_expired_forward_is_dropped() -> None:
    time = Time()
    function = ModelComputeFunction(model(), graph_ttl_s=10, clock=time)
    function.forward_for_training(torch.randn(2, 4), "a")
    time.now_s = 9
    function.forward_for_training(torch.randn(2, 4), "b")
    time.now_s = 11
    with pytest.raises(UnknownTarget, match="older than 10 s"):
        function.backward("a", torch.randn(2, 3))
    function.backward("b", torch.randn(2, 3))


def test_inference_alone_also_drops_expired_forwards() -> None:
    time = Time()
    function = ModelComputeFunction(model(), graph_ttl_s=10, clock=time)
    function.forward_for_training(torch.randn(2, 4), "a")
    time.now_s = 11
    function.compute(torch.randn(2, 4))
    assert function.get_info()["kept_forwards"] == 0


def test_oldest_forward_makes_room() -> None:
    function = ModelComputeFunction(model(), max_graphs=2)
    for forward_id in "abc":
        function.forward_for_training(torch.randn(2, 4), forward_id)
    with pytest.raises(UnknownTarget):
        function.backward("a", torch.randn(2, 3))
    for forward_id in "bc":
        function.backward(forward_id, torch.randn(2, 3))


def test_teardown_drops_all_forwards() -> None:
    function = ModelComputeFunction(model())
    function.forward_for_training(torch.randn(2, 4), "a")
    function.teardown()
    with pytest.raises(UnknownTarget):
        function.backward("a", torch.randn(2, 3))


def test_integers_have_no_gradient() -> None:
    with pytest.raises(InvalidRequest, match=r"int64.*no gradient with respect to integers"):
        ModelComputeFunction(nn.Embedding(10, 4)).forward_for_training(torch.ones(1, 2), "a")


def test_output_that_cannot_be_differentiated_is_refused() -> None:
    class ArgMax(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.argmax(-1)

    with pytest.raises(InvalidRequest, match=r"int64.* cannot be differentiated"):
        ModelComputeFunction(ArgMax()).forward_for_training(torch.ones(1, 2), "a")


def test_training_forward_that_returns_no_tensor_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return x, x

    with pytest.raises(ComputeFailed, match="tuple"):
        ModelComputeFunction(Pair()).forward_for_training(torch.ones(1, 2), "a")


def test_output_independent_of_the_input_has_gradient_zero() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.value * 2

    function = ModelComputeFunction(Constant())
    function.forward_for_training(torch.ones(1, 4), "a")
    assert torch.equal(function.backward("a", torch.ones(3), learning_rate=0.5), torch.zeros(1, 4))
    assert function.compute(torch.ones(1, 4)).tolist() == [0.0, 0.0, 0.0]


def test_learning_rate_takes_the_step_of_sgd() -> None:
    served = model()
    local = copy_of(served)
    function = ModelComputeFunction(served)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    for step in range(3):
        x, grad = torch.randn(2, 4), torch.randn(2, 3)
        function.forward_for_training(x, str(step))
        function.backward(str(step), grad, learning_rate=0.1)
        optimizer.zero_grad()
        local(x).backward(grad)
        optimizer.step()
    for mine, theirs in zip(served.parameters(), local.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    x = torch.randn(2, 4)
    assert torch.allclose(function.compute(x), local(x), atol=1e-6)


def test_no_step_is_taken_without_learning_rate_and_no_grad_is_left() -> None:
    # Once in thousands of draws no hidden unit is on, and the first layer stays as it is.
    torch.manual_seed(0)
    served = model()
    before = copy_of(served).state_dict()
    function = ModelComputeFunction(served)
    function.forward_for_training(torch.randn(2, 4), "a")
    function.backward("a", torch.randn(2, 3))
    assert all(torch.equal(p, before[name]) for name, p in served.named_parameters())
    function.forward_for_training(torch.randn(2, 4), "b")
    function.backward("b", torch.randn(2, 3), learning_rate=0.1)
    assert not any(torch.equal(p, before[name]) for name, p in served.named_parameters())
    assert all(p.grad is None for p in served.parameters())


def test_micro_batches_get_gradients_for_the_weights_they_ran_with() -> None:
    served = model()
    local = copy_of(served)
    function = ModelComputeFunction(served)
    inputs, grads = torch.randn(2, 2, 4), torch.randn(2, 2, 3)
    for i in range(2):
        function.forward_for_training(inputs[i], str(i))
    got = [function.backward(str(i), grads[i], learning_rate=0.1) for i in range(2)]
    for i in range(2):
        leaf = inputs[i].clone().requires_grad_()
        local(leaf).backward(grads[i])
        assert torch.allclose(got[i], leaf.grad, atol=1e-6)
    # The gradients of both add up in .grad: the accumulated step is the sum of the single ones.
    for mine, theirs in zip(served.parameters(), local.parameters(), strict=True):
        assert torch.allclose(mine, theirs - 0.1 * theirs.grad, atol=1e-6)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4, bias=False)
            self.two = nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    served = Tied()
    local = copy_of(served)
    function = ModelComputeFunction(served)
    x, grad = torch.randn(2, 4), torch.randn(2, 4)
    function.forward_for_training(x, "a")
    function.backward("a", grad, learning_rate=0.1)
    local(x).backward(grad)
    assert served.one.weight is served.two.weight
    assert torch.allclose(
        served.one.weight, local.one.weight - 0.1 * local.one.weight.grad, atol=1e-6
    )


def test_frozen_parameters_stay_as_they_are() -> None:
    served = model()
    served[0].requires_grad_(False)
    frozen = served[0].weight
    function = ModelComputeFunction(served)
    function.forward_for_training(torch.randn(2, 4), "a")
    function.backward("a", torch.randn(2, 3), learning_rate=0.1)
    assert served[0].weight is frozen
    assert served[2].weight.requires_grad


def test_step_reaches_modules_that_keep_references_of_their_own() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 3, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0]

    served = Recurrent()
    function = ModelComputeFunction(served)
    x = torch.randn(2, 5, 4)
    before = function.compute(x)
    function.forward_for_training(x, "a")
    function.backward("a", torch.ones(2, 5, 3), learning_rate=0.5)
    after = function.compute(x)
    assert not torch.allclose(before, after)
    fresh = Recurrent()
    fresh.load_state_dict(served.state_dict())
    assert torch.allclose(after, fresh(x), atol=1e-6)


def test_scripted_model_is_trained_too() -> None:
    served = torch.jit.script(nn.Sequential(nn.Linear(4, 2)))
    function = ModelComputeFunction(served)
    x = torch.randn(1, 4)
    before = function.compute(x)
    function.forward_for_training(x, "a")
    function.backward("a", torch.ones(1, 2), learning_rate=1.0)
    assert torch.allclose(function.compute(x), before - (x.square().sum() + 1), atol=1e-5)


@pytest.mark.parametrize("rate", [math.nan, math.inf, -0.1])
def test_senseless_learning_rate_is_refused_and_leaves_the_forward(rate: float) -> None:
    function = ModelComputeFunction(model())
    function.forward_for_training(torch.randn(2, 4), "a")
    with pytest.raises(InvalidRequest, match="learning_rate"):
        function.backward("a", torch.randn(2, 3), learning_rate=rate)
    function.backward("a", torch.randn(2, 3))


def test_gradient_that_would_ruin_the_weights_is_refused() -> None:
    function = ModelComputeFunction(model())
    function.forward_for_training(torch.randn(2, 4), "a")
    grad = torch.randn(2, 3)
    grad[0, 0] = math.nan
    with pytest.raises(InvalidRequest, match="NaN or infinite"):
        function.backward("a", grad, learning_rate=0.1)
    assert function.compute(torch.randn(2, 4)).isfinite().all()
    assert function.backward("a", grad).isnan().any()


class Root(nn.Module):
    """Its slope at zero is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.factor).abs().sqrt()


@pytest.mark.parametrize(
    ("served", "gradient", "rate"),
    [
        (Root(), 1.0, 0.1),
        (nn.Linear(4, 4), 1e10, 1e38),
        # The gradient fits the wire's float32, and the weights' dtype only as infinity.
        (nn.Linear(4, 4).half(), 1e6, 0.1),
        (nn.Linear(4, 4).half(), 2.0, 6e4),
        (nn.Linear(4, 4).half(), 1.0, 1e6),
    ],
)
def test_step_that_would_ruin_the_weights_is_refused(
    served: nn.Module, gradient: float, rate: float
) -> None:
    before = copy_of(served).state_dict()
    function = ModelComputeFunction(served)
    function.forward_for_training(torch.ones(1, 4), "a")
    with pytest.raises(InvalidRequest, match="NaN or infinite"):
        function.backward("a", torch.full((1, 4), gradient), learning_rate=rate)
    assert all(torch.equal(p, before[name]) for name, p in served.named_parameters())


def test_weights_that_are_infinite_on_purpose_do_not_stop_training() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([0.0, -math.inf]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.bias).softmax(-1)

    function = ModelComputeFunction(Masked())
    function.forward_for_training(torch.ones(1, 2), "a")
    function.backward("a", torch.ones(1, 2), learning_rate=0.1)
    assert function.compute(torch.ones(1, 2)).tolist() == [[1.0, 0.0]]


class Product(nn.Module):
    """Two factors that every step changes together; between them, other threads get their chance."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1))
        self.second = nn.Parameter(torch.zeros(1))
        self.between = threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first
        self.between.wait(0.0005)
        return torch.stack([first, self.second]) + 0 * x.sum()


def test_concurrent_forwards_never_see_half_a_step() -> None:
    served = Product()
    function = ModelComputeFunction(served)
    steps, together = 60, threading.Barrier(4)

    def train() -> None:
        together.wait(60)
        for step in range(steps):
            forward_id = f"{threading.get_ident()}-{step}"
            function.forward_for_training(torch.zeros(1), forward_id)
            function.backward(forward_id, torch.ones(2, 1), learning_rate=1.0)

    def watch() -> list[list[float]]:
        together.wait(60)
        return [function.compute(torch.zeros(1)).flatten().tolist() for _ in range(steps)]

    with ThreadPoolExecutor(4) as pool:
        training = [pool.submit(train) for _ in range(2)]
        watching = [pool.submit(watch) for _ in range(2)]
        for done in training:
            done.result(120)
        seen = [values for done in watching for values in done.result(120)]
    assert all(first == second for first, second in seen)
    # No step was lost either: each takes one off both.
    assert served.first.item() == served.second.item() == -2 * steps
