"""The gate that keeps builds from disturbing one another, and never for long."""

from __future__ import annotations

import threading

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


def test_quiet_restores_what_was_set_once_the_last_one_leaves() -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    quiet = Quiet()
    with quiet:
        with quiet:
            assert not logging.is_progress_bar_enabled()
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
