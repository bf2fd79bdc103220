"""What a load measures is measured once for a version on a device, and kept with its estimate."""

from __future__ import annotations

from dataclasses import replace

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.lifecycle import ModelSpec
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.core.model_reader import ModelReader
from splitlearn_manager.runtime.base import Activations, Joining
from support.fakes import FakeFiles, FakeRunning, FakeRuntime, model

LINES = Activations(((5.0, 1.0),))
FOUND = Joining(True, "they may be joined")


class Measured(FakeRunning):
    """Counts how often forwards are run to measure them."""

    measured = 0
    tried = 0

    def when_ended(self, tell: object) -> None:
        pass

    def measure_activations(self) -> Activations | None:
        self.measured += 1
        return LINES

    def example(self) -> None:
        return None

    def find_joining(self) -> Joining:
        self.tried += 1
        return replace(FOUND, lasts=self.config.batch_size > 1)


class Runtime(FakeRuntime):
    def start(self, config: ModelConfig, device: str) -> FakeRunning:
        running = Measured(config, 90.0)
        self.running.append(running)
        return running

    @property
    def measured(self) -> list[int]:
        return [r.measured for r in self.running if isinstance(r, Measured)]

    @property
    def tried(self) -> list[int]:
        return [r.tried for r in self.running if isinstance(r, Measured)]


def reader() -> tuple[ModelReader, Runtime, FakeFiles]:
    runtime, files = Runtime(), FakeFiles()
    return ModelReader(runtime, files), runtime, files  # type: ignore[arg-type]


def spec(weights: str = "w0", **keys: object) -> ModelSpec:
    return ModelSpec.of(model("a", **keys), weights=weights)


def test_a_version_that_was_measured_is_not_run_again_to_measure_it() -> None:
    reads, runtime, files = reader()
    for _ in range(2):
        reads.read(spec(), "cpu")
    assert runtime.measured == [1, 0]
    reads.read(spec(batch_size=64), "cpu")  # batches are no other model
    assert runtime.measured == [1, 0, 0]
    assert reads.size_mb(spec(batch_size=64)) == 90.0 + 5.0 + 64.0
    files.fingerprints["a"] = "w1"
    reads.read(spec("w1"), "cpu")
    assert runtime.measured == [1, 0, 0, 1]


def test_nor_is_it_by_the_next_process() -> None:
    first, _, _ = reader()
    first.read(spec(), "cpu")
    second, runtime, _ = reader()
    second.restore("a", first.measurements("a"))
    second.read(spec(), "cpu")
    assert runtime.measured == [0]
    assert second.measurements("a") == first.measurements("a")


def test_whether_requests_may_be_joined_is_found_once_for_a_version() -> None:
    reads, runtime, files = reader()
    for weights in ("w0", "w0", "w1"):
        files.fingerprints["a"] = weights
        running = reads.read(spec(weights), "cpu").running
        assert running.joins
    assert runtime.tried == [1, 0, 1]


def test_what_holds_for_a_batch_size_of_one_is_found_anew() -> None:
    reads, runtime, _ = reader()
    for batch_size in (1, 8, 8):
        reads.read(spec(batch_size=batch_size), "cpu")
    assert runtime.tried == [1, 1, 0]


def test_another_device_may_take_another_amount() -> None:
    reads, runtime, _ = reader()
    for device in ("cpu", "cuda:0", "cuda:0"):
        reads.read(spec(), device)
    assert runtime.measured == [1, 1, 0]


def test_the_estimate_is_kept_beside_what_was_measured() -> None:
    reads, _, files = reader()
    files.estimates_mb["a"] = 85.0
    wanted = spec()
    assert reads.size_mb(wanted) == 85.0
    reads.read(wanted, "cpu")
    measured = Measurement(*wanted.version, "cpu", 85.0, 90.0, LINES, FOUND)
    assert reads.measured(wanted) == measured
    assert reads.size_mb(wanted) == 90.0 + 5.0 + 32.0
    # Another load of the version, which nobody has estimated again.
    reads.forget("a")
    reads.restore("a", (measured,))
    reads.read(wanted, "cpu")
    assert reads.measured(wanted) == measured
