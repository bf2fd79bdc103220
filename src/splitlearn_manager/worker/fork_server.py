"""Starts workers within milliseconds: a process that has imported torch and forks on request.

    node ──{"op": "fork"}, descriptors──► fork server ──fork──► worker
         ◄─{"op": "ended", "pid", "status"}──┘

Run as `python -m splitlearn_manager.worker.fork_server DESCRIPTOR`. It has one thread when it forks and
never runs a model, so that a fork of it is clean. What a fork needs is imported by a second one before, so
that workers are ended, and their ends told, meanwhile. It ends with the node, whose end of the socket closes
then, and the workers end with it: the kernel kills them (Linux), or they read the end of their own sockets.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import random
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from splitlearn_manager.runtime.channel import Channel, Closed, Message

_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """Serve until the node is gone."""
    # Ctrl-C goes to all processes of a terminal; what becomes of workers is the node's to say.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _import_all(("torch", "splitlearn_manager.worker.model_worker"))
    channel = Channel(socket.socket(fileno=descriptor))
    channel.send({"op": "ready"})
    woken, wakes = os.pipe()
    for end in (woken, wakes):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    children: set[int] = set()

    def attend() -> None:
        """Wait until something has happened, and see to it."""
        for key, _ in selector.select():
            if key.fileobj is channel:
                obey()
                while channel.has_message:
                    obey()
            else:
                with suppress(BlockingIOError):
                    os.read(woken, 4096)
        _reap(channel, children)

    def obey() -> None:
        _obey(channel, children, (descriptor, woken, wakes, selector), attend)

    try:
        while True:
            attend()
    except Closed:
        for pid in children:
            _kill(pid)


def _obey(
    channel: Channel, children: set[int], ours: tuple[Any, ...], attend: Callable[[], None]
) -> None:
    message, descriptors = channel.receive()
    if message["op"] == "kill":
        # Only what has not been reaped: its id is nobody else's yet.
        if message["pid"] in children:
            _kill(message["pid"])
        return
    _import_beside(message.get("import", ()), ours[2], attend)
    parent = os.getpid()
    answer: Message
    try:
        pid = os.fork()
    except OSError as error:
        # No room for another process: that is no reason to end those that are there.
        answer = {"op": "refused", "why": str(error)}
    else:
        if pid == 0:
            _become_worker(parent, descriptors, ours)
        _make_leader(pid)
        children.add(pid)
        answer = {"op": "forked", "pid": pid}
    for descriptor in descriptors:
        os.close(descriptor)
    channel.send(answer)


def _make_leader(pid: int) -> None:
    """Give a worker a process group of its own; both sides do, so that it is so whoever comes first.

    A signal that a model sends to its group reaches no other worker, and not the node; and what processes it
    has started end with it.
    """
    with suppress(OSError):
        os.setpgid(pid, pid)


def _kill(pid: int) -> None:
    """A worker that has not been reaped, and its group."""
    os.kill(pid, signal.SIGKILL)
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def _reap(channel: Channel, children: set[int]) -> None:
    for pid in tuple(children):
        # Looked at first, because its id, which is its group's, is nobody else's until it is reaped.
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            continue
        _kill(pid)
        _, status = os.waitpid(pid, 0)
        children.discard(pid)
        told: Message = {"op": "ended", "pid": pid, "status": os.waitstatus_to_exitcode(status)}
        channel.send(told)


def _become_worker(parent: int, descriptors: list[int], ours: tuple[Any, ...]) -> NoReturn:
    code = 1
    try:
        control, out, err = descriptors
        end_with_parent(parent)
        _make_leader(os.getpid())
        server, woken, wakes, selector = ours
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        selector.close()
        for descriptor in (server, woken, wakes):
            os.close(descriptor)
        os.dup2(out, 1)
        os.dup2(err, 2)
        for descriptor in (out, err):
            os.close(descriptor)
        _draw_anew()
        from splitlearn_manager.worker.model_worker import work

        work(socket.socket(fileno=control))
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process when that one is gone, where it can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _draw_anew() -> None:
    """Random numbers that are not those of all other workers."""
    import numpy as np
    import torch

    random.seed()
    np.random.seed(random.getrandbits(32))
    torch.seed()


def _import_beside(names: Any, wakes: int, attend: Callable[[], None]) -> None:
    """Import modules in another thread, which has ended when this returns, and attend meanwhile.

    The node asks for nothing but ends then: it waits for this fork before it asks for another one.
    """
    missing = [name for name in names if name not in sys.modules]
    if not missing:
        return
    done = threading.Event()

    def import_them() -> None:
        _import_all(missing)
        done.set()
        with suppress(BlockingIOError):
            os.write(wakes, b"\0")

    importing = threading.Thread(target=import_them, daemon=True)
    importing.start()
    while not done.is_set():
        attend()
    importing.join()


def _import_all(names: Any) -> None:
    """What cannot be imported here is told by the load that needs it."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"the fork server cannot import {name}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
