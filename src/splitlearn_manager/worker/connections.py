"""The node's connections to a worker, and the threads that answer them.

Each connection is a socket, an area of shared memory, and a thread of its own that waits for its messages.
Forwards that take turns are all run by one thread, from whichever connection they come: the next one, where
it is there already, begins without a thread being woken for it, and on the same processor.

    connection ─► its thread ─► a forward in its turn? ─no─► answers it
                                        └─yes─► the thread of the turns, which has the connection from then on
"""

from __future__ import annotations

import os
import select
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from time import perf_counter

import torch

from splitlearn_manager.runtime.channel import Channel, Closed, Message
from splitlearn_manager.runtime.forward_message import ForwardMessage, can_be_told, read, written
from splitlearn_manager.runtime.shared_area import Area, bytes_for
from splitlearn_manager.runtime.worker_errors import as_message

_AT_ONCE: Message = {"op": "compute", "past": False, "use_cache": False, "turn": False}
_IN_TURN: Message = {**_AT_ONCE, "turn": True}

_SOON_S = 0.0006
"""A single caller's next request is here by then. No request wastes more of a processor than that."""

Asked = tuple[Message, list[torch.Tensor], list[int]]
Answer = tuple[Message, Sequence[torch.Tensor], Sequence[int]]
Answers = Callable[[Message, Sequence[torch.Tensor], list[int]], Answer]


class Connection:
    """One of the node's, and the memory that it has in common with whoever answers it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._area: Area | None = None
        self._brief: ForwardMessage | None = None
        self._expected: tuple[bytes, ForwardMessage, torch.Tensor] | None = None

    def fileno(self) -> int:
        """For `select`."""
        return self._channel.fileno()

    @property
    def has_message(self) -> bool:
        """Whether a call has been read already: no `select` tells of it."""
        return self._channel.has_message

    def answer(self, asked: Asked, answers: Answers) -> None:
        """Answer a call. Raises Closed."""
        message, tensors, descriptors = asked
        answer, results, lent = answers(message, tensors, descriptors)
        tensors.clear()
        self.send(answer, [*results], lent)

    def close(self) -> None:
        """Whoever waits for an answer hears of it, and waits no longer."""
        self._channel.close()

    def receive(self) -> Asked:
        """The next call: its tensors lie in the area, which is theirs while any is kept. Raises Closed."""
        message, descriptors = self._channel.receive_any()
        expected, self._expected = self._expected, None
        if isinstance(message, bytes):
            if expected is not None and expected[0] == message:
                _, told, tensor = expected
            else:
                told = read(message)
                area = self._take_over(descriptors) if told.brings_area else self._area
                assert area is not None
                tensor = area.part(told.dtype, told.shape)
            self._brief = told
            return _IN_TURN if told.turn else _AT_ONCE, [tensor], []
        self._brief = None
        area = self._take_over(descriptors) if message["area"] else self._area
        tensors = [area.tensor(place) for place in message["tensors"]] if area is not None else []
        return message, tensors, descriptors

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
            show(error)
            self._channel.send({"error": as_message(error)})
            return
        self._area = area
        self._channel.send(reply, (area.descriptor, *lent) if brought else lent)
        if brought:
            area.close()
        if self._brief is not None:
            # What the next call is most likely to be is made ready while nobody waits for it.
            told = replace(self._brief, brings_area=False)
            with suppress(ValueError):
                tensor = area.part(told.dtype, told.shape)
                self._expected = told.written(), told, tensor

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
            if self._brief and results and can_be_told(results[0].dtype, results[0].shape):
                first, shape = results[0], tuple(results[0].shape)
                area.put(first)
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


def show(error: BaseException) -> None:
    """Its traceback on stderr, if the model has left us one."""
    with suppress(Exception):
        traceback.print_exception(error)
        sys.stderr.flush()


def takes_turn(asked: Asked) -> bool:
    """Whether a call is a forward that runs when no other one does."""
    return bool(asked[0].get("turn"))


def end(connection: Connection, why: BaseException) -> None:
    """Whoever waits for an answer hears that there is none."""
    if not isinstance(why, Closed):
        show(why)
    connection.close()


class Connections:
    """Answers the node's connections, each until it is closed.

    Args:
        answers: what a call is answered with. Raises nothing.
    """

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._turns = _Turns(answers, self._serve_aside)

    def serve(self, channel: Channel) -> None:
        """Answer one on a thread of its own."""
        self._serve_aside(Connection(channel), None)

    def _serve_aside(self, connection: Connection, asked: Asked | None) -> None:
        threading.Thread(target=self._serve, args=(connection, asked), daemon=True).start()

    def _serve(self, connection: Connection, asked: Asked | None) -> None:
        watch = Watch()
        watch.add(connection)
        try:
            asked = asked or watch.received(connection)
            while not takes_turn(asked):
                connection.answer(asked, self._answers)
                asked = watch.received(connection)
        except BaseException as error:
            end(connection, error)
        else:
            self._turns.take(connection, asked)


class _Turns:
    """The thread that runs the forwards that take turns: the first one that is given a connection.

    Args:
        give_back: has another thread answer a connection, from a call on that takes no turn.
    """

    def __init__(
        self, answers: Answers, give_back: Callable[[Connection, Asked | None], None]
    ) -> None:
        self._answers = answers
        self._give_back = give_back
        self._lock = threading.Lock()
        self._new: list[tuple[Connection, Asked]] = []
        self._runs = False
        self._served: dict[int, Connection] = {}
        self._watch = Watch()
        self._woken, self._waker = os.pipe()
        self._watch.add(self._woken)

    def take(self, connection: Connection, asked: Asked) -> None:
        """Answer a connection from now on. Does not return on the first thread that calls it."""
        with self._lock:
            self._new.append((connection, asked))
            runs, self._runs = self._runs, True
        if runs:
            os.write(self._waker, b"x")
        else:
            self._run()

    def _run(self) -> None:
        while True:
            with self._lock:
                new, self._new = self._new, []
            for connection, asked in new:
                self._served[connection.fileno()] = connection
                self._watch.add(connection)
                self._attend(connection, asked)
            del new
            for descriptor in self._watch.wait():
                if descriptor == self._woken:
                    os.read(self._woken, 64)
                else:
                    self._attend(self._served[descriptor])

    def _attend(self, connection: Connection, asked: Asked | None = None) -> None:
        """Answer what has come."""
        try:
            while True:
                asked = asked or connection.receive()
                if not takes_turn(asked):
                    self._leave(connection)
                    self._give_back(connection, asked)
                    return
                connection.answer(asked, self._answers)
                asked = None
                if not connection.has_message:
                    return
        except BaseException as error:
            self._leave(connection)
            end(connection, error)

    def _leave(self, connection: Connection) -> None:
        if self._served.pop(connection.fileno(), None) is not None:
            self._watch.remove(connection)


class Watch:
    """Waits for whichever of some files has something to read.

    Where the last time it had so soon, as with a single caller, this looks again and again for a while
    before it sleeps, and lets others go first: to wake a process takes a virtual machine 0.05 to 0.07 ms.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._soon = False

    def add(self, file: Connection | int) -> None:
        self._poll.register(file, select.POLLIN)

    def remove(self, file: Connection) -> None:
        self._poll.unregister(file)

    def received(self, connection: Connection) -> Asked:
        """The next call of the only one. Raises Closed."""
        if not connection.has_message:
            self.wait()
        return connection.receive()

    def wait(self) -> list[int]:
        """Their descriptors, of those that have been closed by the other side too."""
        began_s = perf_counter()
        found: list[tuple[int, int]] = []
        if self._soon:
            while not (found := self._poll.poll(0)) and perf_counter() < began_s + _SOON_S:
                _let_others_go_first()
        found = found or self._poll.poll()
        self._soon = perf_counter() - began_s <= _SOON_S
        return [descriptor for descriptor, _ in found]


_let_others_go_first = getattr(os, "sched_yield", lambda: None)
