"""Lets torch set itself up before several threads share it.

Parts of torch set themselves up at their first use: they hold a lock of C++ and import Python modules
meanwhile. When such an import lets go of Python's own lock, a second thread may come to the same place with
Python's lock in hand; each then waits for the other for ever, and every thread of the process with them.
So the first load makes the ways in which models are built and called known to torch, alone, and the others
wait for it. It costs a few milliseconds, once. It reads no model and changes no setting.

While torch writes down what a module does (torch.export, torch.fx), it puts functions of its own in the place
of `nn.Module.__call__` and `__getattr__`, for all threads: a model that answers requests meanwhile is taken
for a part of that module, and both fail. So those functions are bound here to the thread that traces; in all
others modules are called as ever. Two threads that trace at a time would each put back what the other has put
there, and leave it for good: a second one waits for the first, for `_PATIENCE_S` if it hangs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

_PATIENCE_S = 60.0


class TorchSetup:
    """Done once for the process, by whoever comes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = False

    def ensure(self) -> None:
        """Returns once torch has been used in the usual ways by one thread alone."""
        if self._done:
            return
        with self._lock:
            if not self._done:
                _use_torch()
                _trace_in_one_thread()
                self._done = True


def _use_torch() -> None:
    """The first uses: tensors from Python and NumPy values, indexing, a module's forward and its state."""
    import numpy as np
    import torch
    from torch import nn

    with torch.inference_mode():
        x = torch.tensor([[1.0, 2.0]]) + torch.tensor(0.0)
        x = x + torch.from_numpy(np.zeros((1, 2), np.float32))
        torch.as_tensor(x.numpy())
        x[:, 0], x[torch.tensor([0])], x.to(torch.float64), repr(x)
        layer = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        layer.load_state_dict(layer.state_dict())
        layer(x)


def _trace_in_one_thread() -> None:
    """Have methods that torch.fx puts into classes apply to the thread that has put them there."""
    from torch.fx import _symbolic_trace

    patcher = getattr(_symbolic_trace, "_Patcher", None)
    patch = getattr(patcher, "patch_method", None)
    if patch is None:
        # A version of torch that does it otherwise.
        return

    def patch_method(
        self: object, cls: type, name: str, new: Callable[..., Any], deduplicate: bool = True
    ) -> None:
        before, tracing = getattr(cls, name), threading.get_ident()

        @functools.wraps(new)
        def method(*args: Any, **kwargs: Any) -> Any:
            called = new if threading.get_ident() == tracing else before
            return called(*args, **kwargs)

        patch(self, cls, name, method, deduplicate)

    tracer, turn = _symbolic_trace.Tracer, threading.RLock()
    trace = tracer.trace

    @functools.wraps(trace)
    def one_at_a_time(self: Any, *args: Any, **kwargs: Any) -> Any:
        # It also notes, for the whole process, that something is traced; and of two that overlap, the second
        # one puts back what the first one had noted.
        mine = turn.acquire(timeout=_PATIENCE_S)
        try:
            return trace(self, *args, **kwargs)
        finally:
            if mine:
                turn.release()

    patcher.patch_method = patch_method  # type: ignore[union-attr]
    tracer.trace = one_at_a_time  # type: ignore[method-assign]


TORCH_SETUP = TorchSetup()
"""One for the process, because torch is."""
