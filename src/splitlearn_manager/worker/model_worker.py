"""What runs in a worker process: one model, and threads that answer for it.

Each connection is a socket, an area of shared memory, and a thread of its own here. A request is one message
on it and one answer, so that no thread of the node, and none here, ever hands a request to another. The
control socket brings new connections; when it ends, so does the worker, whatever its threads are doing.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from time import perf_counter
from typing import Any

import torch

from splitlearn_comm.core import ComputeFunction
from splitlearn_comm.core.compute_function import KeyValues, invoke
from splitlearn_comm.core.errors import ComputeError
from splitlearn_comm.core.out_of_memory import telling_out_of_memory
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.loaders.sharing import RESIDENT
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import SplitlearnError
from splitlearn_manager.runtime.channel import Channel, Closed, Message
from splitlearn_manager.runtime.forward_message import can_be_told, read, written
from splitlearn_manager.runtime.sequences import SequenceFunction
from splitlearn_manager.runtime.shared_area import Area, bytes_for
from splitlearn_manager.runtime.system_memory import keep_for_the_next_batch
from splitlearn_manager.runtime.thread import TRAINED, RunningInThreads, ThreadRuntime
from splitlearn_manager.runtime.worker_errors import as_message
from splitlearn_manager.worker.lending import Borrowed, Lent

_AT_ONCE: Message = {"op": "compute", "past": False, "use_cache": False, "turn": False}
_IN_TURN: Message = {**_AT_ONCE, "turn": True}

_SOON_S = 0.0006
"""A single caller's next request is here by then. No request wastes more of a processor than that."""

Answer = tuple[Message, Sequence[torch.Tensor], Sequence[int]]


def work(control: socket.socket) -> None:
    """Answer until the node, or its interest in this worker, is gone."""
    keep_for_the_next_batch()
    channel, worker = Channel(control), Worker()
    while True:
        try:
            _, descriptors = channel.receive()
        except Closed:
            # Threads that compute are not waited for: nobody hears of it any more.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        for descriptor in descriptors:
            connected = Channel(socket.socket(fileno=descriptor))
            threading.Thread(target=_serve, args=(connected, worker), daemon=True).start()


def _serve(channel: Channel, worker: Worker) -> None:
    connection = Connection(channel)
    try:
        while True:
            message, tensors, descriptors = connection.receive()
            answer, results, lent = worker.answer(message, tensors, descriptors)
            del tensors
            results = [*results]
            connection.send(answer, results, lent)
            del results
    except Closed:
        return
    finally:
        # Whatever has ended it: the caller hears of it, and waits no longer.
        channel.close()


class Connection:
    """A connection of the node's, and the memory that it has in common with this thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._area: Area | None = None
        self._briefly = False
        self._soon = False

    def receive(self) -> tuple[Message, list[torch.Tensor], list[int]]:
        """The next call: its tensors lie in the area, which is theirs while any is kept. Raises Closed."""
        message, descriptors = self._awaited()
        if isinstance(message, bytes):
            self._briefly, told = True, read(message)
            area = self._take_over(descriptors) if told.brings_area else self._area
            assert area is not None
            return _IN_TURN if told.turn else _AT_ONCE, [area.part(told.dtype, told.shape)], []
        self._briefly = False
        area = self._take_over(descriptors) if message["area"] else self._area
        tensors = [area.tensor(place) for place in message["tensors"]] if area is not None else []
        return message, tensors, descriptors

    def _awaited(self) -> tuple[Message | bytes, list[int]]:
        """The next message. Where the last one came soon, as of a single caller, this looks for it."""
        began_s = perf_counter()
        if self._soon:
            self._channel.look_for_message(_SOON_S)
        awaited = self._channel.receive_any()
        self._soon = perf_counter() - began_s <= _SOON_S
        return awaited

    def send(self, answer: Message, results: list[torch.Tensor], lent: Sequence[int]) -> None:
        """The answer to the last call, in its form if that goes; an error if in none. Raises Closed.

        What of the call's tensors the model has kept stays as it is: then the next call finds another area.

        Args:
            results: nobody else has this list; those that lie in the area are replaced by copies.
        """
        if not results and not self._is_kept:
            self._channel.send(answer, lent)
            return
        try:
            area, brought, reply = self._written(answer, results)
        except Exception as error:
            # A tensor without memory (sparse, meta), or no memory for it: the caller waits for an answer.
            _show(error)
            self._channel.send({"error": as_message(error)})
            return
        self._area = area
        self._channel.send(reply, (area.descriptor, *lent) if brought else lent)
        if brought:
            area.close()

    def _written(
        self, answer: Message, results: list[torch.Tensor]
    ) -> tuple[Area, bool, Message | bytes]:
        """The area in which the results now lie, whether it is a new one, and the message that says so."""
        area, size = self._area, bytes_for(results)
        if area is not None:
            results[:] = [r.clone() if area.holds(r) else r for r in results]
        brought = area is None or size > area.size or self._is_kept
        if area is None or brought:
            area = Area.of_size(size)
        try:
            if self._briefly and results and can_be_told(results[0].dtype, results[0].shape):
                first, shape = results[0], tuple(results[0].shape)
                area.part(first.dtype, shape).copy_(first)
                return area, brought, written(first.dtype, shape, brings_area=brought)
            return area, brought, {**answer, "area": brought, "tensors": area.write(results)}
        except BaseException:
            if brought:
                area.close()
            raise

    @property
    def _is_kept(self) -> bool:
        return self._area is not None and self._area.is_used

    def _take_over(self, descriptors: list[int]) -> Area:
        if self._area is not None:
            self._area.close()
        self._area = Area(descriptors.pop(0))
        return self._area


class Worker:
    """The model of this process, once it is loaded."""

    def __init__(self) -> None:
        self._config: ModelConfig | None = None
        self._running: RunningInThreads | None = None
        self._function: ComputeFunction | None = None
        self._lent: Lent | None = None
        self._turn = threading.Lock()

    def answer(
        self, message: Message, tensors: Sequence[torch.Tensor], descriptors: list[int]
    ) -> Answer:
        """What `message` asks for; an error as a message, whatever the model raises."""
        try:
            do = getattr(self, f"_{message['op']}")
            found: Answer = do(message, tensors, descriptors)
            return found
        except BaseException as error:
            # BaseException, because a model that calls sys.exit() would otherwise leave its caller waiting.
            if not isinstance(error, ComputeError | SplitlearnError):
                _show(error)
            return {"error": as_message(error)}, (), ()

    def _load(
        self, message: Message, tensors: Sequence[torch.Tensor], descriptors: list[int]
    ) -> Answer:
        config, device, threads, cache_dir = pickle.loads(bytes(tensors[0].numpy()))
        torch.set_num_threads(threads)
        self._config = config
        borrowed = Borrowed(message["lenders"], descriptors)
        RESIDENT.ask_also(borrowed.alike)
        running = ThreadRuntime(ModelLoader(), cache_dir).start(config, device)
        self._running, self._function = running, running.compute_function
        self._lent = Lent(running.module, borrowed)
        answer: Message = {
            "weights_mb": running.memory_mb,
            "notes": list(running.notes),
            "warmed": running.warmed,
            "lent": self._lent.entries,
            "borrowed": borrowed.used_by(running.module),
        }
        borrowed.close()
        return answer, (), self._lent.descriptors

    def _example(self, *_: Any) -> Answer:
        example = self._running.example() if self._running is not None else None
        return {}, () if example is None else (example,), ()

    def _joining(self, *_: Any) -> Answer:
        assert self._running is not None, "asked before it was loaded"
        found = self._running.find_joining()
        told: Message = {
            "joins": found.joins,
            "note": found.note,
            "lasts": found.lasts,
            "lengths": found.lengths,
        }
        return told, (), ()

    def _activations(self, *_: Any) -> Answer:
        found = self._running.measure_activations() if self._running is not None else None
        return {"lines": None if found is None else [list(line) for line in found.lines]}, (), ()

    def _info(self, *_: Any) -> Answer:
        return {"info": {k: _plain(v) for k, v in self._asked().get_info().items()}}, (), ()

    def _compute(self, message: Message, tensors: Sequence[torch.Tensor], _: Any) -> Answer:
        function, input_tensor = self._asked(), tensors[0]
        past: KeyValues | None = None
        if message["past"]:
            past = tuple(zip(tensors[1::2], tensors[2::2], strict=True))
        with telling_out_of_memory(self._model_id, input_tensor.shape):
            with self._turn if message["turn"] else nullcontext():
                computed = invoke(function, input_tensor, past, message["use_cache"])
            present = computed.present
            results = [_on_cpu(computed.output)]
            for key, value in present or ():
                results += (_on_cpu(key), _on_cpu(value))
        return {"present": present is not None}, results, ()

    def _compute_sequences(
        self, message: Message, tensors: Sequence[torch.Tensor], _: Any
    ) -> Answer:
        function, shapes = self._asked(), message["shapes"]
        assert isinstance(function, SequenceFunction), "asked of a model that takes no sequences"
        with telling_out_of_memory(self._model_id, (sum(rows for rows, _ in shapes),)):
            with self._turn if message["turn"] else nullcontext():
                output = _on_cpu(function.in_one_row(tensors[0], shapes))
            return {"of_tokens": function.answers_tokens}, (output,), ()

    def _forward_for_training(
        self, message: Message, tensors: Sequence[torch.Tensor], _: Any
    ) -> Answer:
        with telling_out_of_memory(self._model_id, tensors[0].shape):
            # The graph keeps the input for longer than this request has the area.
            output = self._asked().forward_for_training(tensors[0].clone(), message["forward_id"])
            return {}, (_on_cpu(output),), ()

    def _backward(self, message: Message, tensors: Sequence[torch.Tensor], _: Any) -> Answer:
        with telling_out_of_memory(self._model_id, tensors[0].shape):
            grad_input = self._asked().backward(
                message["forward_id"], tensors[0].clone(), message["learning_rate"]
            )
            trained = self._running is not None and TRAINED in self._running.notes
            return {"trained": trained}, (_on_cpu(grad_input),), ()

    @property
    def _model_id(self) -> str:
        return self._config.model_id if self._config is not None else ""

    def _asked(self) -> ComputeFunction:
        assert self._function is not None, "asked before it was loaded"
        return self._function


def _show(error: BaseException) -> None:
    """Its traceback on stderr, if the model has left us one."""
    with suppress(Exception):
        traceback.print_exception(error)
        sys.stderr.flush()


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu")


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | list | None) else str(value)
