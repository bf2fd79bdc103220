"""Faults of the system under a node: what is mounted, what is full, what inotify refuses.

Each says why where this machine does not permit it, and the test is skipped with that reason.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from splitlearn_manager.cli.asking import ask
from splitlearn_manager.server.state_dir import socket_of
from support.node import Node
from support.served import constant, declare, write_factory
from support.waiting import eventually

PRELOAD = Path(__file__).parent / "preload"

SETTINGS = {"max_models": 20, "settle_s": 0.1, "resync_s": 0.5, "max_workers": 20}


@contextmanager
def mounted(path: Path, *, size: str = "1m", read_only: bool = False) -> Iterator[Path]:
    """A file system of its own, in memory."""
    path.mkdir(parents=True, exist_ok=True)
    options = f"size={size}{',ro' if read_only else ''}"
    _or_skip(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], "mounting a tmpfs")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def without_inotify(limit: str, value: int) -> tuple[str, ...]:
    """A launcher under which the kernel grants no more than so many of `max_inotify_…`.

    The limit is that of a user namespace, so no other process of this machine notices.
    """
    _or_skip(["unshare", "-Ur", "true"], "a user namespace")
    script = f'echo {value} > /proc/sys/user/{limit} && exec "$@"'
    return ("unshare", "-Ur", "sh", "-c", script, "sh")


def _or_skip(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"{what} is not to be had here: {error}")
    if done.returncode:
        pytest.skip(f"{what} is not permitted here: {done.stderr.strip()}")


@contextmanager
def full(directory: Path) -> Iterator[None]:
    """No room in the file system of `directory` for as long as the `with` lasts."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        for size in (4096, 1):
            with suppress(OSError):
                while file.write(b"x" * size):
                    pass
    try:
        yield
    finally:
        filler.unlink()


def served(directory: Path, values: Mapping[str, float]) -> Path:
    """A directory with a model for each id, that answers its value."""
    directory.mkdir(parents=True, exist_ok=True)
    write_factory(directory)
    for model_id, value in values.items():
        declare(directory, model_id, config=constant(value))
    return directory


def wait_ready(node: Node, model_ids: Mapping[str, float]) -> None:
    for model_id in model_ids:
        node.wait_phase(model_id, "Ready")


def node_condition(node: Node, kind: str) -> dict[str, str]:
    """A condition of the node itself, as it tells on its control socket."""
    about = ask(socket_of(node.state_dir), "status", models=[])["node"]
    assert isinstance(about, dict)
    return next(dict(c) for c in about["conditions"] if c["type"] == kind)


def wait_condition(node: Node, kind: str, status: str, deadline_s: float = 30.0) -> dict[str, str]:
    def look() -> dict[str, str]:
        found = node_condition(node, kind)
        return found if found["status"] == status else {}

    return eventually(look, f"{kind} is {status}", deadline_s)


def wait_state_kept(node: Node, kept: bool) -> None:
    """Waits until the metrics say that its state is kept, or is not. Where there is no state directory
    there is no control socket either, so that cannot be asked."""
    line = f"splitlearn_state_kept {1.0 if kept else 0.0}"
    eventually(lambda: line in node.get("/metrics")[1].splitlines(), line)


def swap_link(link: Path, target: str) -> None:
    """Turns a symbolic link in one step, as kubelet and git-sync do."""
    beside = link.with_name(f"{link.name}_tmp")
    beside.symlink_to(target)
    os.replace(beside, link)
