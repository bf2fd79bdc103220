"""`optimize: compile`: what is compiled, where it is kept, and that unloading gives it back."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from splitlearn_comm.core import ModelComputeFunction
from splitlearn_manager.core.model_loader import ModelLoader
from splitlearn_manager.errors import CannotOptimize, TerminalLoadError
from splitlearn_manager.runtime.optimize import compiled
from splitlearn_manager.runtime.optimize.compiled import Compiled
from splitlearn_manager.runtime.optimize.compiler import COMPILER
from splitlearn_manager.runtime.thread import TRAINED, RunningInThreads, ThreadRuntime
from support.models import model_config, save_mlp
from support.optimizable import mlp, needs_compiler, optimized

CACHE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture
def cache(compiled: Path) -> Path:
    return compiled


@pytest.fixture
def of_nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(CACHE, raising=False)
    yield
    assert CACHE not in os.environ


def start(path: Path, cache: Path, **keys: object) -> RunningInThreads:
    config = model_config(path, optimize="compile", trusted=True, batch_size=4, **keys)
    return ThreadRuntime(ModelLoader(), cache).start(config, "cpu")


def answer(function: object, x: torch.Tensor) -> torch.Tensor:
    found = function.compute(x)  # type: ignore[attr-defined]
    assert isinstance(found, torch.Tensor)
    return found


@needs_compiler
@pytest.mark.usefixtures("of_nobody")
def test_a_compiled_model_answers_in_all_threads_and_is_kept_for_the_next_load(
    tmp_path: Path, cache: Path
) -> None:
    original = save_mlp(tmp_path / "m.pt")
    running = start(tmp_path / "m.pt", cache)
    assert running.notes[0].startswith("optimize: compile in ")
    assert running.memory_mb == sum(p.nbytes for p in original.parameters()) / 2**20
    assert cache.stat().st_mode & 0o777 == 0o700
    kept = set(cache.rglob("*.so"))
    assert kept
    found: list[torch.Tensor] = []
    inputs = [torch.rand(batch, 8) for batch in (1, 2, 3, 4, 9)]
    thread = threading.Thread(
        target=lambda: found.extend(answer(running.compute_function, x) for x in inputs)
    )
    thread.start()
    thread.join()
    for x, got in zip(inputs, found, strict=True):
        assert torch.allclose(got, original(x), atol=1e-6)
    again = start(tmp_path / "m.pt", cache)
    assert set(cache.rglob("*.so")) == kept
    assert torch.equal(answer(again.compute_function, inputs[0]), found[0])


@needs_compiler
@pytest.mark.usefixtures("of_nobody")
def test_no_request_waits_for_the_compiler(tmp_path: Path, cache: Path) -> None:
    """An input that fits nothing of what was compiled is the plain module's."""
    module = mlp()
    function, _ = optimized(module, "compile", (-1, 8), cache_dir=cache)
    compiles = len(torch._dynamo.utils.compilation_time_metrics.get("compile_inner", []))
    for x in (torch.rand(3, 8), torch.rand(40, 8), torch.rand(8, 3).t(), torch.rand(0, 8)):
        assert torch.allclose(answer(function, x), module(x), atol=1e-6)
    function._rule = type(function._rule)(torch.float32)
    deeper = torch.rand(2, 5, 8)
    assert torch.allclose(answer(function, deeper), module(deeper), atol=1e-6)
    assert len(torch._dynamo.utils.compilation_time_metrics.get("compile_inner", [])) == compiles


@needs_compiler
@pytest.mark.usefixtures("of_nobody")
def test_ten_loads_and_unloads_leave_nothing_and_others_go_on(tmp_path: Path, cache: Path) -> None:
    save_mlp(tmp_path / "m.pt")
    other = start(tmp_path / "m.pt", cache)
    x = torch.rand(2, 8)
    expected = answer(other.compute_function, x)
    form = other.compute_function._stand_in  # type: ignore[attr-defined]
    assert isinstance(form, Compiled)
    left: list[weakref.ref[object]] = []
    for _ in range(10):
        running = start(tmp_path / "m.pt", cache)
        own = running.compute_function._stand_in  # type: ignore[attr-defined]
        scope = own._own.__globals__
        left += [weakref.ref(p) for p in running.module.parameters()]
        compiled_for_it = [v for k, v in scope.items() if k.startswith("__compiled_fn")]
        assert compiled_for_it
        left += [weakref.ref(v) for v in compiled_for_it]
        del compiled_for_it, own, scope
        running.close()
        del running
    gc.collect()
    assert not [ref for ref in left if ref() is not None]
    assert torch.equal(answer(other.compute_function, x), expected)
    assert any(k.startswith("__compiled_fn") and v for k, v in form._own.__globals__.items())  # type: ignore[attr-defined]


@needs_compiler
@pytest.mark.usefixtures("of_nobody")
def test_a_step_ends_it_with_a_note(tmp_path: Path, cache: Path) -> None:
    original = save_mlp(tmp_path / "m.pt")
    running = start(tmp_path / "m.pt", cache)
    function, x = running.compute_function, torch.rand(2, 8)
    output = function.forward_for_training(x, "f")
    assert TRAINED not in running.notes
    function.backward("f", torch.ones_like(output), learning_rate=0.1)
    assert running.notes[-1] == TRAINED
    original(x).sum().backward()
    with torch.no_grad():
        for p in original.parameters():
            assert p.grad is not None
            p -= 0.1 * p.grad
    assert torch.allclose(answer(function, x), original(x), atol=1e-6)


class Refusing(nn.Module):
    """Decides by values, in the middle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if bool(x.sum() > 0) else x


def test_what_cannot_be_compiled_in_one_piece_is_refused_in_one_line() -> None:
    with pytest.raises(CannotOptimize, match=r"torch\.compile failed: ") as caught:
        optimized(nn.Sequential(mlp(), Refusing()), "compile", (-1, 8))
    assert caught.value.reason == "CompileFailed"
    assert "\n" not in caught.value.message
    assert isinstance(caught.value, TerminalLoadError)


def test_without_a_compiler_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(CannotOptimize, match="no no-such-compiler") as caught:
        optimized(mlp(), "compile", (-1, 8))
    assert caught.value.reason == "NoCompiler"
    _, found = optimized(mlp(), "auto", (-1, 8))
    assert "compile not: NoCompiler: " in found.notes[0]


def test_a_full_disk_is_worth_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("backend failed") from OSError(28, "No space left on device")

    monkeypatch.setattr(Compiled, "_compile", full)
    monkeypatch.setattr(compiled, "missing_compiler", lambda: None)
    with pytest.raises(Exception, match="backend failed") as caught:
        optimized(mlp(), "compile", (-1, 8))
    assert not isinstance(caught.value, TerminalLoadError)
    assert caught.value.reason == "CompileFailed"  # type: ignore[attr-defined]


def test_a_directory_that_somebody_has_named_is_left_in_peace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE, "/theirs")
    with COMPILER.turn(tmp_path / "ours"):
        assert os.environ[CACHE] == "/theirs"
    assert os.environ[CACHE] == "/theirs"
    assert not (tmp_path / "ours").exists()


@pytest.mark.usefixtures("of_nobody")
def test_nodes_in_one_process_keep_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with COMPILER.turn(tmp_path / name):
            assert os.environ[CACHE] == str(tmp_path / name)


def test_a_function_of_no_model_is_not_kept(cache: Path) -> None:
    form = Compiled(ModelComputeFunction(mlp()), cache)
    own = weakref.ref(form._own)
    del form
    assert own() is None
