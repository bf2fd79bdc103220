"""Worker processes as the node sees them: how one is started, called, and ended.

    ForkServer ──start──► Worker ──connection──► call, answer
        │                   ▲
        └── "it has ended" ─┘

A call takes a connection that is free, or a new one, and waits on it for the answer itself. When the worker's
process has ended, all its calls end, and whoever asked to be told is told why, once.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from splitlearn_manager.errors import WorkerDied
from splitlearn_manager.logs import log_event
from splitlearn_manager.runtime.channel import Channel, Closed, Message, pair
from splitlearn_manager.runtime.worker_connection import Connection

log = logging.getLogger(__name__)

_STARTS_WITHIN_S = 120.0
"""The fork server imports torch first, which takes long on a busy machine."""

_ENDS_WITHIN_S = 10.0
_MOST_OF_A_LINE = 4000


class Worker:
    """One worker process.

    Attributes:
        pid: its process id.
    """

    def __init__(self, pid: int, control: Channel, kill: Callable[[int], None]) -> None:
        self.pid = pid
        self._control = control
        self._kill = kill
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._all: set[Connection] = set()
        self._free: list[Connection] = []
        self._ended = threading.Event()
        self._why = ""
        self._killed_for = ""
        self._tell: Callable[[str], None] | None = None
        self._closing = False

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """As `lend`, for the block; after an error it is not used again."""
        connection = self.lend()
        try:
            yield connection
        except BaseException:
            self.drop(connection)
            raise
        self.take_back(connection)

    def lend(self) -> Connection:
        """A connection for one call, to be given back or dropped. Raises Closed if it has ended."""
        with self._lock:
            if self._free:
                return self._free.pop()
        return self._connect()

    def take_back(self, connection: Connection) -> None:
        """It can be used again: its call has been answered."""
        with self._lock:
            if not self._closing:
                self._free.append(connection)
                return
        self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """It is not used again."""
        with self._lock:
            self._all.discard(connection)
        connection.close()

    def _connect(self) -> Connection:
        mine, other = pair()
        connection = Connection(mine)
        try:
            with other:
                with self._lock:
                    if self._closing or self._ended.is_set():
                        raise Closed
                    self._all.add(connection)
                # Under a lock of its own: a worker that stands still takes some hundred, and then none
                # before it is ended, which must not wait for this.
                with self._connecting:
                    self._control.send({"op": "connect"}, (other.fileno(),))
        except BaseException:
            self.drop(connection)
            raise
        return connection

    def why_ended(self) -> str:
        """Why it has ended; empty if that is not so for long after it began to look like it."""
        self._ended.wait(_ENDS_WITHIN_S)
        return self._why

    def when_ended(self, tell: Callable[[str], None]) -> None:
        """Have `tell` called with why, once it has ended without being asked to; at once if it has."""
        with self._lock:
            self._tell = tell
            ended = self._ended.is_set() and not self._closing
        if ended:
            tell(self._why)

    def kill(self, why: str) -> None:
        """End it at once, and let it be told as any end: why it had to be, in a few words."""
        with self._lock:
            self._killed_for = self._killed_for or why
        self._kill(self.pid)

    def close(self) -> None:
        """End it, and wait until its memory is back; nobody is told."""
        with self._lock:
            self._closing, free = True, self._free
            self._free = []
            self._killed_for = self._killed_for or "it has been unloaded"
        for connection in free:
            self.drop(connection)
        self._kill(self.pid)
        if not self._ended.wait(_ENDS_WITHIN_S):
            log_event(log, logging.WARNING, "WorkerStays", "it does not end", pid=self.pid)
        self._control.close()

    def has_ended(self, status: int, why: str = "") -> None:
        """Its process is gone, with that exit code; negative: the number of a signal.

        Args:
            why: what is known of it beside that.
        """
        with self._lock:
            # The system's kill looks like one of ours: only who has sent it knows.
            ours = self._killed_for if status == -signal.SIGKILL else ""
            self._why = why or ours or how_it_ended(status)
            self._ended.set()
            # A process that it has started may have inherited the other ends, and outlive it.
            for connection in self._all:
                connection.hang_up()
            tell = None if self._closing else self._tell
        if tell is not None:
            tell(self._why)


def how_it_ended(status: int) -> str:
    """An exit code in words."""
    if status >= 0:
        return f"it ended with exit code {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = ", as the system does when memory is short" if -status == signal.SIGKILL else ""
    return f"it was ended by {name}{hint}"


class WorkerStarter:
    """Starts workers; safe to use from several threads.

    On Linux they are forked from a process that has imported torch, which is started with the first of
    them. Elsewhere each is a new process, which takes seconds.
    """

    def __init__(self, *, forks: bool = sys.platform == "linux") -> None:
        self.forks = forks
        self._lock = threading.Lock()
        self._server: _ForkServer | None = None

    def start(self, model_id: str, imports: Sequence[str] = ()) -> Worker:
        """A new worker, without a model. Raises WorkerDied if none can be started."""
        try:
            control, other = pair()
            try:
                with other, _Output(model_id) as output:
                    return self._start(control, (other.fileno(), *output.descriptors), imports)
            except BaseException:
                control.close()
                raise
        except (Closed, OSError) as error:
            why = str(error) or "the process that forks them has ended"
            raise WorkerDied(
                f"model {model_id!r}: no worker process can be started: {why}"
            ) from error

    def _start(
        self, control: Channel, descriptors: Sequence[int], imports: Sequence[str]
    ) -> Worker:
        if self.forks:
            return self._running_server().fork(control, descriptors, imports)
        return _spawn(control, descriptors)

    def _running_server(self) -> _ForkServer:
        with self._lock:
            if self._server is None or self._server.ended:
                self._server = _ForkServer()
            return self._server


class _ForkServer:
    """The process that forks workers; see `worker.fork_server`."""

    def __init__(self) -> None:
        self._channel, other = pair()
        with other:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "splitlearn_manager.worker.fork_server",
                    str(other.fileno()),
                ],
                pass_fds=(other.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        self.ended = False  # or is asked nothing any more
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._workers: dict[int, Worker] = {}
        self._forked: Callable[[Message], None] | None = None
        self._answered = threading.Event()
        try:
            if self._channel.receive(_STARTS_WITHIN_S)[0] != {"op": "ready"}:
                raise Closed
            threading.Thread(target=self._hear, name="fork-server", daemon=True).start()
        except BaseException as error:
            self._process.kill()
            self._process.wait()
            self._channel.close()
            if isinstance(error, TimeoutError):
                why = f"the process that forks them was not ready within {_STARTS_WITHIN_S:g} s"
                raise OSError(why) from None
            raise

    def fork(self, control: Channel, descriptors: Sequence[int], imports: Sequence[str]) -> Worker:
        """Raises Closed; or OSError, with the system's reason to refuse another process."""
        found: list[Worker] = []
        refused: list[str] = []

        def forked(answer: Message) -> None:
            if answer["op"] == "refused":
                refused.append(answer["why"])
                return
            # By the thread that hears of its end: it cannot hear of that before.
            worker = self._workers[answer["pid"]] = Worker(answer["pid"], control, self._kill)
            found.append(worker)

        with self._lock:
            if self.ended:
                raise Closed
            self._answered.clear()
            self._forked = forked
            with self._sending:
                self._channel.send({"op": "fork", "import": list(imports)}, descriptors)
            if not self._answered.wait(_STARTS_WITHIN_S):
                # Stopped, or hung in an import: what it has forked serves on, the next one is another's.
                self.ended = True
                raise OSError("the process that forks them does not answer")
        if refused:
            raise OSError(refused[0])
        if not found:
            raise Closed
        return found[0]

    def _kill(self, pid: int) -> None:
        with suppress(Closed), self._sending:  # closed: then it has ended with its server
            self._channel.send({"op": "kill", "pid": pid})

    def _hear(self) -> None:
        try:
            while True:
                message, _ = self._channel.receive()
                if message["op"] in ("forked", "refused") and self._forked is not None:
                    self._forked(message)
                    self._answered.set()
                elif message["op"] == "ended":
                    self._workers.pop(message["pid"]).has_ended(message["status"])
        except Closed:
            self.ended = True
            self._answered.set()
            self._channel.close()
            self._process.wait()
            why = f"the process that forks workers has ended: {how_it_ended(self._process.returncode)}"
            for pid in list(self._workers):
                self._workers.pop(pid).has_ended(-signal.SIGKILL, why)


def _spawn(control: Channel, descriptors: Sequence[int]) -> Worker:
    end, out, err = descriptors
    process = subprocess.Popen(
        [sys.executable, "-m", "splitlearn_manager.worker", str(end)],
        pass_fds=(end,),
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        start_new_session=True,
    )
    worker = Worker(process.pid, control, lambda _: _end_group(process))
    threading.Thread(
        target=lambda: worker.has_ended(process.wait()), name=f"worker-{process.pid}", daemon=True
    ).start()
    return worker


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """It, and the processes that it has started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class _Output:
    """What a worker prints, in the node's log, a line each, with the model's id.

    The block is for handing the ends to the worker; they are closed here after it.
    """

    def __init__(self, model_id: str) -> None:
        writes: list[int] = []
        reads: dict[int, str] = {}
        try:
            for name in ("stdout", "stderr"):
                read, write = os.pipe()
                reads[read] = name
                writes.append(write)
            threading.Thread(
                target=_log_lines, args=(model_id, reads), name=f"output-{model_id}", daemon=True
            ).start()
        except BaseException:
            for descriptor in (*reads, *writes):
                os.close(descriptor)
            raise
        self.descriptors = tuple(writes)

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


def _log_lines(model_id: str, streams: dict[int, str]) -> None:
    """Until the worker has closed both."""
    begun = dict.fromkeys(streams, b"")
    # It takes no descriptor of its own: there may be none left, and a pipe that nobody reads stops the model.
    with selectors.PollSelector() as selector:
        for end in streams:
            selector.register(end, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                end = key.fd
                data = os.read(end, 64 * 2**10)
                *lines, begun[end] = (begun[end] + data).split(b"\n")
                if not data or len(begun[end]) > _MOST_OF_A_LINE:
                    lines, begun[end] = [*lines, begun[end]], b""
                for line in lines:
                    _log_line(model_id, streams[end], line)
                if not data:
                    selector.unregister(end)
                    os.close(end)


def _log_line(model_id: str, stream: str, line: bytes) -> None:
    text = line[:_MOST_OF_A_LINE].decode(errors="replace").rstrip()
    if text:
        level = logging.WARNING if stream == "stderr" else logging.INFO
        log_event(log, level, "WorkerOutput", text, model=model_id, stream=stream)
