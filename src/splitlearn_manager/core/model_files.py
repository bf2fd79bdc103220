"""What is behind a model_path, asked for by config: a fingerprint, and an estimate of its size.

A seam of two methods, so that the manager itself touches no file.
"""

from __future__ import annotations

from splitlearn_manager.config.files import FileSystem, RealFileSystem
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.model_source import estimate_mb, fingerprint, resolve_source


class ModelFiles:
    """Looks at the files of models; holds nothing."""

    def __init__(self, fs: FileSystem | None = None) -> None:
        self._fs = fs or RealFileSystem()

    def fingerprint(self, config: ModelConfig) -> str:
        """A digest that changes when the files do. Raises WeightsNotFound if there are none."""
        return fingerprint(resolve_source(config, self._fs), self._fs)

    def estimate_mb(self, config: ModelConfig) -> float | None:
        """MB (2**20 bytes) of the weights before loading; None where only loading can tell.

        Raises WeightsNotFound if there are no files.
        """
        return estimate_mb(resolve_source(config, self._fs), config, self._fs).weights_mb
