"""How many forwards run at a time, and on how many processors each: set from the machine and the models.

One model alone has all processors for each forward. As many models as there are processors have one each, and
run side by side: that costs less than each of them on all. In between they share evenly.

`intra_op_threads` and `parallel_forwards` in server.yaml say otherwise, and so does `OMP_NUM_THREADS`, which
PyTorch follows by itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def processors(limit_file: Path = _CGROUP_LIMIT) -> int:
    """How many processors this process may use, by its affinity and its cgroup's `cpu.max`; at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    try:
        quota, period = limit_file.read_text().split()
        count = min(count, round(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no such file, or "max"
    return max(1, count)


class ThreadPlan:
    """What each forward may use.

    Args:
        processors: of the machine.
        ready: how many models are READY at the moment.
        environment: where `OMP_NUM_THREADS` is looked up.
    """

    def __init__(
        self,
        processors: int,
        ready: Callable[[], int],
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._processors = processors
        self._ready = ready
        self._left_to_torch = "OMP_NUM_THREADS" in environment
        self._set = threading.local()
        self.configure(None, None)

    def configure(self, parallel_forwards: int | None, intra_op_threads: int | None) -> None:
        """Take what an operator says; None where nothing is said."""
        self.forwards = parallel_forwards or self._processors
        self._intra_op = intra_op_threads

    @property
    def intra_op_threads(self) -> int | None:
        """Threads of one forward; None leaves it to PyTorch."""
        if self._intra_op is not None:
            return self._intra_op
        if self._left_to_torch:
            return None
        return max(1, self._processors // min(self.forwards, max(1, self._ready())))

    def prepare(self) -> None:
        """Set the calling thread up for a forward."""
        threads = self.intra_op_threads
        if threads is not None and getattr(self._set, "threads", None) != threads:
            import torch

            torch.set_num_threads(threads)
            self._set.threads = threads
