"""The manager's Python operations, with real threads and models that the test controls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.model_manager import ModelManager
from splitlearn_manager.errors import (
    InsufficientMemory,
    LoadError,
    MaxModels,
    ModelNotFound,
    ModelUnavailable,
    OperationInProgress,
    OverMemoryLimit,
    SplitlearnError,
    WeightsChanged,
)
from support.fakes import Bench, FakeFiles, FakeRunning, FakeRuntime, FixedBudgets, broken, model

DEADLINE_S = 20.0


class GatedRuntime(FakeRuntime):
    """Loads that begin when asked and end when the test opens the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.began = threading.Event()

    def start(self, config: ModelConfig, device: str) -> FakeRunning:
        self.began.set()
        assert self.gate.wait(DEADLINE_S)
        return super().start(config, device)


class Real:
    """A manager on real threads."""

    def __init__(self, runtime: FakeRuntime | None = None, max_models: int = 3) -> None:
        self.runtime = runtime or FakeRuntime()
        self.files = FakeFiles()
        self.manager = ModelManager(
            max_models=max_models,
            resources=FixedBudgets({"cpu": 100.0}),
            runtime=self.runtime,  # type: ignore[arg-type]
            files=self.files,  # type: ignore[arg-type]
        )


@pytest.fixture
def real() -> Iterator[Real]:
    made = Real()
    yield made
    made.manager.shutdown(1.0)


def in_thread(work: object) -> threading.Thread:
    thread = threading.Thread(target=work)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_a_loaded_model_serves_and_is_described(real: Real) -> None:
    assert real.manager.load_model(model("a")) is True
    info = real.manager.get_model_info("a")
    assert (info["state"], info["memory_mb"], info["owner"]) == ("READY", 10.0, "api")
    with real.manager.lease("a") as lease:
        assert lease.instance.in_flight == 1
    assert real.manager.get_model_info("a")["request_count"] == 1
    assert real.manager.get_statistics()["models_loaded"] == 1


def test_loading_at_max_models_evicts_the_least_recently_used_and_does_not_hang() -> None:
    """Version 1.0 evicted while it held its lock, and hung for ever."""
    real = Real(max_models=2)
    for model_id in ("a", "b"):
        real.manager.load_model(model(model_id))
    with real.manager.lease("a"):
        pass
    real.manager.load_model(model("c"))
    assert sorted(real.manager.table.by_model) == ["a", "c"]


def test_nothing_is_evicted_that_is_pinned_or_in_use() -> None:
    real = Real(max_models=2)
    real.manager.load_model(model("pinned", pinned=True))
    real.manager.load_model(model("used"))
    with (
        real.manager.lease("used"),
        pytest.raises(MaxModels, match=r"pinned.*in use|in use.*pinned"),
    ):
        real.manager.load_model(model("c"))
    assert sorted(real.manager.table.by_model) == ["pinned", "used"]


def test_a_model_that_is_too_large_is_refused_with_who_holds_what(real: Real) -> None:
    real.manager.load_model(model("a", pinned=True))
    real.files.estimates_mb["big"] = 95.0
    with pytest.raises(InsufficientMemory, match=r"needs 95 MB.*a 10 MB \(pinned\)"):
        real.manager.load_model(model("big"))


def test_an_estimate_above_the_models_own_limit_is_refused_before_loading(real: Real) -> None:
    with pytest.raises(OverMemoryLimit, match="max_memory_mb is 5"):
        real.manager.load_model(model("a", max_memory_mb=5))
    assert real.runtime.started == []


def test_a_model_that_turns_out_larger_than_its_limit_is_given_back(real: Real) -> None:
    real.runtime.sizes_mb["a"] = 60.0
    with pytest.raises(OverMemoryLimit, match="takes 60 MB"):
        real.manager.load_model(model("a", max_memory_mb=20))
    assert real.runtime.open_models == []
    assert real.manager.list_models() == []


@pytest.mark.parametrize("error", [broken(), SystemExit(3), KeyboardInterrupt(), ValueError("x")])
def test_whatever_a_loader_raises_ends_only_that_load(real: Real, error: BaseException) -> None:
    real.runtime.failures["a"] = error
    with pytest.raises(LoadError) as raised:
        real.manager.load_model(model("a"))
    assert raised.value.reason == "LoadFailed"
    real.manager.load_model(model("b"))
    assert list(real.manager.table.by_model) == ["b"]


def test_what_the_users_code_raised_is_logged_whole_at_debug_only(
    real: Real, caplog: pytest.LogCaptureFixture
) -> None:
    """`explain` promises the traceback to those who ask for it."""
    failure = broken()
    failure.__cause__ = ValueError("no such thing as 7 heads")
    real.runtime.failures["a"] = failure
    for level, shown in (("INFO", False), ("DEBUG", True)):
        caplog.clear()
        caplog.set_level(level, "splitlearn_manager")
        with pytest.raises(LoadError):
            real.manager.load_model(model("a"))
        assert ("ValueError: no such thing as 7 heads" in caplog.text) is shown


def test_a_second_load_of_an_id_is_refused(real: Real) -> None:
    real.manager.load_model(model("a"))
    with pytest.raises(OperationInProgress) as raised:
        real.manager.load_model(model("a"))
    assert raised.value.reason == "AlreadyLoaded"


def test_a_reload_never_leaves_the_model_unserved(real: Real) -> None:
    """Version 1.0 unloaded first: downtime, and a broken new file left no model at all."""
    real.manager.load_model(model("a"))
    unserved: list[int] = []
    real.manager.on_change(lambda: unserved.extend([] if real.manager.table.all else [1]))
    real.manager.reload_model("a")
    real.runtime.failures["a"] = broken()
    with pytest.raises(LoadError, match="broken"):
        real.manager.reload_model("a")
    assert real.manager.get_model_info("a")["state"] == "READY"
    assert unserved == []


def test_a_reload_without_room_for_both_goes_in_the_models_place(real: Real) -> None:
    real.runtime.sizes_mb["a"] = 60.0
    real.manager.load_model(model("a"))
    assert real.manager.reload_model("a") is True
    assert len(real.runtime.started) == 2
    assert len(real.runtime.open_models) == 1


def test_a_reload_in_the_models_place_does_not_wait_for_requests_that_do_not_end(
    real: Real,
) -> None:
    """It waited for ever."""
    real.runtime.sizes_mb["a"] = 60.0
    real.manager.load_model(model("a", drain_timeout_s=0.01))
    lease = real.manager.lease("a")
    with pytest.raises(OperationInProgress, match="its new version is loaded when") as raised:
        real.manager.reload_model("a")
    assert raised.value.reason == "DrainOverdue"
    assert len(real.runtime.started) == 1
    lease.release()
    real.manager._wait(lambda: len(real.manager.table.all) == 1)
    assert len(real.runtime.started) == 2


def test_unloading_waits_for_running_requests() -> None:
    """Version 1.0 took the model away under them."""
    real = Real()
    real.manager.load_model(model("a"))
    lease = real.manager.lease("a")
    running = real.runtime.running[0]
    draining = threading.Event()
    real.manager.on_change(lambda: None if real.manager.table.all else draining.set())
    unloading = in_thread(lambda: real.manager.unload_model("a"))
    assert draining.wait(DEADLINE_S)
    assert not running.closed
    with pytest.raises(ModelUnavailable):
        real.manager.lease("a")
    lease.release()
    unloading.join(DEADLINE_S)
    assert not unloading.is_alive()
    assert running.closed
    assert real.manager.get_model("a") is None


def test_an_unload_right_after_a_reload_waits_for_the_old_version_to_go(real: Real) -> None:
    real.manager.load_model(model("a"))
    old = real.manager.lease("a")
    real.manager.reload_model("a")
    unloading = in_thread(lambda: real.manager.unload_model("a"))
    assert real.runtime.running[0].closed is False
    old.release()
    unloading.join(DEADLINE_S)
    assert not unloading.is_alive()
    assert real.runtime.open_models == []
    assert real.manager.list_models() == []


def test_unknown_models_are_not_found(real: Real) -> None:
    for call in (
        real.manager.unload_model,
        real.manager.reload_model,
        real.manager.get_model_info,
        real.manager.lease,
    ):
        with pytest.raises(ModelNotFound, match="ghost"):
            call("ghost")
    assert real.manager.get_model("ghost") is None


def test_what_a_file_declares_is_not_unloaded_from_python(real: Real) -> None:
    instance = real.manager.begin_load(ModelSpec.of(model("a")), Owner.DIRECTORY, "cpu", 10.0)
    assert instance is not None
    real.manager._wait(lambda: instance.state is State.READY)
    with pytest.raises(SplitlearnError) as raised:
        real.manager.unload_model("a")
    assert raised.value.reason == "OwnedByDirectory"
    assert instance.state is State.READY


def test_a_load_runs_beside_serving() -> None:
    runtime = GatedRuntime()
    real = Real(runtime)
    runtime.gate.set()
    real.manager.load_model(model("a"))
    runtime.gate.clear()
    runtime.began.clear()
    loading = in_thread(lambda: real.manager.load_model(model("slow")))
    assert runtime.began.wait(DEADLINE_S)
    with real.manager.lease("a") as lease:
        assert lease.instance.running is not None
    with pytest.raises(ModelUnavailable, match="LOADING"):
        real.manager.lease("slow")
    runtime.gate.set()
    loading.join(DEADLINE_S)
    assert sorted(real.manager.table.by_model) == ["a", "slow"]


def test_a_load_past_its_time_is_given_up_and_its_memory_stays_charged_until_it_is_back() -> None:
    bench = Bench()
    spec = ModelSpec.of(model("a", load_timeout_s=5.0))
    instance = bench.manager.begin_load(spec, Owner.API, "cpu", 40.0)
    assert instance is not None
    assert bench.manager.tick() == 5.0
    bench.clock.advance(5.0)
    bench.manager.tick()
    assert instance.state is State.FAILED
    outcome = bench.manager.snapshot().outcomes["a"]
    assert outcome.reason == "LoadTimeout"
    assert bench.manager.snapshot().ledger.used_mb("cpu") == 40.0
    bench.executor.run_all()
    assert bench.runtime.open_models == []
    assert bench.manager.snapshot().ledger.used_mb("cpu") == 0.0
    assert bench.manager.table.all == ()


def test_a_drain_past_its_time_is_reported_once_and_the_model_stays_until_the_end() -> None:
    bench = Bench()
    bench.manager.begin_load(ModelSpec.of(model("a", drain_timeout_s=3.0)), Owner.API, "cpu", 10.0)
    bench.executor.run_all()
    reported: list[str] = []
    bench.manager.on_event(lambda event: reported.append(str(event.kind)))
    lease = bench.manager.lease("a")
    bench.manager.begin_unload("a", "Requested")
    bench.clock.advance(3.0)
    bench.manager.tick()
    bench.manager.tick()
    assert reported == ["DrainOverdue"]
    assert not bench.executor.waiting
    lease.release()
    bench.executor.run_all()
    assert reported == ["DrainOverdue", "Unloaded"]


def lingering(bench: Bench, mb: float = 60.0) -> None:
    """A copy of `a` has a request that does not end."""
    bench.manager.begin_load(ModelSpec.of(model("a", drain_timeout_s=3.0)), Owner.API, "cpu", mb)
    bench.runtime.sizes_mb["a"] = mb
    bench.executor.run_all()
    bench.manager.lease("a")
    bench.manager.begin_unload("a", "Requested")
    bench.clock.advance(3.0)


def test_a_drain_past_its_time_holds_no_other_operation_on_its_model_up() -> None:
    bench = Bench()
    lingering(bench)
    spec = ModelSpec.of(model("a"), generation=2)
    with pytest.raises(OperationInProgress):
        bench.manager.begin_load(spec, Owner.API, "cpu", 60.0)
    bench.manager.tick()
    assert bench.manager.begin_load(spec, Owner.API, "cpu", 60.0)
    bench.executor.run_all()
    assert bench.manager.snapshot().ledger.used_mb("cpu") == 120.0
    assert bench.manager.begin_evict("a", bench.manager.table.all[0].key, "MadeRoom")
    bench.executor.run_all()
    assert bench.manager.snapshot().ledger.used_mb("cpu") == 60.0, "the first one has its request"


def test_python_waits_for_no_room_that_a_drain_past_its_time_has() -> None:
    """Seen to wait for ever."""
    bench = Bench(budgets_mb={"cpu": 100.0})
    lingering(bench)
    bench.files.estimates_mb["b"] = 60.0
    waited: list[bool] = []

    def time_passes(done: Callable[[], bool], **_: object) -> None:
        waited.append(done())
        if not waited[-1]:
            bench.manager.tick()
        assert done(), "nothing else will happen"

    bench.manager._wait = time_passes  # type: ignore[method-assign]
    with pytest.raises(InsufficientMemory, match="do not end"):
        bench.manager.load_model(model("b"))
    assert False in waited


def test_files_that_change_while_they_are_read_are_not_served() -> None:
    bench = Bench()

    class Changing(FakeRuntime):
        def start(self, config: ModelConfig, device: str) -> FakeRunning:
            bench.files.fingerprints["a"] = "w1"
            return super().start(config, device)

    runtime = Changing()
    bench.manager._reader._runtime = runtime  # type: ignore[assignment]
    bench.manager.begin_load(ModelSpec.of(model("a"), weights="w0"), Owner.DIRECTORY, "cpu", 10.0)
    bench.executor.run_all()
    assert bench.manager.snapshot().outcomes["a"].reason == WeightsChanged.__name__
    assert runtime.open_models == []
    assert bench.manager.table.all == ()


def test_shutdown_unloads_everything_and_refuses_what_comes_after(real: Real) -> None:
    for model_id in ("a", "b"):
        real.manager.load_model(model(model_id))
    real.manager.shutdown()
    assert real.runtime.open_models == []
    with pytest.raises(ModelUnavailable) as raised:
        real.manager.load_model(model("c"))
    assert raised.value.reason == "ShuttingDown"


def test_a_listener_that_fails_breaks_nothing(real: Real) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("listener")

    real.manager.on_change(fail)
    real.manager.on_event(fail)
    assert real.manager.load_model(model("a")) is True
