"""Runs in a node before anything else, when a test put this directory on its PYTHONPATH.

Ends threads of the node when asked: `CHAOS_ENDS=FILE` names a file; once it exists, each thread whose class
is named in it is made to raise SystemExit. A thread that waits in the kernel does so when it wakes. Once
all have ended there is `FILE.ended`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading


def _end(names: set[str]) -> None:
    ending = [thread for thread in threading.enumerate() if type(thread).__name__ in names]
    for thread in ending:
        if hasattr(thread, "queue_events"):
            # Of watchdog, and most of its life inside a lock that it would never give back if anything
            # were raised there; no error of the system can be. So it ends between two events.
            thread.queue_events = sys.exit
        elif thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
            )
    for thread in ending:
        thread.join()


def _wait_for(path: str) -> None:
    pause = threading.Event()
    while not os.path.exists(path):
        pause.wait(0.05)
    with open(path) as file:
        _end(set(file.read().split()))
    with open(f"{path}.ended", "w"):
        pass


if "CHAOS_ENDS" in os.environ:
    threading.Thread(
        target=_wait_for, args=(os.environ["CHAOS_ENDS"],), name="chaos", daemon=True
    ).start()
