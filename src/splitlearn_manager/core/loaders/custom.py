"""Loads models that a function of the user's own code builds: `model_path: package.module:function`."""

from __future__ import annotations

from pathlib import Path

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.model_source import ModelSource
from splitlearn_manager.core.loaders.user_code import FactoryCall


def factory_call(source: ModelSource, config: ModelConfig, device: str) -> FactoryCall | None:
    """How the source's factory is called; None if it has none.

    Modules beside the YAML file and in the working directory are run afresh, in that order of search.
    """
    if source.factory is None:
        return None
    module, attribute = source.factory
    return FactoryCall(
        module=module,
        attribute=attribute,
        module_file=source.module_file,
        roots=(source.base_dir, Path.cwd()),
        kwargs=config.config.kwargs,
        device=device,
    )
