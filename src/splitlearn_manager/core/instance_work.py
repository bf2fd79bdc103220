"""What is done to instances beside everything else: loading them, giving them up, closing them.

Each piece of work is started through the executor, looks at its instance's state when it ends, and
hands over to `Instances` for the transition. A load that ends after it was given up is thrown away;
an instance is closed by exactly one piece of work, after its last lease. Nothing here decides which
models are wanted or who makes room.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.core.clock import Clock, Executor
from splitlearn_manager.core.events import EventKind, ManagerEvent
from splitlearn_manager.core.instances import Instances
from splitlearn_manager.core.ledger import LedgerError
from splitlearn_manager.core.lifecycle import Owner, State
from splitlearn_manager.core.managed_model import ManagedModel
from splitlearn_manager.core.measurement import Measurement
from splitlearn_manager.core.model_reader import ModelReader, Read
from splitlearn_manager.core.rollout import Verdict
from splitlearn_manager.errors import (
    InsufficientMemory,
    LoadError,
    LoadTimeout,
    OperationInProgress,
    RolloutAborted,
    RolloutFailed,
    SplitlearnError,
)
from splitlearn_manager.logs import log_event

if TYPE_CHECKING:
    from splitlearn_manager.runtime.base import RunningModel

log = logging.getLogger(__name__)

_UNLOADED: Mapping[str, str] = {
    "MadeRoom": "another model needs the room; the next request brings it back",
    "MemoryPressure": "others had taken the memory; the next request brings it back",
    "Idle": "nobody asked for it for keep_alive_s; the next request brings it back",
    "Pruned": "no file declares it any more",
    "Recreate": "its new version is loaded in its place",
    "Replaced": "its new version serves",
    "Requested": "the Python API asked for it",
    "Shutdown": "the node stops",
    "WorkerDied": "its worker process has ended; it is loaded again",
}

_CLOSE_AGAIN_S = 1.0
_LOOK_AT_TRIAL_S = 0.5
_LEVELS: Mapping[EventKind, int] = {
    EventKind.LOAD_FAILED: logging.ERROR,
    EventKind.DIED: logging.ERROR,
    EventKind.OUT_OF_MEMORY: logging.WARNING,
}


def _takes(running: RunningModel, measured: Measurement | None, config: ModelConfig) -> str:
    """How much memory a model takes, for people."""
    if measured is None:
        return f"{running.memory_mb:,.0f} MB"
    return measured.in_words(config.batch_size)


def _too_large(instance: ManagedModel, takes: str) -> InsufficientMemory:
    return InsufficientMemory(
        f"model {instance.model_id!r} turned out to take {takes}, "
        f"which does not fit on {instance.device}"
    )


def why_unloaded(reason: str) -> str:
    """Why an instance was unloaded and what comes next, for people; the reason itself if it is another's."""
    return _UNLOADED.get(reason, reason)


class InstanceWork:
    """See the module's text. `on_event` is called outside all locks."""

    def __init__(
        self,
        instances: Instances,
        reader: ModelReader,
        executor: Executor,
        clock: Clock,
        on_event: Callable[[ManagerEvent], None],
    ) -> None:
        self._instances = instances
        self._reader = reader
        self._executor = executor
        self._clock = clock
        self._tried: dict[str, Read] = {}
        self._on_event = on_event

    def watch_time_limits(self) -> float | None:
        """Gives up loads and reports drains that take too long, and starts what could not be started.

        Returns the seconds until it is due again.
        """
        now = self._clock.now()
        due: list[float] = []
        for instance in self._instances.all():
            if instance.trial is not None:
                due.append(self._watch_trial(instance))
            elif instance.state is State.LOADING:
                left = instance.loading_since_s + instance.config.load_timeout_s - now
                if left > 0:
                    due.append(left)
                else:
                    self._give_up(instance)
            elif instance.state is State.UNLOADING and instance.idle and not instance.close_started:
                self.close_if_drained(instance)
                due.append(_CLOSE_AGAIN_S)
            elif instance.state is State.UNLOADING and not instance.drain_overdue:
                left = (instance.draining_since_s or now) + instance.config.drain_timeout_s - now
                if left > 0:
                    due.append(left)
                elif self._instances.mark_drain_overdue(instance):
                    requests = (
                        "1 request" if instance.in_flight == 1 else f"{instance.in_flight} requests"
                    )
                    message = (
                        f"{requests} still running {instance.config.drain_timeout_s:g} s after draining "
                        "began; it is unloaded when they end, keeps its memory until then, and holds "
                        "nothing else up"
                    )
                    self.report(EventKind.DRAIN_OVERDUE, instance, "DrainOverdue", message)
        return min(due) if due else None

    def report(self, kind: EventKind, instance: ManagedModel, reason: str, message: str) -> None:
        """Logs what happened and tells the listeners."""
        now = self._clock.now()
        event = ManagerEvent(kind, instance.model_id, instance.key, reason, message, now)
        level = _LEVELS.get(kind, logging.INFO)
        log_event(log, level, kind, message, model=instance.model_id, reason=reason)
        self._on_event(event)

    def load(self, instance: ManagedModel) -> None:
        """Starts the load of a LOADING instance."""
        self.report(EventKind.LOADING, instance, "Loading", f"loading on {instance.device}")
        try:
            self._executor.start(f"load-{instance.key}", lambda: self._load(instance))
        except Exception as error:
            message = f"model {instance.model_id!r}: its load could not be started: {error}"
            self._failed(instance, LoadError(message))
            self._discard(instance, None)

    def _load(self, instance: ManagedModel) -> None:
        """The work of one load; runs beside everything else."""
        running: RunningModel | None = None
        try:
            read = self._reader.read(instance.spec, instance.device)
            running = read.running
            instance.verified = read.notes
            if not self._tries(instance, read):
                self._take_over(instance, read)
        except OperationInProgress:
            message = (
                "a load that was given up has returned: its result is thrown away, its memory freed"
            )
            log_event(log, logging.WARNING, "LateLoadDiscarded", message, model=instance.model_id)
            self._discard(instance, running)
        except SplitlearnError as error:
            self._failed(instance, error)
            self._discard(instance, running)
        except BaseException as error:
            # Whatever a loader raises, SystemExit included, ends this load and nothing else.
            log_event(log, logging.ERROR, "LoaderRaised", exc_info=True, model=instance.model_id)
            message = f"model {instance.model_id!r}: {type(error).__name__}: {error}"
            self._failed(instance, LoadError(message))
            self._discard(instance, running)
        else:
            running.when_ended(lambda error: self._died(instance, error))

    def _take_over(self, instance: ManagedModel, read: Read) -> None:
        """It serves from now on, and what served before drains.

        Raises InsufficientMemory, or OperationInProgress if it was given up meanwhile.
        """
        spec, running = read.spec, read.running
        measured = self._reader.measured(spec)
        takes = _takes(running, measured, spec.config)
        try:
            old = self._instances.ready(instance, running, spec, measured)
        except LedgerError:
            raise _too_large(instance, takes) from None
        self._reader.served(read)
        took = self._clock.now() - instance.loading_since_s
        notes = "".join(f"; {note}" for note in instance.notes)
        message = f"{takes} on {instance.device} in {took:.2f} s{notes}"
        self.report(EventKind.LOADED, instance, "Loaded", message)
        if old is not None:
            self.close_if_drained(old)

    # Rollouts.

    def _tries(self, instance: ManagedModel, read: Read) -> bool:
        """Whether it is tried beside what serves, before it takes over."""
        spec = read.spec
        if spec.config.rollout is None or instance.owner is not Owner.DIRECTORY:
            return False
        measured = self._reader.measured(spec)
        try:
            if not self._instances.begin_trial(instance, read.running, spec, measured):
                return False
        except LedgerError:
            raise _too_large(instance, _takes(read.running, measured, spec.config)) from None
        self._tried[instance.key] = read
        old = self._instances.serving(instance.model_id)
        version = spec.named_beside(old.spec if old is not None else None)
        note = instance.trial.note if instance.trial else ""
        self._tell_trial(instance, f"{version} is tried: {note}")
        return True

    def _watch_trial(self, instance: ManagedModel) -> float:
        """Does what is due about a version that is tried; seconds until it is due again."""
        trial, now = instance.trial, self._clock.now()
        if trial is None:
            return 0.0
        step = trial.step
        old = self._instances.serving(instance.model_id)
        verdict, why = trial.judged(
            instance.config,
            now,
            trial.traffic_of(instance),
            trial.traffic_of(old) if old is not None else None,
        )
        about = f"{instance.spec.named_beside(old.spec if old is not None else None)} {why}"
        if verdict is Verdict.TAKE_BACK:
            kind = RolloutFailed if trial.ordered is None else RolloutAborted
            self.take_back(instance, kind(f"model {instance.model_id!r}: {about}"))
        elif verdict is Verdict.NEXT_STEP:
            if self._instances.next_step(instance, after=step):
                self._tell_trial(instance, about)
        elif verdict is Verdict.TAKE_OVER:
            self._tell_trial(instance, about)
            self._end_trial(instance)
        return min(
            _LOOK_AT_TRIAL_S, max(0.0, trial.step_ends_s(instance.config) - now) or _LOOK_AT_TRIAL_S
        )

    def _end_trial(self, instance: ManagedModel) -> None:
        read = self._tried.pop(instance.key, None)
        if read is None:
            return
        # All that needs no load, such as the rules of its rollout, may have changed since it was read.
        read = replace(read, spec=instance.spec)
        try:
            self._take_over(instance, read)
        except OperationInProgress:
            return
        except SplitlearnError as error:
            self.take_back(instance, error)

    def take_back(
        self, instance: ManagedModel, error: SplitlearnError, *, is_outcome: bool = True
    ) -> None:
        """Ends the trial of a version; it is closed once its requests have ended."""
        self._tried.pop(instance.key, None)
        if self._instances.fail(instance, error, is_outcome=is_outcome):
            # Where nothing was found out about the version, its load has not failed.
            kind = EventKind.LOAD_FAILED if is_outcome else EventKind.ROLLOUT
            self.report(kind, instance, error.reason, error.message)
            self._instances.abandon(instance)
            self.close_if_drained(instance)

    def _tell_trial(self, instance: ManagedModel, message: str) -> None:
        self.report(EventKind.ROLLOUT, instance, "Rollout", message)

    def _died(self, instance: ManagedModel, error: SplitlearnError) -> None:
        """What serves has ended by itself: it is given up, and loaded again as after any failure."""
        if instance.trial is not None:
            self.take_back(instance, error)
        # Not else: it may be taking over at this very moment.
        if self._instances.died(instance, error):
            self.report(EventKind.DIED, instance, error.reason, error.message)
            self._instances.abandon(instance)
            self.close_if_drained(instance)

    def _give_up(self, instance: ManagedModel) -> None:
        self._failed(
            instance,
            LoadTimeout(
                f"model {instance.model_id!r} was not loaded within load_timeout_s = "
                f"{instance.config.load_timeout_s:g} s, and is given up; its memory stays charged until "
                "the loader returns"
            ),
        )

    def _failed(self, instance: ManagedModel, error: SplitlearnError) -> None:
        if self._instances.fail(instance, error):
            if (cause := error.__cause__) is not None:
                log_event(log, logging.DEBUG, "LoadRaised", exc_info=cause, model=instance.model_id)
            self.report(EventKind.LOAD_FAILED, instance, error.reason, error.message)

    def _discard(self, instance: ManagedModel, running: RunningModel | None) -> None:
        """Gives back what a failed or late load holds."""
        self._instances.abandon(instance)
        if self._instances.claim_close(instance):
            self._close(instance, running)

    def close_if_drained(self, instance: ManagedModel) -> None:
        """Starts the closing of an UNLOADING instance once its last lease is back."""
        if self._instances.claim_close(instance):
            running = instance.running
            try:
                self._executor.start(
                    f"close-{instance.key}", lambda: self._close(instance, running)
                )
            except Exception:
                # Not in this thread instead: closing may take long. `watch_time_limits` tries again.
                log_event(
                    log, logging.ERROR, "CloseNotStarted", exc_info=True, model=instance.model_id
                )
                self._instances.return_close(instance)

    def _close(self, instance: ManagedModel, running: RunningModel | None) -> None:
        was_ready = instance.ready_since_s is not None
        if running is not None:
            try:
                running.close()
            except Exception:
                log_event(log, logging.ERROR, "CloseFailed", exc_info=True, model=instance.model_id)
        following = self._instances.gone(instance)
        if was_ready:
            reason = instance.unload_reason
            self.report(EventKind.UNLOADED, instance, reason, f"unloaded: {why_unloaded(reason)}")
        if following is not None:
            self.load(following)
