"""What runs in a worker process: one model, and threads that answer for it (`worker.connections`).

The control socket brings new connections; when it ends, so does the worker, whatever its threads are doing.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Sequence
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
from splitlearn_manager.runtime.sequences import SequenceFunction
from splitlearn_manager.runtime.system_memory import keep_for_the_next_batch
from splitlearn_manager.runtime.thread import TRAINED, RunningInThreads, ThreadRuntime
from splitlearn_manager.runtime.worker_errors import as_message
from splitlearn_manager.worker.connections import Answer, Connections, show
from splitlearn_manager.worker.lending import Borrowed, Lent


def work(control: socket.socket) -> None:
    """Answer until the node, or its interest in this worker, is gone."""
    keep_for_the_next_batch()
    channel, connections = Channel(control), Connections(Worker().answer)
    while True:
        try:
            _, descriptors = channel.receive()
        except Closed:
            # Threads that compute are not waited for: nobody hears of it any more.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        for descriptor in descriptors:
            connections.serve(Channel(socket.socket(fileno=descriptor)))


class Worker:
    """The model of this process, once it is loaded."""

    def __init__(self) -> None:
        self._config: ModelConfig | None = None
        self._running: RunningInThreads | None = None
        self._function: ComputeFunction | None = None
        self._lent: Lent | None = None

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
                show(error)
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


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu")


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | list | None) else str(value)
