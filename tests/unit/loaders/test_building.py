"""The gate that keeps builds from disturbing one another, and never for long."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from splitlearn_manager.core.loaders.building import BuildGate, Quiet

DEADLINE_S = 20


def test_factories_run_side_by_side() -> None:
    gate = BuildGate()
    both = threading.Barrier(2)

    def run() -> None:
        with gate.factory():
            both.wait(DEADLINE_S)

    other = threading.Thread(target=run)
    other.start()
    run()
    other.join(DEADLINE_S)
    assert not both.broken


def test_an_exclusive_build_waits_for_factories_and_holds_them_off() -> None:
    gate = BuildGate(patience_s=DEADLINE_S)
    order: list[str] = []
    inside, finish, exclusive_begun = (threading.Event() for _ in range(3))

    def factory(name: str) -> None:
        with gate.factory():
            order.append(f"{name} begins")
            inside.set()
            finish.wait(DEADLINE_S)
            order.append(f"{name} ends")

    def exclusive() -> None:
        with gate.exclusive():
            order.append("exclusive begins")
            exclusive_begun.set()
            order.append("exclusive ends")

    first = threading.Thread(target=factory, args=("first",))
    first.start()
    assert inside.wait(DEADLINE_S)
    build = threading.Thread(target=exclusive)
    build.start()
    assert not exclusive_begun.wait(0.05)
    second = threading.Thread(target=factory, args=("second",))
    second.start()
    finish.set()
    for thread in (first, build, second):
        thread.join(DEADLINE_S)
    begins = order.index("exclusive begins")
    assert order[begins + 1] == "exclusive ends"
    assert begins > order.index("first ends")


def test_a_factory_that_hangs_holds_nothing_up_for_ever() -> None:
    gate = BuildGate(patience_s=0.01)
    inside, finish = threading.Event(), threading.Event()

    def hang() -> None:
        with gate.factory():
            inside.set()
            finish.wait(DEADLINE_S)

    hanging = threading.Thread(target=hang)
    hanging.start()
    assert inside.wait(DEADLINE_S)
    with gate.exclusive():
        passed = True
    with gate.factory():
        pass
    finish.set()
    hanging.join(DEADLINE_S)
    assert passed


def settings() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
    )


def test_what_a_factory_sets_for_torch_is_put_back() -> None:
    """Seen to leave all models after it float16 layers, or none with values."""
    gate, before = BuildGate(), settings()
    try:
        with pytest.raises(ZeroDivisionError), gate.factory():
            torch.set_default_dtype(torch.float16)
            torch.set_float32_matmul_precision("medium")
            torch.use_deterministic_algorithms(True)
            torch.set_default_device("meta")
            torch.set_grad_enabled(False)
            raise ZeroDivisionError
        assert settings() == before
    finally:
        reset()


def test_what_factories_set_side_by_side_is_put_back_when_the_last_one_returns() -> None:
    gate, before = BuildGate(), settings()
    inside, finish = threading.Event(), threading.Event()
    seen: list[torch.dtype] = []

    def other() -> None:
        with gate.factory():
            inside.set()
            assert finish.wait(DEADLINE_S)
            seen.append(torch.get_default_dtype())

    thread = threading.Thread(target=other)
    try:
        with gate.factory():
            torch.set_default_dtype(torch.float16)
            thread.start()
            assert inside.wait(DEADLINE_S)
        finish.set()
        thread.join(DEADLINE_S)
        # Nothing changes while a factory runs.
        assert seen == [torch.float16]
        assert settings() == before
    finally:
        finish.set()
        reset()


def test_nothing_is_put_back_in_the_midst_of_an_exclusive_build_that_went_ahead() -> None:
    gate, before = BuildGate(patience_s=0.01), settings()
    inside, finish = threading.Event(), threading.Event()

    def slow() -> None:
        with gate.factory():
            inside.set()
            assert finish.wait(DEADLINE_S)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        assert inside.wait(DEADLINE_S)
        with gate.exclusive():
            torch.set_default_dtype(torch.float16)
            finish.set()
            thread.join(DEADLINE_S)
            assert torch.get_default_dtype() is torch.float16
        assert settings() == before
    finally:
        finish.set()
        reset()


def reset() -> None:
    """For the tests that follow, should it not have been put back."""
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)


def test_quiet_restores_what_was_set_once_the_last_one_leaves() -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    quiet = Quiet()
    with quiet:
        with quiet:
            assert not logging.is_progress_bar_enabled()
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_factory_that_sets_nothing_brings_no_compiler() -> None:
    """Its import takes a second of each process's first load."""
    code = (
        "import sys, torch\n"
        "from splitlearn_manager.core.loaders.building import BUILD_GATE\n"
        "before = 'torch._inductor.config' in sys.modules\n"
        "with BUILD_GATE.factory():\n"
        "    torch.nn.Linear(2, 2)\n"
        "sys.exit(not before and 'torch._inductor.config' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
