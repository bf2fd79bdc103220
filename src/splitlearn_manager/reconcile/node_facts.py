"""What is known of the node itself at one moment, as values.

`NodeInfo` is what the server knows and the loop does not (addresses, versions, how changes are noticed);
`NodeFacts` adds what the loop found in its latest turn. Pure data: `node_status` words it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.core.ledger import Ceiling
from splitlearn_manager.desired.state import PruneGuard, SourceRef


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What a server says of itself.

    Attributes:
        directory, state_dir: absolute paths; empty for a node without them.
        watch_mode: how changes in the directory are noticed: inotify, fsevents, polling or none.
        watch_reason: why it is not the file system's own events; empty if it is.
        restart_required: keys of server.yaml that apply at the next start.
        started_at: unix time, in seconds.
        grpc, http: `host:port` that it listens on; empty if it does not.
    """

    directory: str = ""
    state_dir: str = ""
    watch_mode: str = "none"
    watch_reason: str = ""
    restart_required: tuple[str, ...] = ()
    version: str = ""
    process_id: int = 0
    started_at: float = 0.0
    grpc: str = ""
    http: str = ""


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """MB (2**20 bytes) that models have reserved on a device, and may reserve.

    Attributes:
        ceiling: what the device really has for them; None if that is not read.
    """

    device: str
    reserved_mb: float
    budget_mb: float
    ceiling: Ceiling | None = None

    @property
    def limit_mb(self) -> float:
        """Up to what may be reserved anew."""
        return self.budget_mb if self.ceiling is None else min(self.budget_mb, self.ceiling.mb)

    @property
    def excess_mb(self) -> float:
        """What is reserved and not there."""
        return max(0.0, self.reserved_mb - self.ceiling.mb) if self.ceiling is not None else 0.0


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """All that is known of a node at one moment.

    Attributes:
        info: what the server says of itself.
        source_available: the directory can be listed.
        source_message: what is wrong with the directory or a part of it; empty if nothing is.
        complete: all that the directory held was once seen, settled and decided.
        pending: something in the directory has yet to settle, or was not seen yet.
        settled: nothing to do, nothing under way, nothing unsettled in the directory.
        converged: everything once was as declared, or as near to it as it could be.
        problems: what people should correct in the directory's files.
        conflicts: ids that several declarations claim, with those declarations.
        prune_guard: models that would go at once, and wait for a confirmation; None if none do.
        suspended: ids that people asked to leave as they are, sorted.
        state_problem: why what must survive a restart cannot be written or was not read; empty if it is.
        devices: what is reserved and may be, by device.
        max_models: most models that may be loaded at a time; 0 if the loop did not say.
        max_parallel_loads: most loads at a time; 0 if the loop did not say.
    """

    info: NodeInfo = NodeInfo()
    source_available: bool = True
    source_message: str = ""
    complete: bool = False
    pending: bool = False
    settled: bool = False
    converged: bool = False
    problems: tuple[Problem, ...] = ()
    conflicts: Mapping[str, tuple[SourceRef, ...]] = field(default_factory=dict)
    prune_guard: PruneGuard | None = None
    suspended: tuple[str, ...] = ()
    state_problem: str = ""
    devices: tuple[DeviceUse, ...] = ()
    max_models: int = 0
    max_parallel_loads: int = 0
