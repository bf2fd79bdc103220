"""What the servicer does with a request, apart from the network: deadlines, targets, refusals."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import grpc
import pytest
import torch
from torch import nn

from splitlearn_comm.core import (
    CompressedTensorCodec,
    ComputeFailed,
    ComputeFunction,
    DeadlinePassed,
    InvalidRequest,
    ModelComputeFunction,
    NotReady,
    Overloaded,
    TensorCodec,
    UnknownTarget,
    Unsupported,
)
from splitlearn_comm.protocol import compute_pb2
from splitlearn_comm.server import ComputeServicer, Health, LoadSnapshot
from support.comm_backend import FakeNode, Open
from support.comm_models import Doubler, Raising, RaisingInTraining


class Aborted(Exception):
    pass


class FakeContext:
    """What the servicer uses of gRPC's context."""

    def __init__(self, remaining_s: float | None = None, active: bool = True) -> None:
        # gRPC gives a time that is years away where there is no deadline.
        self.remaining_s = 1e9 if remaining_s is None else remaining_s
        self.active = active
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.callbacks: list[Callable[[], None]] = []

    def time_remaining(self) -> float:
        return self.remaining_s

    def is_active(self) -> bool:
        return self.active

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.callbacks.append(callback)
        return self.active

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.code, self.details = code, details
        raise Aborted


class StillMonitor:
    def __init__(self) -> None:
        self.ages: list[float] = []

    def snapshot(self, max_age_s: float = 0.0) -> LoadSnapshot:
        self.ages.append(max_age_s)
        return LoadSnapshot(time.time(), 1.0, 2.0, 3.0)


def request(values: list[float] | None = None, **fields: object) -> compute_pb2.ComputeRequest:
    data, shape = TensorCodec().encode(torch.tensor([1.0] if values is None else values))
    return compute_pb2.ComputeRequest(data=data, shape=shape, **fields)


def backward(forward_id: str, size: int = 2, **fields: object) -> compute_pb2.BackwardRequest:
    data, shape = TensorCodec().encode(torch.ones(1, size))
    return compute_pb2.BackwardRequest(
        grad_output_data=data, grad_output_shape=shape, forward_id=forward_id, **fields
    )


def servicer(node: FakeNode) -> ComputeServicer:
    return ComputeServicer(node, StillMonitor())


def refused(node: FakeNode, message: object, context: FakeContext | None = None) -> FakeContext:
    context = context or FakeContext()
    rpc = "ComputeBackward" if isinstance(message, compute_pb2.BackwardRequest) else "Compute"
    with pytest.raises(Aborted):
        getattr(servicer(node), rpc)(message, context)
    return context


def computed(
    service: ComputeServicer, message: compute_pb2.ComputeRequest
) -> compute_pb2.ComputeResponse:
    return compute_pb2.ComputeResponse.FromString(service.Compute(message, FakeContext()))


def trainable(scale: float) -> ModelComputeFunction:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2) * scale)
    return ModelComputeFunction(model)


def train(service: ComputeServicer, **fields: object) -> compute_pb2.ComputeResponse:
    data, shape = TensorCodec().encode(torch.ones(1, 2))
    message = compute_pb2.ComputeRequest(data=data, shape=shape, training_mode=True, **fields)
    return computed(service, message)


def grad_of(response: compute_pb2.BackwardResponse) -> list[list[float]]:
    return TensorCodec().decode(response.grad_input_data, response.grad_input_shape).tolist()


@pytest.mark.parametrize(
    "context",
    [FakeContext(remaining_s=0.0), FakeContext(active=False)],
    ids=["deadline passed", "caller gone"],
)
@pytest.mark.parametrize("message", [request(), backward("a")], ids=["forward", "backward"])
def test_nothing_is_computed_for_nobody(context: FakeContext, message: object) -> None:
    model = Doubler()
    node = FakeNode({"m": model})
    refused(node, message, context)
    assert context.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert model.calls == 0
    assert node.opens == []


def test_deadline_that_passes_while_the_model_loads_saves_the_work() -> None:
    model = Doubler()
    node = FakeNode({"m": model})
    context = FakeContext(remaining_s=5.0)

    def load() -> None:
        context.remaining_s = 0.0

    node.on_open = load
    refused(node, request(), context)
    assert context.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert model.calls == 0
    assert node.held == 0


def test_backend_is_told_the_deadline_if_there_is_one() -> None:
    node = FakeNode({"m": Doubler()})
    servicer(node).Compute(request(), FakeContext(remaining_s=5.0))
    servicer(node).Compute(request(), FakeContext())
    assert [opened.remaining_s for opened in node.opens] == [5.0, None]


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (InvalidRequest("i"), grpc.StatusCode.INVALID_ARGUMENT),
        (UnknownTarget("u"), grpc.StatusCode.NOT_FOUND),
        (NotReady("n"), grpc.StatusCode.UNAVAILABLE),
        (Overloaded("o"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (DeadlinePassed("d"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (Unsupported("s"), grpc.StatusCode.UNIMPLEMENTED),
    ],
)
def test_refusal_of_the_backend_is_the_callers_status(
    refusal: Exception, code: grpc.StatusCode
) -> None:
    node = FakeNode({})
    node.refusal = refusal
    context = refused(node, request(model_id="m"))
    assert (context.code, context.details) == (code, str(refusal))
    assert node.observed == [("m", code.name)]


def test_backend_that_fails_is_an_internal_error() -> None:
    node = FakeNode({})
    node.refusal = ZeroDivisionError("oops")
    context = refused(node, request(model_id="m"))
    assert context.code is grpc.StatusCode.INTERNAL
    assert context.details == "model 'm' raised ZeroDivisionError: oops"
    assert refused(node, request()).details == "the server raised ZeroDivisionError: oops"


def test_failure_names_the_model_that_was_chosen() -> None:
    node = FakeNode({"chosen": Raising(ComputeFailed("worker died"))})
    context = refused(node, request())
    assert context.details == "model 'chosen' raised ComputeFailed: worker died"
    node = FakeNode({"chosen": Raising(ComputeFailed("worker of 'chosen' died"))})
    assert refused(node, request()).details == "worker of 'chosen' died"


@pytest.mark.parametrize("rpc", ["forward", "training", "backward"])
def test_no_memory_for_a_batch_is_overload_and_told_with_its_size(rpc: str) -> None:
    function = RaisingInTraining(torch.OutOfMemoryError("CUDA out of memory"))
    node = FakeNode({"m": function})
    if rpc == "backward":
        message: object = backward("f", 3, model_id="m")
    else:
        message = request([1.0, 2.0], training_mode=rpc == "training")
    context = refused(node, message)
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    batch, shape = (1, "[1, 3]") if rpc == "backward" else (2, "[2]")
    assert context.details == (
        f"model 'm' ran out of memory on a batch of {batch} (shape {shape}): OutOfMemoryError: CUDA out "
        "of memory"
    )
    assert node.held == 0


@pytest.mark.parametrize("error", [ValueError("bad\nTraceback: secret"), SystemExit(3)])
def test_what_the_model_raises_is_logged_whole_and_answered_in_one_line(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    node = FakeNode({"m": Raising(error)})
    with caplog.at_level(logging.ERROR):
        context = refused(node, request())
    assert context.code is grpc.StatusCode.INTERNAL
    assert context.details.startswith(f"model 'm' raised {type(error).__name__}: ")
    assert "secret" not in context.details
    assert "Traceback" not in context.details
    (record,) = caplog.records
    assert "model_id=m" in record.message
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert node.held == 0


def test_callers_mistakes_are_not_logged_as_errors(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        refused(FakeNode({"m": Doubler()}), compute_pb2.ComputeRequest(data=b"123", shape=[1]))
    assert caplog.records == []


@pytest.mark.parametrize(
    "message",
    [
        compute_pb2.ComputeRequest(data=b"", shape=[-1]),
        compute_pb2.ComputeRequest(data=b"", shape=[1] * 65),
        compute_pb2.BackwardRequest(forward_id="a", grad_output_shape=[-1]),
        compute_pb2.BackwardRequest(),
    ],
    ids=["negative", "dimensions", "gradient", "no forward_id"],
)
def test_impossible_request_is_refused_before_a_model_is_opened(message: object) -> None:
    node = FakeNode({"m": Doubler()})
    assert refused(node, message).code is grpc.StatusCode.INVALID_ARGUMENT
    assert node.opens == []


def test_every_request_is_counted_and_observed_once() -> None:
    node = FakeNode({"m": Doubler(), "bad": Raising(ValueError())})
    service = servicer(node)
    service.Compute(request(model_id="m"), FakeContext())
    for message in (request(model_id="bad"), request(model_id="gone")):
        with pytest.raises(Aborted):
            service.Compute(message, FakeContext())
    with pytest.raises(Aborted):
        service.ComputeBackward(backward("a", model_id="m"), FakeContext())
    service.HealthCheck(compute_pb2.HealthRequest(), FakeContext())
    assert node.observed == [
        ("m", "OK"),
        ("bad", "INTERNAL"),
        ("gone", "NOT_FOUND"),
        ("m", "UNIMPLEMENTED"),
    ]
    info = service.GetServiceInfo(compute_pb2.ServiceInfoRequest(), FakeContext())
    assert info.total_requests == 4
    assert (info.service_name, info.version, info.device) == ("node", "9.9", "cpu")
    assert info.custom_info["models"] == "m,bad"
    assert "dtype:int8" in info.custom_info["extensions"].split()


def test_health_says_what_the_backend_says() -> None:
    node = FakeNode({})
    node.status = Health("starting", "no model is ready")
    health = servicer(node).HealthCheck(compute_pb2.HealthRequest(), FakeContext())
    assert (health.status, health.message, health.version) == (
        "starting",
        "no model is ready",
        "9.9",
    )
    assert health.HasField("uptime_seconds")


class TestBackwardFindsItsForward:
    def test_without_a_model_id(self) -> None:
        node = FakeNode({"a": trainable(2), "b": trainable(3)})
        service = servicer(node)
        first, second = train(service).forward_id, train(service).forward_id
        assert first != second
        answers = [
            grad_of(service.ComputeBackward(backward(forward_id), FakeContext()))
            for forward_id in (second, first)
        ]
        assert answers == [[[3.0, 3.0]], [[2.0, 2.0]]]
        assert [o for o in node.opens if o.forward_id] == [
            Open("b", second, None),
            Open("a", first, None),
        ]

    def test_behind_an_endpoint_that_has_moved_on(self) -> None:
        node = FakeNode({"a": trainable(2), "b": trainable(3)}, endpoints={"shared": "a"})
        service = servicer(node)
        forward_id = train(service, model_id="shared").forward_id
        node.endpoints["shared"] = "b"
        message = backward(forward_id, model_id="shared")
        assert grad_of(service.ComputeBackward(message, FakeContext())) == [[2.0, 2.0]]

    def test_by_the_name_of_the_model_itself(self) -> None:
        node = FakeNode({"a": trainable(2), "b": trainable(3)})
        service = servicer(node)
        forward_id = train(service).forward_id
        message = backward(forward_id, model_id="a")
        assert grad_of(service.ComputeBackward(message, FakeContext())) == [[2.0, 2.0]]

    def test_with_one_forward_id_on_two_models(self) -> None:
        node = FakeNode({"a": trainable(2), "b": trainable(3)})
        service = servicer(node)
        for model_id in ("a", "b"):
            assert train(service, model_id=model_id, forward_id="same").forward_id == "same"
        for model_id, scale in (("a", 2.0), ("b", 3.0)):
            message = backward("same", model_id=model_id)
            assert grad_of(service.ComputeBackward(message, FakeContext())) == [[scale, scale]]

    def test_and_is_not_found_a_second_time(self) -> None:
        node = FakeNode({"a": trainable(2)})
        service = servicer(node)
        forward_id = train(service).forward_id
        service.ComputeBackward(backward(forward_id), FakeContext())
        context = FakeContext()
        with pytest.raises(Aborted):
            service.ComputeBackward(backward(forward_id), context)
        assert context.code is grpc.StatusCode.NOT_FOUND
        assert forward_id in context.details

    def test_and_keeps_it_after_a_gradient_of_the_wrong_shape(self) -> None:
        node = FakeNode({"a": trainable(2), "b": trainable(3)})
        service = servicer(node)
        forward_id = train(service).forward_id
        context = FakeContext()
        with pytest.raises(Aborted):
            service.ComputeBackward(backward(forward_id, size=3), context)
        assert context.code is grpc.StatusCode.INVALID_ARGUMENT
        assert grad_of(service.ComputeBackward(backward(forward_id), FakeContext())) == [[2.0, 2.0]]


def test_forward_id_that_is_kept_is_the_callers_mistake() -> None:
    service = servicer(FakeNode({"a": trainable(2)}))
    train(service, forward_id="x")
    context = FakeContext()
    data, shape = TensorCodec().encode(torch.ones(1, 2))
    with pytest.raises(Aborted):
        service.Compute(
            compute_pb2.ComputeRequest(data=data, shape=shape, training_mode=True, forward_id="x"),
            context,
        )
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT


def test_cache_and_training_do_not_go_together() -> None:
    message = request(training_mode=True)
    data, shape = TensorCodec().encode(torch.ones(1))
    message.past_key_values.add(key_data=data, key_shape=shape, value_data=data, value_shape=shape)
    context = refused(FakeNode({"a": trainable(2)}), message)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT


class TestAnnouncedDtype:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize(
        "codec", [TensorCodec(), CompressedTensorCodec()], ids=["plain", "zlib"]
    )
    def test_is_used_both_ways(self, dtype: torch.dtype, codec: TensorCodec) -> None:
        node = FakeNode({"m": Doubler()}, {"m": codec})
        announced = codec.with_dtype(dtype)
        data, shape = announced.encode(torch.tensor([1.5, 2.5]))
        message = compute_pb2.ComputeRequest(data=data, shape=shape)
        message.metadata["dtype"] = str(dtype).removeprefix("torch.")
        response = computed(servicer(node), message)
        answer = announced.decode(response.data, response.shape)
        assert answer.dtype is dtype
        assert answer.tolist() == [3.0, 5.0]

    @pytest.mark.parametrize("name", ["float8", "int64", "", "torch.float16", "complex64"])
    def test_unknown_one_is_refused(self, name: str) -> None:
        message = request()
        message.metadata["dtype"] = name
        context = refused(FakeNode({"m": Doubler()}), message)
        assert context.code is grpc.StatusCode.INVALID_ARGUMENT
        assert repr(name) in context.details
        assert "bfloat16" in context.details

    def test_other_metadata_changes_nothing(self) -> None:
        message = request([2.0])
        message.metadata["trace"] = "float16"
        response = computed(servicer(FakeNode({"m": Doubler()})), message)
        assert TensorCodec().decode(response.data, response.shape).tolist() == [4.0]


def test_models_codec_is_used_for_all_of_its_tensors() -> None:
    class Echo(ComputeFunction):
        def compute(self, input_tensor, past_key_values=None, use_cache=False):
            return input_tensor, past_key_values

    codec = CompressedTensorCodec(dtype=torch.float16)
    data, shape = codec.encode(torch.tensor([1.0, 2.0]))
    message = compute_pb2.ComputeRequest(data=data, shape=shape, use_cache=True)
    message.past_key_values.add(key_data=data, key_shape=shape, value_data=data, value_shape=shape)
    response = computed(servicer(FakeNode({"m": Echo()}, {"m": codec})), message)
    (entry,) = response.present_key_values
    for got, got_shape in (
        (response.data, response.shape),
        (entry.key_data, entry.key_shape),
        (entry.value_data, entry.value_shape),
    ):
        assert codec.decode(got, got_shape).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("asked_s", "kept_s"),
    [
        (None, 1.0),
        (0.0, 0.1),
        (0.1, 0.1),
        (2.5, 2.5),
        (60.0, 5.0),
        (-1.0, 0.1),
        (float("nan"), 1.0),
    ],
)
def test_sampling_interval_is_kept_within_bounds(asked_s: float | None, kept_s: float) -> None:
    from splitlearn_comm.server.messages import interval_s

    message = compute_pb2.MonitoringStreamRequest()
    if asked_s is not None:
        message.sampling_interval = asked_s
    assert interval_s(message) == kept_s


def test_stream_for_nobody_sends_nothing() -> None:
    stream = servicer(FakeNode({})).StreamMonitoring(
        compute_pb2.MonitoringStreamRequest(), FakeContext(active=False)
    )
    assert list(stream) == []


def test_stream_measures_afresh_and_a_busy_server_does_not_for_each_request() -> None:
    monitor = StillMonitor()
    service = ComputeServicer(FakeNode({"m": Doubler()}), monitor)
    service.Compute(request(), FakeContext())
    context = FakeContext()
    stream = service.StreamMonitoring(compute_pb2.MonitoringStreamRequest(), context)
    next(stream)
    context.callbacks[0]()
    assert list(stream) == []
    assert monitor.ages == [1.0, 0.0]
