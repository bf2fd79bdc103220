"""Models that load, fail, hang and lie as the script says, and the work that does it.

Weights are text: `mb=20 v=3`, with `real=45` where the estimate is wrong. Of odd versions a forward takes
memory too, which only a load measures. A text that was cut off is a
checkpoint that cannot be read. A loaded model remembers the bytes it was made from, so that a check
can compare what serves with what should.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from simulation.machine import Machine
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.model_source import fingerprint, resolve_source
from splitlearn_manager.core.model_files import ModelFiles
from splitlearn_manager.core.others_use import Reading
from splitlearn_manager.core.resource_manager import ResourceManager
from splitlearn_manager.errors import (
    InvalidModel,
    LoadError,
    SplitlearnError,
    UntrustedCheckpoint,
    WeightsNotFound,
)
from splitlearn_manager.runtime.base import Activations, Joining

EACH_MB = 0.5
"""What one input of a batch takes, where a forward takes anything."""

_WEIGHTS = re.compile(rb"mb=(\d+)(?: real=(\d+))? v=(\d+)\n")


def weights(mb: int, version: int, real: int | None = None) -> bytes:
    """The content of a weights file."""
    return f"mb={mb}{f' real={real}' if real is not None else ''} v={version}\n".encode()


def activations_of(data: bytes) -> Activations | None:
    """What a forward takes of a model that is made of these weights."""
    found = re.search(rb"v=(\d+)\n", data)
    odd = found is not None and int(found[1]) % 2 == 1
    return Activations(((1.0, EACH_MB),)) if odd else None


def sizes_mb(data: bytes) -> tuple[float, float] | None:
    """Estimated and real size; None for a checkpoint that was cut off."""
    parts = [_WEIGHTS.fullmatch(line) for line in data.splitlines(keepends=True)]
    if not parts or not all(parts):
        return None
    found = [part for part in parts if part]
    estimate = sum(float(part[1]) for part in found)
    return estimate, sum(float(part[2] or part[1]) for part in found)


@dataclass(frozen=True)
class Fate:
    """What becomes of one load.

    Attributes:
        kind: ok · fail · terminal · untrusted · memory · exit · lie
        takes_s: until its work runs; beyond load_timeout_s it hangs, and comes back late.
        meanwhile_s: time that passes, with all that happens in it, in the middle of reading.
        rewritten: the weights become others in the middle of reading.
    """

    kind: str = "ok"
    takes_s: float = 0.05
    meanwhile_s: float = 0.0
    rewritten: bool = False

    def __str__(self) -> str:
        words = f"{self.kind} after {self.takes_s:g} s"
        if self.meanwhile_s:
            words += f", {self.meanwhile_s:g} s of it in mid-read"
        return f"{words}, its weights rewritten meanwhile" if self.rewritten else words


@dataclass(frozen=True)
class Fates:
    """What becomes of the next loads of a model."""

    ahead: tuple[Fate, ...]

    def __str__(self) -> str:
        return ", then ".join(str(fate) for fate in self.ahead)


@dataclass
class Work:
    """A piece of work that the node started beside its loop."""

    name: str
    key: str
    is_load: bool
    do: Callable[[], None]
    fate: Fate
    done: bool = False


class Executor:
    """Starts nothing: puts work on the agenda. Given anew to each process."""

    def __init__(self, machine: Machine, lab: ModelLab) -> None:
        self._machine = machine
        self._lab = lab
        self.waiting: list[Work] = []

    def start(self, name: str, work: Callable[[], None]) -> None:
        self._machine.effect("thread")
        if self._lab.threads_refused > 0:
            self._lab.threads_refused -= 1
            self._machine.tell("exec", f"{name}: can't start new thread")
            raise RuntimeError("can't start new thread")
        kind, _, key = name.partition("-")
        is_load = kind == "load"
        model_id = key.partition("#")[0]
        fate = self._lab.take_fate(model_id) if is_load else Fate(takes_s=self._lab.close_takes_s)
        item = Work(name, key, is_load, work, fate)
        self.waiting.append(item)
        self._machine.later(fate.takes_s, lambda: self.run(item))

    def run(self, item: Work) -> None:
        """The work is done now, if it was not before and its process still lives."""
        if item.done or item not in self.waiting:
            return
        item.done = True
        self.waiting.remove(item)
        with self._lab.at_work(item):
            item.do()


class Running:
    """A loaded model without torch; remembers what it was made from and refuses misuse."""

    def __init__(
        self,
        lab: ModelLab,
        key: str,
        config: ModelConfig,
        device: str,
        made_of: bytes,
        mb: float,
    ) -> None:
        self._lab = lab
        self.key = key
        self.config = config
        self.device = device
        self.made_of = made_of
        self.memory_mb = mb
        self.notes: tuple[str, ...] = ()
        self.warmed = True
        self.closed = False
        self.leases = 0

    @property
    def compute_function(self) -> object:
        if self.closed:
            self._lab.machine.violated("I20", f"{self.key} is used after it was closed")
        return self

    def when_ended(self, tell: object) -> None:
        pass

    joins = joins_lengths = False

    def example(self) -> None:
        return None

    def find_joining(self) -> Joining:
        return Joining(False, "not tried")

    def join(self, joining: Joining) -> None:
        pass

    def measure_activations(self) -> Activations | None:
        return activations_of(self.made_of)

    def close(self) -> None:
        self._lab.machine.effect("close")
        if self.closed:
            self._lab.machine.violated("I20", f"{self.key} is closed twice")
            return
        if self.leases:
            message = f"{self.key} is closed while {self.leases} requests run"
            self._lab.machine.violated("I20", message)
        self.closed = True
        self._lab.open.remove(self)
        if self._lab.closes_that_raise > 0:
            self._lab.closes_that_raise -= 1
            raise RuntimeError("close failed")


class Others:
    """Who uses the devices beside the node.

    Attributes:
        mb: what they use of each.
        since: when that was last another.
        stalled: devices for whose memory processes stand still.
    """

    def __init__(self) -> None:
        self.mb: dict[str, float] = {}
        self.since: dict[str, float] = {}
        self.stalled: set[str] = set()

    def take(self, device: str, mb: float, at: float) -> None:
        """From now on they use that much."""
        self.mb[device], self.since[device] = mb, at

    def go(self) -> None:
        """They use nothing any more."""
        self.mb.clear()
        self.stalled.clear()


class ModelLab:
    """The runtime of one process and the fates of its loads.

    Attributes:
        open: models in memory.
        others: who uses the devices beside them.
        attempts: (model_id, at, version) of loads that have begun to run, oldest first.
        meanwhile: lets time pass in the middle of a load.
        on_rewrite: called when weights have become others in the middle of a load.
        on_measured: called with what a load measured that has read one version.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.fates: dict[str, deque[Fate]] = {}
        self.open: list[Running] = []
        self.threads_refused = 0
        self.closes_that_raise = 0
        self.close_takes_s = 0.02
        self.others = Others()
        self.meanwhile: Callable[[float], None] = lambda seconds: None
        self.on_rewrite: Callable[[], None] = lambda: None
        self.on_measured: Callable[..., None] = lambda *measured: None
        self._at_work: list[Work] = []

    def new_process(self) -> None:
        self.open = []
        self._at_work = []

    def no_more_faults(self) -> None:
        self.fates.clear()
        self.threads_refused = self.closes_that_raise = 0
        self.close_takes_s = 0.02
        self.others.go()

    def add_fates(self, model_id: str, fates: Fates) -> None:
        self.fates.setdefault(model_id, deque()).extend(fates.ahead)

    def take_fate(self, model_id: str) -> Fate:
        ahead = self.fates.get(model_id)
        return ahead.popleft() if ahead else Fate()

    def used_mb(self, device: str) -> float:
        """What is used of a device, by models and by others."""
        models_mb = sum(running.memory_mb for running in self.open if running.device == device)
        return models_mb + self.others.mb.get(device, 0.0)

    @property
    def loads_at_work(self) -> list[str]:
        """Keys of instances whose loader is running at this moment."""
        return [item.key for item in self._at_work if item.is_load]

    @contextmanager
    def at_work(self, item: Work) -> Iterator[None]:
        self._at_work.append(item)
        try:
            yield
        finally:
            if item in self._at_work:
                self._at_work.remove(item)

    # The protocol of a runtime.

    def start(self, config: ModelConfig, device: str) -> Running:
        self.machine.effect("load")
        item = self._at_work[-1]
        fate = item.fate
        path = resolve_source(config, self.machine.fs).path
        data = read_weights(self.machine, str(path))
        version = (config.load_hash(), fingerprint_now(self.machine, config) or "")
        if fate.rewritten:
            self._rewrite(str(path))
        if fate.meanwhile_s:
            self.meanwhile(fate.meanwhile_s)
            self.machine.effect("load")
        _raise_what_fate_says(fate.kind, config)
        wish = config.config.kwargs.get("fail")
        if wish is not None:
            _raise_what_fate_says(str(wish), config)
        sizes = sizes_mb(data)
        if sizes is None:
            raise LoadError("the checkpoint is cut off", reason="CorruptCheckpoint")
        mb = sizes[1] * (3.0 if fate.kind == "lie" else 1.0)
        running = Running(self, item.key, config, device, data, mb)
        self.open.append(running)
        if fingerprint_now(self.machine, config) == version[1]:
            self.on_measured(config.model_id, version, mb, activations_of(data))
        return running

    def _rewrite(self, path: str) -> None:
        fs = self.machine.fs
        file = f"{path}/part1" if fs._follow(path).kind == "dir" else path
        self.machine.tell("world", f"{file} is rewritten while it is read")
        fs.write(file, weights(20, 11))
        self.on_rewrite()


def _raise_what_fate_says(kind: str, config: ModelConfig) -> None:
    model_id = config.model_id
    if kind == "fail":
        raise LoadError(f"{model_id}: it is broken")
    if kind == "terminal":
        raise InvalidModel(f"{model_id}: this is no model")
    if kind == "untrusted":
        raise UntrustedCheckpoint(f"{model_id}: it would run code")
    if kind == "memory":
        raise MemoryError
    if kind == "exit":
        raise SystemExit(3)


def read_weights(machine: Machine, path: str) -> bytes:
    """All bytes behind a path: a file, or the files of a directory in the order of their names."""
    fs = machine.fs
    try:
        if not fs.stat(path).is_dir:
            return fs.read(path, 1 << 16)
        names = sorted(e.name for e in fs.list_dir(path) if not e.name.startswith("."))
        return b"".join(fs.read(f"{path}/{name}", 1 << 16) for name in names)
    except OSError as error:
        raise WeightsNotFound(f"{path} cannot be read: {error.strerror}") from None


def weights_now(machine: Machine, config: ModelConfig) -> bytes | None:
    """What the files behind a config hold; None if they cannot be read."""
    with machine.unseen():
        try:
            path = resolve_source(config, machine.fs).path
            return read_weights(machine, str(path))
        except SplitlearnError:
            return None


def fingerprint_now(machine: Machine, config: ModelConfig) -> str | None:
    """What the node would call the files behind a config; None if there are none."""
    with machine.unseen():
        try:
            return fingerprint(resolve_source(config, machine.fs), machine.fs)
        except SplitlearnError:
            return None


class Files(ModelFiles):
    """What is behind a model_path: the real fingerprint, and the size that the text states."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.fs)
        self._machine = machine

    def estimate_mb(self, config: ModelConfig) -> float | None:
        path = resolve_source(config, self._machine.fs).path
        sizes = sizes_mb(read_weights(self._machine, str(path)))
        return sizes[0] if sizes is not None else None


class Resources(ResourceManager):
    """Two devices, whose budgets are what server.yaml says, else fixed.

    Args:
        totals_mb: what the devices have, if what is used of them can be read: by the models of the lab,
            and by others.
    """

    def __init__(
        self,
        budgets_mb: Mapping[str, float],
        totals_mb: Mapping[str, float] | None = None,
        lab: ModelLab | None = None,
    ) -> None:
        # Not the parent's: it would look for GPUs and read the processor's counters.
        self._default = dict(budgets_mb)
        self.totals_mb = dict(totals_mb or {})
        self._lab = lab
        self.configure(80, {})

    def budgets_mb(self) -> dict[str, float]:
        return {**self._default, **self._limits.quotas_mb()}

    def readings(self) -> dict[str, Reading]:
        if self._lab is None:
            return {}
        used = self._lab.used_mb
        others = self._lab.others
        return {
            device: Reading(total_mb, used(device), 30.0 if device in others.stalled else 0.0)
            for device, total_mb in self.totals_mb.items()
        }
