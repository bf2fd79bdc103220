"""Planning for a directory without doing anything: what `plan`, `validate` and `apply` look at.

It loads no torch and writes nothing. Beside a running node the plan is that of the node, from what it
runs and has accepted; without one it is that of a start, from what the last node has kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from splitlearn_manager.cli.finding import NotFound, RunningNode

if TYPE_CHECKING:
    from splitlearn_manager.config.server_config import ServerConfig
    from splitlearn_manager.desired.state import DesiredState
    from splitlearn_manager.reconcile.actions import Plan
    from splitlearn_manager.reconcile.observation import Observation
    from splitlearn_manager.reconcile.store import Store


def server_settings(directory: Path, server_file: Path | None) -> ServerConfig:
    """The server settings that apply. Raises NotFound if they do not validate."""
    from splitlearn_manager.config.server_config import ServerConfig
    from splitlearn_manager.errors import ConfigError

    path = server_file or directory / "server.yaml"
    if server_file is None and not path.exists():
        return ServerConfig()
    try:
        return ServerConfig.from_yaml(path)
    except ConfigError as error:
        raise NotFound(error.message) from None
    except OSError as error:
        raise NotFound(f"{path}: cannot be read: {error.strerror or error}") from None


def last_good_settings(node: RunningNode, server_file: Path | None) -> ServerConfig:
    """The settings for a plan beside a node, which serves on if its server file is broken now."""
    from splitlearn_manager.config.server_config import ServerConfig

    try:
        return server_settings(node.directory, server_file)
    except NotFound:
        return ServerConfig()


def preview(directory: Path, settings: ServerConfig) -> tuple[DesiredState, Plan]:
    """What the files say, and the plan of a start that remembers nothing."""
    return _preview(directory, settings)


def preview_of_start(directory: Path, settings: ServerConfig) -> tuple[DesiredState, Plan]:
    """What a node that is started would do."""
    from splitlearn_manager.reconcile.store import DirectoryFiles, Store
    from splitlearn_manager.server.state_dir import record_of, state_dir_for

    class ReadOnly(DirectoryFiles):
        """What cannot be read is not set aside either."""

        def write(self, name: str, data: bytes) -> None: ...
        def remove(self, name: str) -> None: ...

    files = ReadOnly(record_of(settings.resolved_state_dir or state_dir_for(directory)))
    return _preview(directory, settings, store=Store(files, str(directory.absolute())))


def preview_beside(
    node: RunningNode, settings: ServerConfig, confirmed_prune: str = ""
) -> tuple[DesiredState, Plan]:
    """What a running node would do, if a prune guard is confirmed with that digest.

    Raises:
        NotFound: the node is of a version that tells of itself in another form.
    """
    from splitlearn_manager.reconcile.observation import from_json
    from splitlearn_manager.version import VERSION

    try:
        observed = from_json(json.dumps(node.ask("observe")).encode())
    except ValueError:
        raise NotFound(
            f"the node that serves {node.directory} is of version {node.about.get('version')}, and this "
            f"is {VERSION}: use the command line of the node's version, or start the node anew"
        ) from None
    return _preview(node.directory, settings, node=observed, confirmed_prune=confirmed_prune)


def _preview(
    directory: Path,
    settings: ServerConfig,
    *,
    node: Observation | None = None,
    store: Store | None = None,
    confirmed_prune: str = "",
) -> tuple[DesiredState, Plan]:
    from splitlearn_manager.core.clock import SystemClock
    from splitlearn_manager.core.model_manager import ModelManager
    from splitlearn_manager.core.resource_manager import ResourceManager
    from splitlearn_manager.desired.source import DesiredSource
    from splitlearn_manager.reconcile.reconciler import Reconciler

    manager = ModelManager(
        max_models=settings.max_models,
        resources=ResourceManager(settings.max_memory_percent, settings.memory_quota_mb),
    )
    source = DesiredSource(
        directory,
        settle_s=settings.settle_s,
        prune_guard_percent=settings.prune_guard_percent,
    )
    loop = Reconciler(
        source,
        manager,
        SystemClock(),
        store=store,
        max_parallel_loads=settings.max_parallel_loads,
    )
    return loop.preview(settings.settle_s, node, confirmed_prune)
