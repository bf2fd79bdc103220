"""That the watcher wakes up, stays quiet, survives and ends. Real files, real events."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from watchdog.events import (
    FileSystemEvent,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from splitlearn_manager.desired import watcher as module
from splitlearn_manager.desired.watcher import RETRY_S, Watcher

DEADLINE_S = 20.0
KEPT = Path("/proc/sys/fs/inotify/max_queued_events")
LOCAL = "1 1 0:1 / / rw - ext4 /dev/vda rw\n"


class Wakes:
    """Which paths' events have woken someone up."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._woken = threading.local()
        self._paths: list[str] = []
        self.count = 0

    def wake(self) -> None:
        self._woken.now = True
        with self._changed:
            self.count += 1
            self._changed.notify_all()

    def around(self, dispatch: Callable[[], None], event: FileSystemEvent) -> None:
        self._woken.now = False
        dispatch()
        if self._woken.now:
            with self._changed:
                self._paths += [os.fsdecode(event.src_path), os.fsdecode(event.dest_path)]
                self._changed.notify_all()

    def heard(self, path: Path, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: str(path) in self._paths, timeout_s)

    def wait_beyond(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.count > count, DEADLINE_S)

    def wait_for(self, path: Path) -> None:
        assert self.heard(path, DEADLINE_S), f"nothing for {path}, only for {self._paths}"


@pytest.fixture
def wakes(monkeypatch: pytest.MonkeyPatch) -> Wakes:
    wakes = Wakes()
    original = module._Handler.dispatch

    def dispatch(self: module._Handler, event: FileSystemEvent) -> None:
        wakes.around(lambda: original(self, event), event)

    monkeypatch.setattr(module._Handler, "dispatch", dispatch)
    return wakes


@pytest.fixture
def watch(wakes: Wakes) -> Iterator[Callable[..., Watcher]]:
    started: list[Watcher] = []

    def make(root: Path, *extra: Path) -> Watcher:
        watcher = Watcher(root, wakes.wake, extra, mountinfo=LOCAL)
        started.append(watcher)
        watcher.start()
        assert watcher.mode in ("inotify", "fsevents"), watcher.reason
        assert watcher.reason == ""
        return watcher

    yield make
    for watcher in started:
        watcher.stop()


Start = Callable[..., Watcher]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = Path(os.path.realpath(tmp_path)) / "desired"
    path.mkdir()
    return path


def write_until_heard(root: Path, prefix: str, watcher: Watcher, wakes: Wakes) -> None:
    """Turn the loop and write, until a write is heard."""
    deadline = time.monotonic() + DEADLINE_S
    for number in itertools.count():
        watcher.refresh()
        path = root / f"{prefix}{number}.yaml"
        path.write_text("x")
        if wakes.heard(path, 0.05):
            return
        assert time.monotonic() < deadline


def turn_link(link: Path, target: str) -> None:
    temporary = link.with_name("turn.tmp")
    temporary.symlink_to(target)
    os.replace(temporary, link)


def test_writing_renaming_and_deleting_wake_up(root: Path, watch: Start, wakes: Wakes) -> None:
    watch(root)
    (root / "a.yaml").write_text("x")
    wakes.wait_for(root / "a.yaml")
    (root / "a.yaml").rename(root / "b.yaml")
    wakes.wait_for(root / "b.yaml")
    (root / "c.yaml").write_text("x")
    wakes.wait_for(root / "c.yaml")
    (root / "c.yaml").unlink()
    (root / "new").mkdir()
    wakes.wait_for(root / "new")
    (root / "new" / "d.yaml").write_text("x")
    wakes.wait_for(root / "new" / "d.yaml")


def test_reading_wakes_nobody_up(root: Path, watch: Start, wakes: Wakes) -> None:
    (root / "a.yaml").write_text("x")
    watch(root)
    before = wakes.count
    for _ in range(200):
        (root / "a.yaml").read_text()
        list(os.scandir(root))
    (root / "end.yaml").write_text("x")
    wakes.wait_for(root / "end.yaml")
    assert wakes.count - before < 10


def test_a_permission_that_changes_wakes_up(root: Path, watch: Start, wakes: Wakes) -> None:
    """The kernel reports it as an attribute of the file, and as nothing else."""
    (root / "a.yaml").write_text("x")
    watch(root)
    (root / "a.yaml").chmod(0o600)
    wakes.wait_for(root / "a.yaml")


@pytest.mark.skipif(not KEPT.exists(), reason="this system has no inotify")
def test_events_that_the_kernel_dropped_wake_up(
    root: Path, watch: Start, wakes: Wakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of those it kept is passed on: watchdog discards what it has not passed on by then."""
    watcher = watch(root)
    monkeypatch.setattr(module._Handler, "dispatch", lambda self, event: None)
    before = wakes.count
    with watcher._observer._inotify_fd._lock:  # it reads no further, as if the process had no turn
        for number in range(2 * int(KEPT.read_text())):
            (root / f"noise-{number % 2}").touch()
    wakes.wait_beyond(before)


def test_a_configmap_swap_that_names_no_yaml_file_wakes_up(
    root: Path, watch: Start, wakes: Wakes
) -> None:
    for version in ("..1", "..2"):
        (root / version).mkdir()
        (root / version / "a.yaml").write_text(version)
    (root / "..data").symlink_to("..1")
    (root / "a.yaml").symlink_to("..data/a.yaml")
    watch(root)
    turn_link(root / "..data", "..2")
    wakes.wait_for(root / "..data")


def test_a_linked_root_is_heard_before_and_after_its_link_is_turned(
    root: Path, watch: Start, wakes: Wakes
) -> None:
    base = root.parent
    (base / "rev2").mkdir()
    link = base / "current"
    link.symlink_to("desired")
    watcher = watch(link)
    (root / "a.yaml").write_text("x")
    wakes.wait_for(root / "a.yaml")
    turn_link(link, "rev2")
    wakes.wait_for(link)
    watcher.refresh()
    (base / "rev2" / "b.yaml").write_text("x")
    wakes.wait_for(base / "rev2" / "b.yaml")


@pytest.mark.parametrize("times", [1, 3])
def test_a_deleted_and_recreated_root_is_heard_again(
    root: Path, watch: Start, wakes: Wakes, times: int
) -> None:
    watcher = watch(root)
    for turn in range(times):
        shutil.rmtree(root)
        wakes.wait_for(root)
        watcher.refresh()
        root.mkdir()
        watcher.refresh()
        # The kernel may tell of the old directory's end only now, when the new one, which may well have
        # the old one's inode, is already taken for it; so it takes another turn of the loop.
        write_until_heard(root, f"{turn}-", watcher, wakes)


def test_a_root_that_does_not_exist_is_heard_when_it_appears(
    root: Path, watch: Start, wakes: Wakes
) -> None:
    later = root / "not" / "yet"
    watcher = watch(later)
    (root / "not").mkdir()
    wakes.wait_for(root / "not")
    watcher.refresh()
    later.mkdir()
    wakes.wait_for(later)
    watcher.refresh()
    (later / "a.yaml").write_text("x")
    wakes.wait_for(later / "a.yaml")


def test_weights_outside_the_root_are_heard_and_their_neighbours_are_not(
    root: Path, watch: Start, wakes: Wakes
) -> None:
    weights = root.parent / "weights"
    weights.mkdir()
    watcher = watch(root)
    watcher.watch_paths([weights / "m.pt"])
    before = wakes.count
    for i in range(50):
        (weights / f"other{i}").write_text("x")
    (weights / "m.pt").write_text("x")
    wakes.wait_for(weights / "m.pt")
    assert wakes.count - before < 10
    watcher.watch_paths([])
    assert set(watcher._armed) == {str(root), str(root.parent)}


def test_a_file_linked_from_elsewhere_is_heard(root: Path, watch: Start, wakes: Wakes) -> None:
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.yaml").write_text("x")
    (root / "a.yaml").symlink_to(elsewhere / "a.yaml")
    watch(root, root / "a.yaml")
    (elsewhere / "a.yaml").write_text("y")
    wakes.wait_for(elsewhere / "a.yaml")


def test_no_thread_and_no_file_descriptor_outlives_stop(root: Path, wakes: Wakes) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0

    Watcher(root, wakes.wake, mountinfo=LOCAL).stop()
    threads, files = set(threading.enumerate()), open_files()
    for _ in range(3):
        watcher = Watcher(root, wakes.wake, [root.parent / "m.pt"], mountinfo=LOCAL)
        watcher.start()
        watcher.stop()
        assert (watcher.mode, watcher.reason) == ("polling", "stopped")
        watcher.refresh()
        watcher.stop()
    assert set(threading.enumerate()) <= threads
    assert open_files() <= files


def refuse(error: Exception) -> Callable[[], BaseObserver]:
    def make() -> BaseObserver:
        raise error

    return make


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "fs.inotify.max_user_instances"),
        (OSError(errno.ENOSYS, "Function not implemented"), "Function not implemented"),
        (ImportError("no inotify here"), "no inotify here"),
    ],
)
def test_without_inotify_the_mode_is_polling_and_says_why(
    root: Path, wakes: Wakes, error: Exception, reason: str
) -> None:
    watcher = Watcher(root, wakes.wake, observer=refuse(error), mountinfo=LOCAL)
    watcher.start()
    watcher.refresh()
    assert watcher.mode == "polling"
    assert reason in watcher.reason
    watcher.stop()


class _Limited(Observer):  # type: ignore[misc, valid-type]
    """An observer on a machine that has few watches left."""

    allowed = 0

    def schedule(self, *args: object, **kwargs: object) -> object:
        if len(self.emitters) >= self.allowed:
            raise OSError(errno.ENOSPC, "inotify watch limit reached")
        return super().schedule(*args, **kwargs)


def limited(allowed: int) -> Callable[[], BaseObserver]:
    return type(Observer.__name__, (_Limited,), {"allowed": allowed})


def test_a_watch_limit_that_the_root_meets_means_polling(root: Path, wakes: Wakes) -> None:
    threads = set(threading.enumerate())
    watcher = Watcher(root, wakes.wake, observer=limited(1), mountinfo=LOCAL)
    watcher.start()
    assert watcher.mode == "polling"
    assert "fs.inotify.max_user_watches is reached" in watcher.reason
    assert set(threading.enumerate()) <= threads


def test_a_watch_limit_that_only_weights_meet_leaves_the_root_heard(
    root: Path, wakes: Wakes
) -> None:
    far = root.parent / "0" / "m.pt"
    far.parent.mkdir()
    watcher = Watcher(root, wakes.wake, [far], observer=limited(2), mountinfo=LOCAL)
    watcher.start()
    assert watcher.mode in ("inotify", "fsevents")
    assert (
        watcher.reason == f"{far.parent} cannot be watched: fs.inotify.max_user_watches is reached"
    )
    (root / "a.yaml").write_text("x")
    wakes.wait_for(root / "a.yaml")
    watcher.stop()


def test_after_a_failure_watching_is_tried_again_later(root: Path, wakes: Wakes) -> None:
    now = 0.0
    makers = [refuse(OSError(errno.EMFILE, "Too many open files")), Observer]
    watcher = Watcher(
        root,
        wakes.wake,
        observer=lambda: makers.pop(0)(),
        mountinfo=LOCAL,
        clock=lambda: now,
    )
    watcher.start()
    watcher.refresh()
    assert watcher.mode == "polling"
    now += RETRY_S
    watcher.refresh()
    assert watcher.mode != "polling"
    watcher.stop()


def test_when_the_thread_that_passes_events_on_has_ended_the_mode_is_polling_and_says_so(
    root: Path, wakes: Wakes
) -> None:
    made: list[BaseObserver] = []

    def make() -> BaseObserver:
        made.append(Observer())
        return made[-1]

    now = [0.0]
    watcher = Watcher(root, wakes.wake, observer=make, mountinfo=LOCAL, clock=lambda: now[0])
    watcher.start()
    try:
        made[0].stop()
        made[0].join()
        watcher.refresh()
        assert watcher.mode == "polling"
        assert "has ended" in watcher.reason
        now[0] += module.RETRY_S
        watcher.refresh()
        assert watcher.mode == "inotify"
        write_until_heard(root, "again", watcher, wakes)
    finally:
        watcher.stop()


def test_when_the_thread_of_one_directory_has_ended_it_is_watched_anew(
    root: Path, wakes: Wakes
) -> None:
    made: list[BaseObserver] = []

    def make() -> BaseObserver:
        made.append(Observer())
        return made[-1]

    watcher = Watcher(root, wakes.wake, observer=make, mountinfo=LOCAL)
    watcher.start()
    try:
        for emitter in set(made[0].emitters):
            emitter.stop()
            emitter.join()
        watcher.refresh()
        assert watcher.mode == "inotify"
        assert all(emitter.is_alive() for emitter in made[0].emitters)
        write_until_heard(root, "again", watcher, wakes)
    finally:
        watcher.stop()


def test_a_network_file_system_is_polled(root: Path, wakes: Wakes) -> None:
    mountinfo = LOCAL + f"2 1 0:2 / {root} rw - nfs4 server:/x rw\n"
    watcher = Watcher(root, wakes.wake, mountinfo=mountinfo)
    watcher.start()
    assert watcher.mode == "polling"
    assert watcher.reason == f"{root} is on a file system (nfs4) that may not report changes"
    watcher.stop()
