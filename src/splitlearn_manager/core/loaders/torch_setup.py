"""Lets torch set itself up before several threads share it.

Parts of torch set themselves up at their first use: they hold a lock of C++ and import Python modules
meanwhile. When such an import lets go of Python's own lock, a second thread may come to the same place with
Python's lock in hand; each then waits for the other for ever, and every thread of the process with them.
So the first load makes the ways in which models are built and called known to torch, alone, and the others
wait for it. It costs a few milliseconds, once. It reads no model and changes no setting.
"""

from __future__ import annotations

import threading


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


TORCH_SETUP = TorchSetup()
"""One for the process, because torch is."""
