"""What a changed server.yaml does to a running node.

Keys of `LIVE_KEYS` take effect at once, without touching a model. The others keep the value that the
node started with, and are named (`RestartRequired`) for as long as the file says otherwise.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from splitlearn_manager.config.server_config import LIVE_KEYS, ServerConfig
from splitlearn_manager.errors import ConfigError
from splitlearn_manager.logs import log_event

if TYPE_CHECKING:
    from splitlearn_manager.server.managed_server import ManagedServer

log = logging.getLogger(__name__)


class LiveSettings:
    """Applies server settings to a node; used by the reconcile loop only."""

    def __init__(self, started_with: ServerConfig, server: ManagedServer) -> None:
        self._started_with = started_with
        self._current = started_with
        self._server = server
        self._without_file: ServerConfig | None = None
        self.restart_required: tuple[str, ...] = ()

    def follow(self, config: ServerConfig | None) -> None:
        """Takes over what the directory's server.yaml says; None: there is none, or none was seen as yet.

        When the file goes, what holds is what will after the next start: the defaults, if the node was
        started with what its file said, else the settings that code has given it.
        """
        if config is None:
            if self._without_file is not None:
                self.apply(self._without_file)
            return
        if self._without_file is None:
            is_its_own = not _differing(config, self._started_with)
            self._without_file = ServerConfig() if is_its_own else self._started_with
        self.apply(config)

    def apply(self, config: ServerConfig) -> None:
        """Takes over what differs from the settings in force."""
        if config == self._current:
            return
        before, self._current = self._current, config
        changed = _differing(config, before)
        # The strategy may be refused.
        for key in sorted(LIVE_KEYS.intersection(changed) - {"routing"}):
            log_event(log, logging.INFO, "SettingChanged", key=key, value=getattr(config, key))
        if self._apply_live(config) and "routing" in changed:
            log_event(log, logging.INFO, "SettingChanged", key="routing", value=config.routing)
        waiting = tuple(
            key for key in _differing(config, self._started_with) if key not in LIVE_KEYS
        )
        if waiting != self.restart_required and waiting:
            message = "these keys apply at the next start; until then the old values hold"
            log_event(log, logging.WARNING, "RestartRequired", message, keys=",".join(waiting))
        self.restart_required = waiting

    def _apply_live(self, config: ServerConfig) -> bool:
        """Applies all that can be; whether the routing strategy could."""
        server = self._server
        logging.getLogger("splitlearn_manager").setLevel(config.log_level)
        server.resource_manager.configure(config.max_memory_percent, config.memory_quota_mb)
        server.model_manager.set_limits(config.max_models)
        server.reconciler.resync_s = config.resync_s
        server.reconciler.max_parallel_loads = config.max_parallel_loads
        server.threads.configure(config.parallel_forwards, config.intra_op_threads)
        if (source := server.desired_source) is not None:
            source.settle_s = config.settle_s
            source.prune_guard_percent = config.prune_guard_percent
        try:
            server.router.set_strategy(config.routing)
        except ConfigError as error:
            message = (
                f"{error.message}; {server.router.strategy} stays in use; correct it in server.yaml"
            )
            log_event(log, logging.ERROR, "SettingRefused", message, key="routing")
            return False
        return True


def _differing(one: ServerConfig, other: ServerConfig) -> list[str]:
    """The keys that the two have other values of."""
    return [k for k in ServerConfig.model_fields if getattr(one, k) != getattr(other, k)]
