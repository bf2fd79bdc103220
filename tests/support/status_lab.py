"""Facts of a model in every situation that people ask about, for the tests of what is told of them."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from splitlearn_manager.config.yaml_source import Problem
from splitlearn_manager.core.lifecycle import ModelSpec, Owner, State
from splitlearn_manager.core.snapshot import InstanceView
from splitlearn_manager.desired.state import PruneGuard, SourceRef
from splitlearn_manager.reconcile.actions import Waiting, Wanted
from splitlearn_manager.reconcile.backoff import Attempt
from splitlearn_manager.reconcile.conditions import Moment
from splitlearn_manager.reconcile.status import DeviceUse, Facts, NodeFacts, NodeInfo
from support.fakes import model

OLD = ModelSpec.of(model("m"), weights="w0", generation=1)
NEW = ModelSpec.of(model("m", trusted=True), weights="w0", generation=2)
NOON = Moment(now_s=1000.0, wall_s=datetime(2026, 3, 4, 12, 0, 0).timestamp())
"""1,000 on the manager's clock is noon, so 1,009 is 12:00:09."""


class Wall:
    """Unix time, as the test says."""

    def __init__(self, seconds: float = 100.0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


def wanted(spec: ModelSpec = NEW, mb: float = 10.0, **keys: object) -> Wanted:
    return replace(Wanted(spec, mb, ("cpu",), 5.0, source="m.yaml"), **keys)  # type: ignore[arg-type]


def view(
    state: State,
    spec: ModelSpec = NEW,
    owner: Owner = Owner.DIRECTORY,
    **keys: object,
) -> InstanceView:
    made = InstanceView(
        key=f"{spec.model_id}#{spec.generation}",
        model_id=spec.model_id,
        owner=owner,
        state=state,
        spec=spec,
        device="cpu",
        reserved_mb=10.0,
        measured_mb=10.0,
        leases=0,
        last_used_s=1.0,
        loading_since_s=998.0,
        ready_since_s=None if state in (State.LOADING, State.FAILED) else 1.0,
        drain_overdue=False,
        notes=("a note",),
        warmed=True,
        requests=3,
        errors=1,
    )
    return replace(made, **keys)  # type: ignore[arg-type]


def other(
    model_id: str, state: State = State.READY, mb: float = 500.0, **keys: object
) -> InstanceView:
    """An instance of another model; `keys` are of its config, or `leases` and `owner`."""
    of_view = {k: keys.pop(k) for k in ("leases", "owner") if k in keys}
    spec = ModelSpec.of(model(model_id, **keys))
    return replace(view(state, spec), reserved_mb=mb, **of_view)  # type: ignore[arg-type]


NOTHING = Facts(
    model_id="m",
    wanted=wanted(),
    views=(),
    attempt=None,
    parked=False,
    waiting=None,
    held="",
    source_available=True,
    source=SourceRef("m.yaml", 3),
)
SERVES = replace(NOTHING, views=(view(State.READY),))
ATTEMPT = Attempt(NEW, 3, 1009.0, "LoadFailed", "it is broken")
RETRY = Waiting("m", "LoadFailed", "it is broken", 1009.0, failed=True)
TERMINAL = Attempt(NEW, 1, None, "UntrustedCheckpoint", "m.pt would run code")
FOR_GOOD = Waiting("m", "UntrustedCheckpoint", "m.pt would run code", None, failed=True)
TOO_LARGE = Waiting("m", "OverMemoryLimit", "model 'm' takes 10 MB", failed=True)
NO_WEIGHTS = Waiting("m", "WeightsNotFound", "nothing is at /models/m.pt", failed=True)
NO_ROOM = Waiting("m", "InsufficientMemory", "needs 10 MB on cpu")
NO_PLACE = Waiting("m", "MaxModels", "max_models is 2 and none of the loaded models may be evicted")
MISTAKE = Problem("m.yaml", 7, 16, "max_memory_mb", 'expected an integer, got "4gb"')

INFO = NodeInfo(
    directory="/desired",
    state_dir="/state",
    watch_mode="inotify",
    version="1.0",
    process_id=7,
    started_at=5.0,
    grpc="127.0.0.1:50051",
    http="127.0.0.1:8000",
)
NODE = NodeFacts(
    info=INFO,
    complete=True,
    settled=True,
    converged=True,
    devices=(DeviceUse("cpu", 900.0, 1000.0),),
    max_models=2,
)
GUARD = PruneGuard("3f1c0a9be2d4", ("a", "b", "m"), 4)

SITUATIONS: dict[str, Facts] = {
    "comes next": NOTHING,
    "waits for memory": replace(NOTHING, waiting=NO_ROOM),
    "waits for a place": replace(NOTHING, waiting=NO_PLACE),
    "waits for memory on its way back": replace(
        NOTHING, waiting=Waiting("m", "AwaitingMemory", "waits for the memory of a")
    ),
    "waits for its turn": replace(
        NOTHING, waiting=Waiting("m", "AwaitingTurn", "2 models may be loaded at a time")
    ),
    "waits for its device": replace(
        NOTHING, waiting=Waiting("m", "DeviceNotFound", "device cuda:7 is not on this node")
    ),
    "its files still change": replace(
        NOTHING,
        wanted=wanted(weights_ready=False),
        waiting=Waiting("m", "WeightsNotReady", "its files are still changing"),
    ),
    "its files are missing": replace(
        NOTHING,
        wanted=wanted(weights_ready=False, weights_problem=NO_WEIGHTS.message),
        waiting=NO_WEIGHTS,
    ),
    "loads": replace(NOTHING, views=(view(State.LOADING),)),
    "serves": SERVES,
    "serves until it is idle": replace(
        SERVES,
        waiting=Waiting("m", "KeepAlive", "unloaded when idle for keep_alive_s = 60 s", 1060.0),
    ),
    "is updated by surge": replace(NOTHING, views=(view(State.READY, OLD), view(State.LOADING))),
    "is updated by recreate": replace(NOTHING, views=(view(State.UNLOADING, OLD),)),
    "old one drains after a surge": replace(
        NOTHING, views=(view(State.UNLOADING, OLD, leases=2), view(State.READY))
    ),
    "is declared anew while its old copy goes": replace(NOTHING, views=(view(State.UNLOADING),)),
    "goes back after a failed update": replace(
        NOTHING,
        views=(view(State.LOADING, OLD),),
        attempt=ATTEMPT,
        waiting=Waiting("m", "Loading", "an operation on it is under way"),
        fallback=wanted(OLD),
    ),
    "is being evicted": replace(NOTHING, views=(view(State.UNLOADING),), parked=True),
    "was evicted": replace(NOTHING, parked=True, waiting=Waiting("m", "Evicted", "made room")),
    "failed and is tried again": replace(NOTHING, attempt=ATTEMPT, waiting=RETRY),
    "failed and waits for its turn": replace(
        NOTHING, attempt=ATTEMPT, waiting=Waiting("m", "AwaitingTurn", "2 at a time")
    ),
    "failed for good": replace(NOTHING, attempt=TERMINAL, waiting=FOR_GOOD),
    "failed too often": replace(
        NOTHING,
        attempt=replace(ATTEMPT, failures=10),
        waiting=Waiting("m", "RateLimited", "10 loads failed within a minute", 1042.0, failed=True),
    ),
    "its load hangs": replace(
        NOTHING,
        views=(view(State.FAILED),),
        attempt=replace(ATTEMPT, failures=1, reason="LoadTimeout", message="not loaded in 1 s"),
        waiting=Waiting("m", "LoadTimeout", "not loaded in 1 s", None, failed=True),
    ),
    "is sure to fail": replace(NOTHING, waiting=TOO_LARGE),
    "failed in another version": replace(NOTHING, attempt=replace(ATTEMPT, spec=OLD)),
    "serves the old version after a failed update": replace(
        NOTHING, views=(view(State.READY, OLD),), attempt=ATTEMPT, waiting=RETRY
    ),
    "serves the old version and is not tried again": replace(
        NOTHING,
        views=(view(State.READY, OLD),),
        attempt=ATTEMPT,
        waiting=replace(RETRY, until_s=None),
    ),
    "serves the old version until there is room": replace(
        NOTHING, views=(view(State.READY, OLD),), waiting=NO_ROOM
    ),
    "serves, and its new limit does not hold": replace(
        NOTHING, views=(view(State.READY, OLD),), waiting=TOO_LARGE
    ),
    "serves while its file is invalid": replace(
        SERVES, held="m.yaml is invalid", problems=(MISTAKE,)
    ),
    "serves while its file is in doubt": replace(SERVES, held="m.yaml is still changing"),
    "serves while the directory is away": replace(
        SERVES, held="/desired does not exist", source_available=False
    ),
    "serves while it is in conflict": replace(
        SERVES,
        held="declared more than once: a.yaml:1 and m.yaml:3",
        conflict=(SourceRef("a.yaml", 1), SourceRef("m.yaml", 3)),
    ),
    "serves while the prune guard holds it": replace(
        SERVES,
        held="no file declares it, but 3 of 4 models would be unloaded at once: to let them go, run "
        "`splitlearn-manager reconcile apply /desired --confirm-prune 3f1c0a9be2d4`",
        guarded=True,
    ),
    "serves while it is suspended": replace(
        SERVES,
        held="suspended: m.yaml:3 says something else",
        suspended=True,
        waiting=Waiting("m", "Suspended", "stays as it is"),
    ),
    "failed while it is suspended": replace(
        NOTHING,
        suspended=True,
        held="suspended",
        attempt=ATTEMPT,
        waiting=Waiting("m", "Suspended", "stays as it is"),
    ),
    "is declared no more": replace(
        NOTHING, wanted=None, source=None, views=(view(State.UNLOADING, leases=3),)
    ),
    "was loaded through the Python API": replace(
        NOTHING, wanted=None, source=None, views=(view(State.READY, owner=Owner.API),)
    ),
    "is taken by the Python API": replace(
        NOTHING,
        views=(view(State.READY, owner=Owner.API),),
        waiting=Waiting("m", "OwnedByApi", "a model of this id was loaded through the Python API"),
    ),
}
"""The model `m`: generation 2 is wanted, from m.yaml:3; generation 1 is what served before."""
