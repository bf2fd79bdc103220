"""Which runtime a model gets: what its `runtime` key says; `auto` is a thread.

A thread answers a request with no copy and no call to another process, and its weights are read into memory
once; a process costs both, and survives what the model does. Who needs the second says so.
"""

from __future__ import annotations

from pathlib import Path

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.runtime.base import Loader, RunningModel
from splitlearn_manager.runtime.process import ProcessRuntime
from splitlearn_manager.runtime.thread import ThreadRuntime


class ChosenRuntime:
    """Starts each model where its config says.

    Args:
        loader: reads the files of models that run in this process.
        cache_dir: where code that is compiled for models is kept.
    """

    def __init__(self, loader: Loader, cache_dir: Path | None = None) -> None:
        self._threads = ThreadRuntime(loader, cache_dir)
        self._processes = ProcessRuntime(cache_dir=cache_dir)

    def start(self, config: ModelConfig, device: str) -> RunningModel:
        """As `Runtime.start`."""
        if config.runtime == "process":
            return self._processes.start(config, device)
        return self._threads.start(config, device)
