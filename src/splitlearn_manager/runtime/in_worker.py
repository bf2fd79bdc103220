"""The model of a worker process, as a compute function of the node's.

A call is sent when it is begun, and whoever takes its answer may be another thread:

    begin ─► connection ─► [worker] ─► readable ─► take: the answer, if nothing has to be waited for
                                               └─► finish: the answer or the error, whatever it takes
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

import torch

from splitlearn_comm.core.compute_function import ComputeFunction, KeyValues
from splitlearn_comm.core.deadlines import deadline_s
from splitlearn_comm.core.errors import ComputeFailed, DeadlinePassed, Overloaded
from splitlearn_comm.core.packed import Output, Packed, Rows, joined, strung
from splitlearn_manager.runtime.base import BeginsForwards, Begun
from splitlearn_manager.runtime.channel import Closed, DescriptorsLost, Message
from splitlearn_manager.runtime.forward_message import can_be_told
from splitlearn_manager.runtime.sequences import answers
from splitlearn_manager.runtime.worker_connection import Connection
from splitlearn_manager.runtime.worker_errors import raised_in
from splitlearn_manager.runtime.workers import Worker

T = TypeVar("T")
Results = Sequence[torch.Tensor | Packed]
Answer = Output | Sequence[Rows]
Send = Callable[[Connection], None]

_HANGS_AFTER_S = 1.0
_HANGS_AFTER_TIMES = 5.0
"""A forward hangs that takes so much longer than its caller waits: at least so many seconds, and so many
times what the longest one has taken that was answered."""


class InWorker(ComputeFunction, BeginsForwards):
    """The model of a worker, as a compute function: the same arguments, answers and errors.

    `trained` tells whether a step has ended what stood in for the module there. With `takes_turns`, one
    forward runs there at a time, and the next one, already sent, begins as it ends.

    Requests wait for their answers without a limit, unless their callers have a deadline: see
    `_HANGS_AFTER_S`.
    """

    def __init__(self, worker: Worker, model_id: str) -> None:
        self._worker = worker
        self._model_id = model_id
        self._longest_s = 0.0
        self._calls: dict[_Call, None] = {}
        self.trained = False
        self.takes_turns = False

    def compute(
        self,
        input_tensor: torch.Tensor,
        past_key_values: KeyValues | None = None,
        use_cache: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, KeyValues]:
        """As `ModelComputeFunction.compute`."""
        tensors = [input_tensor]
        for key, value in past_key_values or ():
            tensors += (key, value)
        message = self._compute_message(past=past_key_values is not None, use_cache=use_cache)
        answer, results = self.ask(message, tensors)
        output, *present = results
        if not answer["present"]:
            return output
        return output, tuple(zip(present[::2], present[1::2], strict=True))

    def forward_for_training(self, input_tensor: torch.Tensor, forward_id: str) -> torch.Tensor:
        """As `ModelComputeFunction.forward_for_training`; the graph is kept in the worker."""
        message = {"op": "forward_for_training", "forward_id": forward_id}
        return self.ask(message, (input_tensor,))[1][0]

    def backward(
        self, forward_id: str, grad_output: torch.Tensor, learning_rate: float | None = None
    ) -> torch.Tensor:
        """As `ModelComputeFunction.backward`."""
        message = {"op": "backward", "forward_id": forward_id, "learning_rate": learning_rate}
        answer, (grad_input,) = self.ask(message, (grad_output,))
        self.trained = self.trained or bool(answer["trained"])
        return grad_input

    def get_info(self) -> Mapping[str, object]:
        """As `ModelComputeFunction.get_info`."""
        return dict(self.ask({"op": "info"})[0]["info"])

    def begin(self, parts: Sequence[Packed]) -> Begun:
        """As `BeginsForwards.begin`: the requests' bytes are copied once, to where the worker reads."""
        first, pieces = parts[0], [part.data for part in parts]
        if any(part.shape[1:] != first.shape[1:] for part in parts):
            return self._begin_sequences(parts)
        rows = first.rows if len(parts) == 1 else sum(part.rows for part in parts)
        shape = (rows, *first.shape[1:]) if first.shape else ()
        # Other bytes than 0 and 1 are no bools yet.
        if first.dtype is torch.bool or not can_be_told(first.dtype, shape) or not any(pieces):
            tensor, message = joined(parts), self._compute_message()
            return self._forward(lambda c: c.call(message, (tensor,)), _output)
        turn = self.takes_turns
        return self._forward(lambda c: c.forward(pieces, first.dtype, shape, turn=turn), _output)

    def _begin_sequences(self, parts: Sequence[Packed]) -> Begun:
        shapes = [part.shape for part in parts]
        message = {
            "op": "compute_sequences",
            "shapes": [list(shape) for shape in shapes],
            "turn": self.takes_turns,
        }

        def to_each(answer: Message, results: Results) -> Sequence[Rows]:
            return answers(_output(answer, results), shapes, of_tokens=bool(answer["of_tokens"]))

        return self._forward(lambda c: c.call(message, (strung(parts),)), to_each)

    def _forward(self, send: Send, told: Callable[[Message, Results], Answer]) -> Begun:
        call = self._call(send)

        def finish() -> Answer:
            return told(*self._answer(call, Connection.forward_answer))

        return _Forward(call, finish)

    def ask(
        self, message: Message, tensors: Sequence[torch.Tensor] = ()
    ) -> tuple[Message, list[torch.Tensor]]:
        """Call the worker and wait for its answer.

        Raises:
            ComputeError: as the model's own function would; ComputeFailed (reason `WorkerDied`) if the
                process ends meanwhile, DeadlinePassed if it had to be ended for it, Overloaded if this
                process has not the means to ask.
        """

        call = self._call(lambda connection: connection.call(message, tensors))
        return self._answer(call, lambda connection, left_s: connection.answer(left_s)[:2])

    def _compute_message(self, *, past: bool = False, use_cache: bool = False) -> Message:
        return {"op": "compute", "past": past, "use_cache": use_cache, "turn": self.takes_turns}

    def _call(self, send: Send) -> _Call:
        """Send a call; `_answer` has to be asked for what comes of it, or why it could not be sent."""
        call = _Call(monotonic(), self._patience_s())
        self._calls[call] = None
        try:
            call.connection = self._worker.lend()
            send(call.connection)
        except BaseException as error:
            call.lost = error
        return call

    def _answer(
        self, call: _Call, receive: Callable[[Connection, float | None], tuple[Message, T]]
    ) -> tuple[Message, T]:
        """Wait for what comes of a call. Raises as `ask` does."""
        connection, usable = call.connection, False
        try:
            if call.lost is not None or connection is None:
                raise call.lost or Closed
            answer, results = receive(connection, call.left_s())
            usable = True
        except TimeoutError:
            if self._waits_for_its_turn(call):
                raise DeadlinePassed(
                    f"model {self._model_id!r} was busy with another request until long past the deadline"
                ) from None
            self._worker.kill(
                "a request was not answered for long after its deadline, and it was ended"
            )
            raise DeadlinePassed(
                f"model {self._model_id!r} has not answered for {monotonic() - call.begun_s:.1f} s, long "
                "past the caller's deadline: its worker process has been ended",
                "ForwardHangs",
            ) from None
        except (DescriptorsLost, OSError) as lacking:
            # This process has not the means; the worker is well.
            raise Overloaded(
                f"model {self._model_id!r}: the node cannot ask its worker process, or take the answer: "
                f"{lacking}"
            ) from None
        except Closed:
            if not (why := self._worker.why_ended()):
                # It has not the means to go on (descriptors, say), and would answer nobody any more.
                why = "it has closed a connection without an answer, and was ended"
                self._worker.kill(why)
            raise ComputeFailed(
                f"model {self._model_id!r}: its worker process died while it computed: {why}",
                "WorkerDied",
            ) from None
        except ValueError as garbled:
            # What such a process says next would be taken for the answer to something else.
            self._worker.kill("it has sent what is no answer, and was ended")
            raise ComputeFailed(
                f"model {self._model_id!r}: its worker process has sent what is no answer, and has been "
                f"ended: {garbled}",
                "WorkerDied",
            ) from None
        finally:
            del self._calls[call]
            if connection is not None:
                (self._worker.take_back if usable else self._worker.drop)(connection)
        if (error := answer.get("error")) is not None:
            raise raised_in(self._model_id, error, loading=False)
        self._longest_s = max(self._longest_s, monotonic() - call.begun_s)
        return answer, results

    def _waits_for_its_turn(self, call: _Call) -> bool:
        """Whether one that was there before runs within its own deadline: then it is not this one that hangs.

        A call without a deadline is no reason to wait: it would be one for ever.
        """
        if not self.takes_turns:
            return False
        before = itertools.takewhile(lambda one: one is not call, list(self._calls))
        return any((one.left_s() or 0.0) > 0 for one in before)

    def _patience_s(self) -> float | None:
        until_s = deadline_s()
        if until_s is None:
            return None
        grace_s = max(_HANGS_AFTER_S, _HANGS_AFTER_TIMES * self._longest_s)
        return max(0.0, until_s - monotonic()) + grace_s


@dataclass(slots=True, eq=False)
class _Call:
    """A call until its answer has been taken.

    Attributes:
        begun_s: when.
        patience_s: for so long its answer is waited for; None for ever.
        connection: lent for it.
        lost: why it was not sent, or has no answer.
    """

    begun_s: float
    patience_s: float | None
    connection: Connection | None = None
    lost: BaseException | None = None

    def left_s(self) -> float | None:
        """How much longer its answer is waited for."""
        if self.patience_s is None:
            return None
        return max(0.0, self.begun_s + self.patience_s - monotonic())


class _Forward(Begun):
    """See `BeginsForwards.begin`."""

    def __init__(self, call: _Call, finish: Callable[[], Answer]) -> None:
        self._call = call
        self._finish = finish

    def fileno(self) -> int | None:
        """As `Begun.fileno`."""
        call = self._call
        return (
            None if call.lost is not None or call.connection is None else call.connection.fileno()
        )

    def take(self) -> Answer | None:
        """As `Begun.take`."""
        call = self._call
        try:
            if call.lost is not None or call.connection is None:
                return None
            if not call.connection.has_plain_answer():
                return None
        except BaseException as error:
            call.lost = error
            return None
        return self.finish()

    def finish(self) -> Answer:
        """As `Begun.finish`."""
        return self._finish()


def _output(_: Message, results: Results) -> Output:
    return Output(results[0])
