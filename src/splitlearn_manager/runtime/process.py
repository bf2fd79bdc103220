"""Runs each model in a worker process of its own: what crashes there is one model, and nothing else.

The node's threads call the worker as they would call the model, through shared memory. A worker that ends by
itself fails the requests inside it, and its instance; a model that hangs is ended where a request's deadline
has long passed. Unloading ends the process, so its memory is back at once.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TypeVar

import torch

from splitlearn_comm.core.compute_function import ComputeFunction, KeyValues, invoke, on_cpu
from splitlearn_comm.core.deadlines import deadline_s
from splitlearn_comm.core.errors import ComputeFailed, DeadlinePassed, Overloaded
from splitlearn_comm.core.packed import Output, Packed, Rows, joined, strung
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.errors import LoadError, LoadTimeout, ModelUnavailable, WorkerDied
from splitlearn_manager.runtime.base import (
    Activations,
    ComputesRows,
    ComputesSequences,
    Joining,
)
from splitlearn_manager.runtime.channel import Closed, DescriptorsLost, Message
from splitlearn_manager.runtime.forward_message import can_be_told
from splitlearn_manager.runtime.lent_weights import LentWeights
from splitlearn_manager.runtime.sequences import answers
from splitlearn_manager.runtime.thread import TRAINED
from splitlearn_manager.runtime.worker_connection import Connection
from splitlearn_manager.runtime.worker_errors import raised_in
from splitlearn_manager.runtime.workers import Worker, WorkerStarter

T = TypeVar("T")

_GIVEN_UP_AFTER_S = 1.0
"""So long after load_timeout_s the worker of a load is ended: the manager has given it up by then."""

_HANGS_AFTER_S = 1.0
_HANGS_AFTER_TIMES = 5.0
"""A forward hangs that takes so much longer than its caller waits: at least so many seconds, and so many
times what the longest one has taken that was answered."""


class ProcessRuntime:
    """Starts models in processes of their own.

    Args:
        cache_dir: where code that is compiled for models is kept.
    """

    def __init__(
        self, starter: WorkerStarter | None = None, *, cache_dir: Path | None = None
    ) -> None:
        self._starter = starter or WorkerStarter()
        self._cache_dir = cache_dir
        self._lent = LentWeights()
        self._serial = itertools.count(1)

    def start(self, config: ModelConfig, device: str) -> RunningInProcess:
        """Load the model on `device` in a new worker, and warm it up there.

        Raises:
            LoadError: or one of its subclasses, as in a thread; WorkerDied if the process ended meanwhile,
                LoadTimeout if it had to be ended. Nothing of the model is left.
        """
        number = next(self._serial)
        worker = self._starter.start(config.model_id, _imports(config))
        try:
            with self._lent.offer() as (lenders, descriptors):
                asked = (config, device, torch.get_num_threads(), self._cache_dir)
                answer, kept = _load(worker, asked, lenders, descriptors)
                self._lent.loaded(number, answer, kept)
        except BaseException:
            worker.close()
            self._lent.gone(number)
            raise
        notes = (*answer["notes"], self._note(worker))
        return RunningInProcess(worker, config, answer, notes, lambda: self._lent.gone(number))

    def _note(self, worker: Worker) -> str:
        how = "" if self._starter.forks else ", started anew because this system cannot fork it"
        return f"runs in a process of its own, pid {worker.pid}{how}"


def _imports(config: ModelConfig) -> tuple[str, ...]:
    """What the fork server imports once, for all workers that need it."""
    transformers = ("transformers",) if config.model_type == "huggingface" else ()
    compiles = config.optimize in ("compile", "auto")
    return (*transformers, "torch._inductor.compile_fx") if compiles else transformers


def _load(
    worker: Worker,
    asked: tuple[ModelConfig, str, int, Path | None],
    lenders: Sequence[object],
    descriptors: Sequence[int],
) -> tuple[Message, list[int]]:
    config = asked[0]
    model_id, pickled = config.model_id, pickle.dumps(asked)
    try:
        with worker.connection() as connection:
            connection.call(
                {"op": "load", "lenders": lenders},
                (torch.frombuffer(bytearray(pickled), dtype=torch.uint8),),
                descriptors=descriptors,
            )
            answer, _, kept = connection.answer(config.load_timeout_s + _GIVEN_UP_AFTER_S)
    except TimeoutError:
        raise LoadTimeout(
            f"model {model_id!r} was not loaded within load_timeout_s = {config.load_timeout_s:g} s; "
            "its worker process has been ended"
        ) from None
    except DescriptorsLost as lost:
        raise LoadError(
            f"model {model_id!r}: its weights cannot be kept for others: {lost}"
        ) from None
    except Closed:
        why = worker.why_ended() or "it has closed its connection"
        raise WorkerDied(
            f"model {model_id!r}: its worker process died while it loaded: {why}"
        ) from None
    if (error := answer.get("error")) is not None:
        raise raised_in(model_id, error, loading=True)
    return answer, kept


class RunningInProcess:
    """A model in a worker process, until `close`."""

    def __init__(
        self,
        worker: Worker,
        config: ModelConfig,
        answer: Message,
        notes: tuple[str, ...],
        release: Callable[[], None],
    ) -> None:
        self._worker = worker
        self._function = InWorker(worker, config.model_id)
        self._model_id = config.model_id
        self._release = release
        self._lock = threading.Lock()
        self._closed = False
        self._notes = notes
        self.memory_mb = float(answer["weights_mb"])
        self.warmed = bool(answer["warmed"])
        self.overlaps = True
        self.joins = self.joins_lengths = False

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts for people, a sentence each: those of the load, and what has happened since."""
        return (*self._notes, TRAINED) if self._function.trained else self._notes

    @property
    def compute_function(self) -> ComputeFunction:
        """What answers requests.

        Raises:
            ModelUnavailable: after `close`.
        """
        if self._closed:
            raise ModelUnavailable("the model has been unloaded")
        return self._function

    def example(self) -> torch.Tensor | None:
        """An input of the shape that it answered in warm-up; None if there was none."""
        return next(iter(self._function.ask({"op": "example"})[1]), None)

    def find_joining(self) -> Joining:
        """Have the worker run a few forwards to find out whether requests may be joined."""
        found = self._function.ask({"op": "joining"})[0]
        return Joining(
            bool(found["joins"]), str(found["note"]), bool(found["lasts"]), bool(found["lengths"])
        )

    def join(self, joining: Joining) -> None:
        """Take over what was found."""
        self.joins = self._function.takes_turns = joining.joins
        self.joins_lengths = joining.lengths
        self._notes = (*self._notes, joining.note)

    def measure_activations(self) -> Activations | None:
        """Have the worker run two forwards to measure what one takes beside the weights."""
        lines = self._function.ask({"op": "activations"})[0]["lines"]
        return None if lines is None else Activations(tuple((a, b) for a, b in lines))

    def when_ended(self, tell: Callable[[LoadError], None]) -> None:
        """Have `tell` called once if the worker ends by itself; at once if it has."""
        model_id = self._model_id
        self._worker.when_ended(
            lambda why: tell(WorkerDied(f"model {model_id!r}: its worker process died: {why}"))
        )

    def close(self) -> None:
        """End the worker and wait until its memory is back; a second call does nothing."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._worker.close()
            self._release()


class InWorker(ComputeFunction, ComputesRows, ComputesSequences):
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
        self._waits_until_s: dict[object, float] = {}
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
        message = {
            "op": "compute",
            "past": past_key_values is not None,
            "use_cache": use_cache,
            "turn": self.takes_turns,
        }
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

    def compute_rows(self, parts: Sequence[Packed]) -> Output:
        """As `ComputesRows.compute_rows`: the requests' bytes are copied once, to where the worker reads."""
        first, pieces = parts[0], [part.data for part in parts]
        rows = first.rows if len(parts) == 1 else sum(part.rows for part in parts)
        shape = (rows, *first.shape[1:]) if first.shape else ()
        # Other bytes than 0 and 1 are no bools yet.
        if first.dtype is torch.bool or not can_be_told(first.dtype, shape) or not any(pieces):
            return Output(on_cpu(invoke(self, joined(parts)).output))
        _, answered = self._called(
            lambda connection, timeout_s: connection.forward(
                pieces, first.dtype, shape, turn=self.takes_turns, timeout_s=timeout_s
            )
        )
        return Output(answered[0])

    def compute_sequences(self, parts: Sequence[Packed]) -> Sequence[Rows]:
        """As `ComputesSequences.compute_sequences`."""
        shapes = [part.shape for part in parts]
        message = {
            "op": "compute_sequences",
            "shapes": [list(shape) for shape in shapes],
            "turn": self.takes_turns,
        }
        answer, (output,) = self.ask(message, (strung(parts),))
        return answers(Output(output), shapes, of_tokens=bool(answer["of_tokens"]))

    def ask(
        self, message: Message, tensors: Sequence[torch.Tensor] = ()
    ) -> tuple[Message, list[torch.Tensor]]:
        """Call the worker and wait for its answer.

        Raises:
            ComputeError: as the model's own function would; ComputeFailed (reason `WorkerDied`) if the
                process ends meanwhile, DeadlinePassed if it had to be ended for it, Overloaded if this
                process has not the means to ask.
        """

        def ask(
            connection: Connection, timeout_s: float | None
        ) -> tuple[Message, list[torch.Tensor]]:
            connection.call(message, tensors)
            return connection.answer(timeout_s)[:2]

        return self._called(ask)

    def _called(
        self, ask: Callable[[Connection, float | None], tuple[Message, T]]
    ) -> tuple[Message, T]:
        begun_s, call = monotonic(), object()
        patience_s = self._patience_s(begun_s)
        self._waits_until_s[call] = 0.0 if patience_s is None else begun_s + patience_s
        try:
            with self._worker.connection() as connection:
                answer, results = ask(connection, patience_s)
        except TimeoutError:
            if self._waits_for_its_turn(call):
                raise DeadlinePassed(
                    f"model {self._model_id!r} was busy with another request until long past the deadline"
                ) from None
            self._worker.kill(
                "a request was not answered for long after its deadline, and it was ended"
            )
            raise DeadlinePassed(
                f"model {self._model_id!r} has not answered for {monotonic() - begun_s:.1f} s, long past "
                "the caller's deadline: its worker process has been ended",
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
            del self._waits_until_s[call]
        if (error := answer.get("error")) is not None:
            raise raised_in(self._model_id, error, loading=False)
        self._longest_s = max(self._longest_s, monotonic() - begun_s)
        return answer, results

    def _waits_for_its_turn(self, call: object) -> bool:
        """Whether one that was there before runs within its own deadline: then it is not this one that hangs.

        A call without a deadline is no reason to wait: it would be one for ever.
        """
        if not self.takes_turns:
            return False
        calls = list(self._waits_until_s.items())
        before = itertools.takewhile(lambda one: one[0] is not call, calls)
        return any(until_s > monotonic() for _, until_s in before)

    def _patience_s(self, now_s: float) -> float | None:
        until_s = deadline_s()
        if until_s is None:
            return None
        grace_s = max(_HANGS_AFTER_S, _HANGS_AFTER_TIMES * self._longest_s)
        return max(0.0, until_s - now_s) + grace_s
