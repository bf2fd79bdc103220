"""What goes wrong inside a worker process, or around it, is told to who waits, and stays in that model."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from splitlearn_comm.core.deadlines import working_for
from splitlearn_comm.core.errors import ComputeFailed, DeadlinePassed, Overloaded
from splitlearn_comm.core.packed import Packed
from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.core.model_reader import ModelReader
from splitlearn_manager.errors import LoadError, LoadTimeout, WorkerDied
from splitlearn_manager.runtime import workers
from splitlearn_manager.runtime.base import Joining
from splitlearn_manager.runtime.channel import Channel, Closed, pair
from splitlearn_manager.runtime.process import ProcessRuntime, RunningInProcess
from splitlearn_manager.runtime.shared_area import Area
from splitlearn_manager.runtime.worker_connection import Connection
from splitlearn_manager.runtime.workers import Worker, WorkerStarter
from support.fakes import FakeFiles
from support.inferences import begun, whole
from support.models import model_config
from support.waiting import eventually

RUNTIME = ProcessRuntime()

CODE = """
import os, sys, time
from pathlib import Path
import torch
from torch import nn

BESIDE = Path(__file__).parent

class Net(nn.Module):
    def __init__(self, wish):
        super().__init__()
        self.wish = wish

    def forward(self, x):
        if x.sum() == 0:
            return x
        return getattr(self, self.wish)(x)

    def sparse(self, x):
        return x.to_sparse()

    def without_stderr(self, x):
        sys.stderr.close()
        raise ValueError("no such thing")

    def has_a_child(self, x):
        # One that leaves its group, one that does not; both have all that is open here.
        for leaves in (False, True):
            if (pid := os.fork()) == 0:
                if leaves:
                    os.setsid()
                time.sleep(600)
                os._exit(0)
            (BESIDE / str(pid)).touch()
        (BESIDE / "inside").touch()
        time.sleep(600)

    def hangs(self, x):
        (BESIDE / "inside").touch()
        time.sleep(600)

    def opens_all(self, x):
        self.opened = []
        try:
            while True:
                self.opened.append(open(os.devnull))
        except OSError:
            return x

    def large(self, x):
        return torch.zeros(2**20)

    def previous(self, x):
        # What it was asked before, and first of all an error.
        before, self.before = getattr(self, "before", None), x
        if before is None:
            raise ValueError("nothing came before")
        return before

    def waits_for_a_file(self, x):
        (BESIDE / "inside").touch()
        while not (BESIDE / "go").exists():
            time.sleep(0.01)
        return x

def make(wish):
    return Net(wish)
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "faulty_net.py").write_text(CODE)
    return tmp_path


def start(code: Path, wish: str, started: list[RunningInProcess]) -> RunningInProcess:
    config = model_config(
        "faulty_net:make", warmup=False, trusted=True, config={"kwargs": {"wish": wish}}
    )
    running = RUNTIME.start(config.with_base_dir(code), "cpu")
    started.append(running)
    return running


def open_files() -> set[tuple[int, int]]:
    """Descriptors and what they are of. Others, of tests before, may be closed at any time."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one by which they are listed
            found.add((int(name), os.fstat(int(name)).st_ino))
    return found


def fulfil(running: RunningInProcess) -> torch.Tensor:
    """Ask the model for its wish; a caller that is not answered is not left waiting for ever."""
    with working_for(10.0):
        answer = running.compute_function.compute(torch.ones(1, 2))
    assert isinstance(answer, torch.Tensor)
    return answer


def still_answers(running: RunningInProcess) -> bool:
    x = torch.zeros(1, 2)
    with working_for(10.0):
        answer = running.compute_function.compute(x)
    return isinstance(answer, torch.Tensor) and torch.equal(answer, x)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ("sparse", "RuntimeError: nbytes is not defined for sparse tensors"),
        ("without_stderr", "ValueError: no such thing"),
    ],
)
def test_what_cannot_be_told_is_an_error_and_leaves_nobody_waiting(
    code: Path, started: list[RunningInProcess], wish: str, words: str
) -> None:
    """Seen to fail: the thread in the worker ended by that, and its caller waited for ever."""
    running = start(code, wish, started)
    with pytest.raises(ComputeFailed, match=words) as caught:
        fulfil(running)
    assert caught.value.reason == "ModelRaised"
    assert still_answers(running)


def test_what_a_model_keeps_of_its_inputs_stays_as_it_was(
    code: Path, started: list[RunningInProcess]
) -> None:
    """Seen to fail: the next request was written over it, and the model answered with that."""
    running = start(code, "previous", started)
    with pytest.raises(ComputeFailed, match="nothing came before"):
        running.compute_function.compute(torch.full((1, 2), 1.0))
    function = running.compute_function
    for number in (2.0, 3.0):
        answer = function.compute(torch.full((1, 2), number))
        assert torch.equal(answer, torch.full((1, 2), number - 1))  # type: ignore[arg-type]
    for number in (4.0, 5.0):
        row = Packed(torch.full((1, 2), number).numpy().tobytes(), (1, 2), torch.float32)
        assert torch.equal(whole(begun(function, [row])), torch.full((1, 2), number - 1))


def in_the_background(
    running: RunningInProcess, failed: list[BaseException], for_s: float | None = None
) -> threading.Thread:
    """A thread that asks the model for its wish, without a deadline unless one is given."""

    def ask() -> None:
        try:
            with working_for(for_s):
                running.compute_function.compute(torch.ones(1, 2))
        except ComputeFailed as error:
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    return asking


def test_who_has_ended_a_worker_is_told(code: Path, started: list[RunningInProcess]) -> None:
    """Seen to fail: whatever the node ended was told to have been ended as memory was short."""
    told: list[LoadError] = []
    failed: list[BaseException] = []
    running = start(code, "hangs", started)
    asking = in_the_background(running, failed)
    eventually((code / "inside").exists, "the request is inside", 20)
    running.close()
    asking.join(20)
    assert "it has been unloaded" in str(failed[0])

    running = start(code, "hangs", started)
    running.when_ended(told.append)
    with working_for(0.1), pytest.raises(DeadlinePassed):
        running.compute_function.compute(torch.ones(1, 2))
    eventually(lambda: told, "its end is told", 20)
    assert "a request was not answered for long after its deadline" in told[0].message
    assert "memory" not in told[0].message


def test_a_request_that_waits_for_its_turn_does_not_end_the_one_that_runs(
    code: Path, started: list[RunningInProcess]
) -> None:
    """Seen to fail: what had the shorter deadline ended the worker, with the forward that was in time."""
    running = start(code, "waits_for_a_file", started)
    running.join(Joining(True, "for the test"))
    failed: list[BaseException] = []
    asking = in_the_background(running, failed, for_s=300.0)
    eventually((code / "inside").exists, "the first is inside", 20)
    with working_for(0.1), pytest.raises(DeadlinePassed, match="busy with another request"):
        running.compute_function.compute(torch.zeros(1, 2))
    (code / "go").touch()
    asking.join(20)
    assert failed == []
    assert still_answers(running)


def test_a_worker_that_cannot_go_on_is_ended(
    code: Path, started: list[RunningInProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail: each request waited in vain and was told that the model was unloaded; it stayed Ready."""
    monkeypatch.setattr(workers, "_ENDS_WITHIN_S", 0.2)
    running = start(code, "opens_all", started)
    told: list[LoadError] = []
    running.when_ended(told.append)
    fulfil(running)
    large = torch.zeros(1000, 1000)
    with pytest.raises(ComputeFailed, match="it has closed a connection without an answer"):
        running.compute_function.compute(large)
    eventually(lambda: told, "its end is told", 20)
    assert "it has closed a connection" in told[0].message


@pytest.mark.skipif(sys.platform != "linux", reason="counts what is open")
def test_an_answer_for_which_the_node_has_no_descriptors_harms_nobody(
    code: Path, started: list[RunningInProcess]
) -> None:
    """Seen to fail: after ten seconds the worker was ended, which was said to have closed its connection."""
    running = start(code, "large", started)
    told: list[LoadError] = []
    running.when_ended(told.append)
    assert still_answers(running)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        # The answer comes in a new area; the request after it needs a new connection.
        with pytest.raises(Overloaded, match="no file descriptors left"):
            fulfil(running)
        with pytest.raises(Overloaded, match="Too many open files"):
            fulfil(running)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert fulfil(running).numel() == 2**20
    assert told == []


@pytest.mark.skipif(sys.platform != "linux", reason="counts what is open")
def test_memory_that_is_refused_leaves_no_descriptor_open() -> None:
    """Seen to fail: each refused request left one more, until the node had none."""
    before = open_files()
    for size in (2**60, 2**63):  # more than may be mapped; more than a file can have
        with pytest.raises((OSError, OverflowError)):
            Area.of_size(size)
    assert open_files() <= before


def test_a_worker_that_takes_no_connection_can_be_ended(
    code: Path, started: list[RunningInProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail: of one that stood still, some three hundred were asked for; the next held the lock that
    ending it needs, and waited for room in its socket."""
    running = start(code, "sparse", started)
    worker = running._worker
    waits, ended = threading.Event(), threading.Event()

    def is_full(*_: object) -> None:
        waits.set()
        ended.wait(60)
        raise Closed

    monkeypatch.setattr(worker._control, "send", is_full)
    failed: list[BaseException] = []
    with worker.connection():
        # That of the load, which is in use: another one is needed.
        asking = in_the_background(running, failed, for_s=300.0)
        assert waits.wait(20)
        closing = threading.Thread(target=running.close, daemon=True)
        closing.start()
        closing.join(20)
    stays = closing.is_alive()
    ended.set()
    asking.join(20)
    closing.join(20)
    assert not stays
    assert "has been unloaded" in str(failed[0])


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_processes_that_a_model_has_started_keep_nobody_waiting_and_end_with_it(
    code: Path, started: list[RunningInProcess]
) -> None:
    """Seen to fail: a child had the other end of the request's connection, and its caller waited for it."""
    running = start(code, "has_a_child", started)
    failed: list[BaseException] = []
    asking = in_the_background(running, failed)
    eventually((code / "inside").exists, "the request is inside", 20)
    stays, leaves = sorted(int(path.name) for path in code.iterdir() if path.name.isdecimal())
    try:
        os.kill(running._worker.pid, signal.SIGKILL)
        asking.join(20)
        assert [type(error) for error in failed] == [ComputeFailed]
        with pytest.raises(ComputeFailed, match="SIGKILL"):
            running.compute_function.compute(torch.zeros(1, 2))
        eventually(lambda: has_ended(stays), "a process that the model has started ends", 20)
    finally:
        for pid in (stays, leaves):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def has_ended(pid: int) -> bool:
    """Also if nobody has asked how."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_signal_of_a_model_to_its_group_reaches_nobody_else(
    code: Path, started: list[RunningInProcess]
) -> None:
    """Seen to fail: os.kill(0, SIGKILL) in a model ended the node."""
    pids = [start(code, "sparse", started)._worker.pid for _ in range(2)]
    assert [os.getpgid(pid) for pid in pids] == pids


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_fork_that_the_system_refuses_fails_one_load(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail: it ended the process that forks them, and all models with it."""
    refuses = code / "refuses"
    (code / "sitecustomize.py").write_text(
        "import os\n\nfork = os.fork\n\n\ndef refused():\n"
        f"    if os.path.exists({str(refuses)!r}):\n"
        "        raise BlockingIOError(11, 'Resource temporarily unavailable')\n"
        "    return fork()\n\n\nos.fork = refused\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")]))
    runtime = ProcessRuntime()
    config = model_config("faulty_net:make", config={"kwargs": {"wish": "sparse"}}, warmup=False)
    running = runtime.start(config.with_base_dir(code), "cpu")
    told: list[LoadError] = []
    running.when_ended(told.append)
    refuses.touch()
    with pytest.raises(WorkerDied, match=r"can be started: .*temporarily unavailable"):
        runtime.start(config.with_base_dir(code), "cpu")
    refuses.unlink()
    runtime.start(config.with_base_dir(code), "cpu").close()
    assert still_answers(running)
    assert told == []
    running.close()


def test_a_load_that_hangs_after_warm_up_is_ended(code: Path) -> None:
    """Seen to fail: the forward that hung, of those after warm-up, was waited for without a limit."""
    config = model_config(
        "faulty_net:make",
        load_timeout_s=1.0,
        config={"kwargs": {"wish": "hangs"}, "input_shape": [1, 2]},
    ).with_base_dir(code)
    runtime, files = ProcessRuntime(), FakeFiles()
    ended: list[BaseException] = []

    def load() -> None:
        try:
            ModelReader(runtime, files).read(ModelSpec.of(config, weights="w0"), "cpu")  # type: ignore[arg-type]
        except LoadTimeout as error:
            ended.append(error)

    loading = threading.Thread(target=load, daemon=True)
    loading.start()
    eventually((code / "inside").exists, "a forward of the load hangs", 60)
    loading.join(30)
    assert "has not answered" in str(ended[0])


@pytest.mark.skipif(sys.platform != "linux", reason="counts what is open")
def test_a_start_for_which_there_are_no_descriptors_leaves_none_open(
    code: Path, started: list[RunningInProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail: one pipe stayed open each time that there was none for the other."""
    running = start(code, "sparse", started)
    before = open_files()
    pipe, made = os.pipe, list[int]()

    def refused() -> tuple[int, int]:
        made.append(len(made))
        if len(made) % 2 == 0:
            raise OSError(24, "Too many open files")
        return pipe()

    monkeypatch.setattr(os, "pipe", refused)
    for _ in range(3):
        with pytest.raises(WorkerDied, match=r"can be started: .*Too many open files"):
            start(code, "sparse", started)
    monkeypatch.undo()
    assert len(made) == 6
    assert open_files() <= before
    assert still_answers(running)


def test_an_offer_for_which_there_are_no_descriptors_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail: no weights that anybody had lent were given back any more."""
    runtime = ProcessRuntime()
    torch.save(torch.nn.Linear(2048, 2048), tmp_path / "m.pt")
    first = runtime.start(model_config(tmp_path / "m.pt"), "cpu")

    def refused(_: int) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="Too many open files"):
        patched.setattr(os, "dup", refused)
        runtime.start(model_config(tmp_path / "m.pt"), "cpu")
    first.close()
    assert runtime._lent._files == {}


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_where_the_process_that_forks_does_not_answer_another_one_does(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail: that load, and each one after it, waited for it for ever."""
    runtime = ProcessRuntime()
    config = model_config("faulty_net:make", config={"kwargs": {"wish": "sparse"}}, warmup=False)
    config = config.with_base_dir(code)
    first = runtime.start(config, "cpu")
    failed: list[BaseException] = []

    def load() -> None:
        try:
            runtime.start(config, "cpu")
        except WorkerDied as error:
            failed.append(error)

    forks = psutil.Process(first._worker.pid).ppid()
    os.kill(forks, signal.SIGSTOP)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(workers, "_STARTS_WITHIN_S", 0.2)
            loading = threading.Thread(target=load, daemon=True)
            loading.start()
            loading.join(20)
        assert "does not answer" in str(failed[0])
        second = runtime.start(config, "cpu")
        assert psutil.Process(second._worker.pid).ppid() != forks
        assert still_answers(first)
        second.close()
    finally:
        os.kill(forks, signal.SIGCONT)
    first.close()


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_workers_are_ended_while_the_process_that_forks_imports(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail: an unload took ten seconds, and logged that the worker does not end; a worker that was
    killed was told to have closed its connection."""
    (code / "takes_long.py").write_text(
        "import time\nfrom pathlib import Path\n\nbeside = Path(__file__).parent\n"
        "(beside / 'importing').touch()\n"
        "while not (beside / 'imported').exists():\n    time.sleep(0.01)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")]))
    starter = WorkerStarter()
    runtime = ProcessRuntime(starter)
    config = model_config("faulty_net:make", config={"kwargs": {"wish": "hangs"}}, warmup=False)
    config = config.with_base_dir(code)
    first, second = (runtime.start(config, "cpu") for _ in range(2))
    failed: list[BaseException] = []
    asking = in_the_background(second, failed)
    eventually((code / "inside").exists, "the request is inside", 20)
    third: list[Worker] = []
    starting = threading.Thread(
        target=lambda: third.append(starter.start("third", ("takes_long",))), daemon=True
    )
    starting.start()
    try:
        eventually((code / "importing").exists, "it imports", 20)
        first.close()
        assert first._worker.why_ended() == "it has been unloaded"
        os.kill(second._worker.pid, signal.SIGKILL)
        asking.join(30)
        assert "SIGKILL" in str(failed[0])
    finally:
        (code / "imported").touch()
        second.close()
    starting.join(20)
    third[0].close()


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_process_that_forks_and_is_not_ready_in_time_is_ended(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail: it stayed, one more with each retry, and was said to have ended."""
    before = {child.pid for child in psutil.Process().children()}
    monkeypatch.setattr(workers, "_STARTS_WITHIN_S", 0.05)
    config = model_config("faulty_net:make", config={"kwargs": {"wish": "sparse"}}, warmup=False)
    with pytest.raises(WorkerDied, match=r"was not ready within 0\.05 s"):
        ProcessRuntime().start(config.with_base_dir(code), "cpu")
    assert {child.pid for child in psutil.Process().children()} <= before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux seals files")
def test_memory_that_a_worker_could_take_away_is_not_read(tmp_path: Path) -> None:
    """Seen to fail: a model that made an area of its own and cut it off ended the node by SIGBUS."""
    unsealed = os.memfd_create("unsealed")
    os.truncate(unsealed, 2**20)
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(2**20)
        for descriptor in (unsealed, file.fileno()):
            ours, other = pair()
            connection, theirs = Connection(ours), Channel(other)
            place = ["float32", [4], 0]
            theirs.send({"area": True, "tensors": [place]}, (descriptor,))
            with pytest.raises(ValueError, match="taken away"):
                connection.answer(10)
            connection.close()
            theirs.close()
    os.close(unsealed)
