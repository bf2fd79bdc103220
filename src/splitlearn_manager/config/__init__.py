"""Configuration: the text of model and server files → validated configs, each mistake with its place.

    model_config, server_config    what is legal, and what two configs that differ mean
    yaml_source, yaml_writer       bytes → configs and problems; configs → files
    model_source                   what is behind a `model_path`, its fingerprint and its size
    files                          the file-system calls that all this needs

Nothing below this package imports torch, transformers, gRPC or the user's code.
"""

from splitlearn_manager.config.loader_options import LoaderOptions
from splitlearn_manager.config.model_config import (
    IN_PLACE_KEYS,
    Change,
    ModelConfig,
    changes,
)
from splitlearn_manager.config.server_config import LIVE_KEYS, RESTART_KEYS, ServerConfig

__all__ = [
    "IN_PLACE_KEYS",
    "LIVE_KEYS",
    "RESTART_KEYS",
    "Change",
    "LoaderOptions",
    "ModelConfig",
    "ServerConfig",
    "changes",
]
