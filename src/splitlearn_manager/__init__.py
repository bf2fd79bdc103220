"""splitlearn-manager: serves PyTorch models from a directory of YAML files.

The public names are loaded when they are first used, so that importing the package costs little and
loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitlearn_comm._exports import lazy_exports
from splitlearn_manager.version import VERSION

if TYPE_CHECKING:
    from splitlearn_manager.config.model_config import ModelConfig
    from splitlearn_manager.config.server_config import ServerConfig
    from splitlearn_manager.core.managed_model import ManagedModel
    from splitlearn_manager.core.model_loader import ModelLoader
    from splitlearn_manager.core.model_manager import ModelManager
    from splitlearn_manager.core.resource_manager import ResourceManager, ResourceUsage
    from splitlearn_manager.monitoring.health import HealthChecker
    from splitlearn_manager.monitoring.metrics import MetricsCollector
    from splitlearn_manager.routing.router import ModelRouter
    from splitlearn_manager.server.managed_server import ManagedServer

__version__ = VERSION

__all__ = [
    "HealthChecker",
    "ManagedModel",
    "ManagedServer",
    "MetricsCollector",
    "ModelConfig",
    "ModelLoader",
    "ModelManager",
    "ModelRouter",
    "ResourceManager",
    "ResourceUsage",
    "ServerConfig",
    "__version__",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "HealthChecker": "splitlearn_manager.monitoring.health",
        "ManagedModel": "splitlearn_manager.core.managed_model",
        "ManagedServer": "splitlearn_manager.server.managed_server",
        "MetricsCollector": "splitlearn_manager.monitoring.metrics",
        "ModelConfig": "splitlearn_manager.config.model_config",
        "ModelLoader": "splitlearn_manager.core.model_loader",
        "ModelManager": "splitlearn_manager.core.model_manager",
        "ModelRouter": "splitlearn_manager.routing.router",
        "ResourceManager": "splitlearn_manager.core.resource_manager",
        "ResourceUsage": "splitlearn_manager.core.resource_manager",
        "ServerConfig": "splitlearn_manager.config.server_config",
    },
)
