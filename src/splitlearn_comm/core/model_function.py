"""Serves an `nn.Module`: inference, inference with a key/value cache, and training.

The module is put on its device in eval mode and stays in it, for training forwards too: switching to train
mode would be visible to every other request that runs at the same time.

Forwards run side by side under the read side of a lock; only the moment in which a step puts new
Parameters in place (see `splitlearn_comm.core.training`) takes the write side, so no forward ever sees some
of a step. Steps themselves run one at a time.

On a GPU, forwards that take long run one at a time, so that no more memory is taken than for one; copies to
and from it, and other modules, run beside it (`splitlearn_comm.core.lanes`).

Another callable may stand in for the module where inference asks for no cache (`stand_in`): a compiled
form of it, say. It is one of certain weights, so the first step that is applied ends it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import ParamSpec

import torch
from torch import nn

from splitlearn_comm.core.codec import dtype_name
from splitlearn_comm.core.compute_function import (
    Computed,
    ComputeFunction,
    KeyValues,
    as_computed,
    call_form,
)
from splitlearn_comm.core.errors import ComputeFailed, InvalidRequest
from splitlearn_comm.core.lanes import Lane, finish, lane_to
from splitlearn_comm.core.locks import ReadWriteLock
from splitlearn_comm.core.model_input import input_rule
from splitlearn_comm.core.training import GraphStore, KeptForward, ParameterSlots, gradients

_LONG_S = 0.002
"""A forward on a GPU that takes so long has a stream of its own, and its turn. For shorter ones that costs
more than it gains: half of the calls a second of four threads, where one takes 0.2 ms."""
_ANY_TIME = nullcontext()

P = ParamSpec("P")
StandIn = Callable[[torch.Tensor], object]
"""Takes the converted input, and returns what the module would."""
Forward = Callable[[torch.Tensor], torch.Tensor]


class ModelComputeFunction(ComputeFunction):
    """An `nn.Module` as a compute function.

    If the module's `forward` takes both `past_key_values` and `use_cache`, it is a model with a cache:
    it gets both by keyword, and with `use_cache=True` it returns `(output, present_key_values)`.

    Args:
        model: put on `device` and into eval mode.
        device: as for `torch.device`.
        model_name: for `get_info`; the module's class unless given.
        input_dtype: what requests are converted to; found out from the model unless given, see
            `splitlearn_comm.core.model_input.input_rule`.
        input_shape: the shape that requests must fit, -1 marking a free dimension. A shape without
            a free dimension is an example and checks nothing.
        max_graphs: training forwards that are kept at most; beyond it the oldest is dropped.
        graph_ttl_s: age at which a kept training forward is dropped.
        clock: gives the time in seconds, for `graph_ttl_s`.
    """

    def __init__(
        self,
        model: nn.Module,
        device: str | torch.device = "cpu",
        model_name: str | None = None,
        *,
        input_dtype: torch.dtype | None = None,
        input_shape: Sequence[int] | None = None,
        max_graphs: int = 64,
        graph_ttl_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device = torch.device(device)
        self.model = _in_eval_mode(model.to(self.device))
        finish(self.device)
        self._on_gpu = self.device.type == "cuda"
        self._turn = threading.Lock()
        self.model_name = model_name or type(model).__name__
        free = input_shape is not None and -1 in input_shape
        self._rule = input_rule(model, input_dtype, input_shape if free else None)
        form = call_form(model.forward)
        self._has_cache = {"past_key_values", "use_cache"} <= form.names
        self._graphs = GraphStore(max_graphs, graph_ttl_s, clock)
        self._weights = ReadWriteLock()
        self._step = threading.Lock()
        self._slots: ParameterSlots | None = None
        self._stand_in: StandIn | None = None
        self._trained_past_it = False

    @property
    def has_cache(self) -> bool:
        """Whether the model takes and gives a key/value cache."""
        return self._has_cache

    @property
    def vocabulary(self) -> int | None:
        """Integers of its input lie in [0, vocabulary); None where that is not known."""
        return self._rule.vocabulary

    @property
    def has_stand_in(self) -> bool:
        """Whether something else answers in the module's place."""
        return self._stand_in is not None

    @property
    def trained_past_stand_in(self) -> bool:
        """Whether a step has ended what stood in for the module."""
        return self._trained_past_it

    def stand_in(self, forward: StandIn | None) -> None:
        """Have `forward` answer inference without a cache, in the module's place; None: the module itself.

        It is called in inference mode with the converted input. Training, and calls with a cache, are
        the module's own. The first step that is applied to the module's weights drops `forward`.
        """
        finish(self.device)
        self._stand_in = forward

    @property
    def computes_in(self) -> torch.dtype | None:
        """What stands in for the module says so, if it computes in another dtype than the weights'."""
        dtype = getattr(self._stand_in, "computes_in", None)
        return dtype if isinstance(dtype, torch.dtype) else None

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype that requests are converted to before the model sees them."""
        return self._rule.dtype

    def compute(
        self,
        input_tensor: torch.Tensor,
        past_key_values: KeyValues | None = None,
        use_cache: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, KeyValues]:
        """Run the model without autograd.

        Args:
            input_tensor: any dtype that can be converted to the model's. What is on the processor is
                answered there, and what is on the model's GPU on that.
            past_key_values: only for a model with a cache.
            use_cache: ask for the new cache; a model without one answers with the output alone.

        Raises:
            InvalidRequest: if the input, or the cache, is none that this model takes.
            ComputeFailed: if the model does not return a tensor.
        """
        self._graphs.drop_expired()
        if past_key_values is not None and not self._has_cache:
            raise InvalidRequest(
                f"past_key_values were sent, but model {self.model_name!r} takes none"
            )
        long = self.overlaps
        with torch.inference_mode(), lane_to(self.device, input_tensor, long=long) as lane:
            prepared = self._rule.convert(input_tensor, lane)
            past = None if past_key_values is None else self._sent(past_key_values, lane)
            output, present = self._run(lane, long, self._inferred, prepared, past, use_cache)
            if present is None:
                return output
            return output, tuple((lane.fetch(k), lane.fetch(v)) for k, v in present)

    def compute_by(self, forward: Forward, values: torch.Tensor) -> torch.Tensor:
        """Run `forward`, which is another way through the module itself, without autograd.

        Args:
            forward: takes the converted values, on the model's device, and returns a tensor there.
            values: of any shape; as `input_tensor` of `compute` otherwise.

        Raises:
            InvalidRequest: if a value cannot be one of the model's integers.
        """
        self._graphs.drop_expired()
        long = self.overlaps
        with torch.inference_mode(), lane_to(self.device, values, long=long) as lane:
            prepared = self._rule.convert_values(values, lane)
            return self._run(lane, long, _answered, forward, prepared)[0]

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises InvalidRequest if an input of that shape is none that the model takes."""
        self._rule.check_shape(shape)

    def _run(
        self,
        lane: Lane,
        long: bool,
        forward: Callable[P, Computed],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> tuple[torch.Tensor, KeyValues | None]:
        """Run a forward when it is its turn; the output is fetched, the cache is not.

        What it is given is not in a closure: an error that is kept would keep that, and the model with it.
        """
        output: torch.Tensor | None = None
        with self._turn if long else _ANY_TIME, self._weights.read():
            # A thread is busy while it waits for a short forward, and is not while it waits for the GIL.
            clock = time.monotonic if long else time.thread_time
            began_s = clock()
            try:
                computed = forward(*arguments, **named)
                given, present = computed.output.detach(), computed.present
                # From here on only the model may still hold the tensor that it returned.
                del computed
                given = _of_its_own(given)
                if not long:
                    output = lane.fetch(given)
            finally:
                # Whoever comes next may replace the weights.
                lane.wait()
            if self._on_gpu:
                # What is near the limit does not go to and fro.
                self.overlaps = clock() - began_s > (_LONG_S / 2 if long else _LONG_S)
        if output is None:
            output = lane.fetch(given)
        return output, present

    def forward_for_training(self, input_tensor: torch.Tensor, forward_id: str) -> torch.Tensor:
        """Run the model and keep the autograd graph for one `backward`.

        Raises:
            InvalidRequest: if the input does not fit, the model takes integers (which have no gradient),
                its output cannot be differentiated, or `forward_id` is kept already.
            ComputeFailed: if the model does not return a tensor.
        """
        self._graphs.check_free(forward_id)
        if self._rule.takes_integers:
            raise InvalidRequest(
                f"model {self.model_name!r} takes {dtype_name(self._rule.dtype)}, and there is no "
                "gradient with respect to integers: training_mode needs a model with float inputs"
            )
        with torch.enable_grad(), lane_to(self.device, input_tensor) as lane:
            leaf = self._rule.convert(input_tensor, lane).detach().requires_grad_()
            with self._weights.read():
                parameters = self._parameter_slots().current()
                try:
                    # A copy, because a model whose first layer works in place may not write into a leaf.
                    output = self._forward(leaf.clone(), None, False).output
                finally:
                    lane.wait()
            if not output.requires_grad:
                raise InvalidRequest(
                    f"the output of model {self.model_name!r} ({dtype_name(output.dtype)}) cannot be "
                    "differentiated, so it has no backward"
                )
            self._graphs.keep(forward_id, leaf, output, parameters)
            return lane.fetch(output.detach())

    def backward(
        self, forward_id: str, grad_output: torch.Tensor, learning_rate: float | None = None
    ) -> torch.Tensor:
        """Return d loss / d input of a kept forward, which is forgotten.

        With `learning_rate`, also p ← p - learning_rate · d loss / d p for every Parameter that the output
        depends on. The gradient is that of the weights the forward ran with; it is applied to the weights
        as they are now.

        Raises:
            InvalidRequest: if `grad_output` has not the output's shape, or `learning_rate` (or, with it,
                the gradient) is not finite. The forward stays kept. It does not where the step would make
                weights NaN or infinite, which is known only after it; that step is not taken.
            UnknownTarget: if no forward is kept under `forward_id`.
        """
        _check_step(grad_output, learning_rate)

        def fits(kept: KeptForward) -> None:
            if grad_output.shape != kept.output.shape:
                raise InvalidRequest(
                    f"grad_output has shape {list(grad_output.shape)}; the output of forward "
                    f"{forward_id!r} has {list(kept.output.shape)}"
                )

        kept = self._graphs.take(forward_id, fits)
        with lane_to(kept.output.device, grad_output) as lane:
            grad = lane.send(grad_output, kept.output.dtype)
            found = gradients(kept, grad, with_parameters=learning_rate is not None)
            if learning_rate is not None:
                self._step_by(found.grad_parameters, learning_rate, lane)
            return lane.fetch(found.grad_input)

    def _step_by(
        self, grads: Sequence[torch.Tensor | None], learning_rate: float, lane: Lane
    ) -> None:
        slots = self._parameter_slots()
        with self._step:
            stepped = slots.stepped(grads, learning_rate)
            lane.wait()
            with self._weights.write():
                slots.replace(stepped)
                if self._stand_in is not None:
                    self._stand_in, self._trained_past_it = None, True

    def get_info(self) -> Mapping[str, object]:
        """Return name, device, parameter count, input dtype and what the model can do."""
        info: dict[str, object] = {
            "name": self.model_name,
            "device": str(self.device),
            "model_class": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "input_dtype": dtype_name(self._rule.dtype),
            "key_value_cache": self._has_cache,
            "kept_forwards": len(self._graphs),
        }
        if self._rule.vocabulary is not None:
            info["vocabulary"] = self._rule.vocabulary
        if self._rule.shape is not None:
            info["input_shape"] = list(self._rule.shape)
        return info

    def teardown(self) -> None:
        """Drop all kept forwards, and what stands in for the module."""
        self._graphs.clear()
        self._stand_in = None

    def _inferred(
        self, prepared: torch.Tensor, past: KeyValues | None, use_cache: bool
    ) -> Computed:
        wants_cache = past is not None or (use_cache and self._has_cache)
        if self._stand_in is not None and not wants_cache:
            return as_computed(self._stand_in(prepared), keep_present=False)
        return self._forward(prepared, past, use_cache)

    def _forward(self, prepared: torch.Tensor, past: KeyValues | None, use_cache: bool) -> Computed:
        if self._has_cache:
            returned = self.model(prepared, past_key_values=past, use_cache=use_cache)
            return as_computed(returned, keep_present=use_cache)
        returned = self.model(prepared)
        if not isinstance(returned, torch.Tensor):
            raise ComputeFailed(
                f"model {self.model_name!r} returned a {type(returned).__name__}; expected a tensor"
            )
        return Computed(returned)

    def _sent(self, past_key_values: KeyValues, lane: Lane) -> KeyValues:
        # The cache is the model's own, so it comes back in the dtype of the model's floating-point weights.
        floats = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        dtype = next(floats, torch.float32)
        return tuple(
            (lane.send(key, dtype), lane.send(value, dtype)) for key, value in past_key_values
        )

    def _parameter_slots(self) -> ParameterSlots:
        # Made on first use: most models never train, and finding the slots walks the whole module.
        if self._slots is None:
            self._slots = ParameterSlots(self.model)
        return self._slots


def _answered(forward: Forward, values: torch.Tensor) -> Computed:
    return Computed(forward(values))


def _in_eval_mode(model: nn.Module) -> nn.Module:
    try:
        return model.eval()
    except NotImplementedError:
        # The module of an exported program: its mode was fixed when it was exported.
        return model


def _of_its_own(output: torch.Tensor) -> torch.Tensor:
    """A processor's tensor in memory that nobody else knows; a copy, if the model has kept that memory.

    It is read while the model answers others already, and some models write each answer to the same place.

    Args:
        output: a tensor of ours, beside which only the model may have others of the same memory.
    """
    if not output.is_cpu or output.layout is not torch.strided:
        return output
    storage = output.untyped_storage()
    # Two of its users are ours: the tensor, and what stands for its memory here. What cannot be resized is
    # not torch's own: a NumPy array, say, of whose users torch knows nothing.
    users = torch._C._storage_Use_Count(storage._cdata)
    return output.clone() if users > 2 or not storage.resizable() else output


def _check_step(grad_output: torch.Tensor, learning_rate: float | None) -> None:
    if learning_rate is None:
        return
    if not math.isfinite(learning_rate) or learning_rate < 0:
        raise InvalidRequest(f"learning_rate: expected a finite number ≥ 0, got {learning_rate}")
    if not bool(grad_output.isfinite().all()):
        # Every later request of every caller would be answered with NaN.
        raise InvalidRequest(
            "grad_output has NaN or infinite values, and learning_rate asks to add them to the weights"
        )
