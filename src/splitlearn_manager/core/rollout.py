"""How a new version that is tried beside the old one stands: the next step, taking over, or taken back.

    step 1 ─► step 2 ─► … ─► takes over
       └────────┴──► taken back, at any moment

A step ends when its time is over and enough requests have been answered, and the model is not suspended.
The new version is judged by its share of failed requests and by what a request takes it, against the old
one over the same time; in a shadow also by how far its answers are apart. Pure: who counts, and who
switches, is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.rollout import Rollout

if TYPE_CHECKING:
    from splitlearn_manager.core.lease import Lease
    from splitlearn_manager.core.managed_model import ManagedModel


class Verdict(StrEnum):
    """What is to be done about a version that is tried."""

    GO_ON = "GoOn"
    NEXT_STEP = "NextStep"
    TAKE_OVER = "TakeOver"
    TAKE_BACK = "TakeBack"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests of an instance over some time.

    Attributes:
        requests: that have ended, or whose callers have given up.
        errors: those of them that failed.
        busy_s: what they took together, in seconds.
    """

    requests: int = 0
    errors: int = 0
    busy_s: float = 0.0

    def since(self, earlier: Traffic) -> Traffic:
        """What came after `earlier`."""
        return Traffic(
            self.requests - earlier.requests,
            self.errors - earlier.errors,
            self.busy_s - earlier.busy_s,
        )

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    @property
    def mean_s(self) -> float:
        return self.busy_s / self.requests if self.requests else 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """A version that is tried, at one moment.

    Attributes:
        step: its step, from 0.
        in_step_s: seconds since the step began.
        new, old: the requests of both versions since the trial began.
        new_in_step: those of the new one since the step began.
        worst: how far an answer in a shadow was from the old version's; 0 for a canary.
        alone: the old version serves no more: it has crashed.
        paused: the model is suspended: no step ends.
    """

    step: int
    in_step_s: float
    new: Traffic
    old: Traffic
    new_in_step: Traffic
    worst: float = 0.0
    alone: bool = False
    paused: bool = False


def judge(config: ModelConfig, now: Progress) -> tuple[Verdict, str]:
    """What is to be done, and why, in words that go on after `generation 4 `."""
    rules = config.rollout
    if rules is None or now.alone:
        return Verdict.TAKE_OVER, "takes over: nothing else serves"
    if (why := _why_take_back(config, rules, now)) is not None:
        return Verdict.TAKE_BACK, why
    stage = rules.stages[now.step]
    if now.paused:
        return Verdict.GO_ON, ""
    if now.in_step_s < stage.for_s or now.new_in_step.requests < rules.min_requests:
        return Verdict.GO_ON, ""
    if now.step + 1 < len(rules.stages):
        percent = rules.stages[now.step + 1].percent
        return Verdict.NEXT_STEP, f"answers {percent:g} % of the requests from now on"
    return Verdict.TAKE_OVER, f"takes over after {now.new.requests} requests"


def _why_take_back(config: ModelConfig, rules: Rollout, now: Progress) -> str | None:
    limit = config.verify.max_difference if config.verify is not None else None
    if limit is not None and now.worst > limit:
        return (
            f"answers differ by {now.worst:.3g} from the old version's; max_difference is {limit:g}"
        )
    if not now.new.requests or now.new.requests < rules.min_requests:
        return None
    excess = now.new.error_rate - now.old.error_rate
    if excess > rules.max_error_rate:
        return (
            f"{now.new.errors} of its {now.new.requests} requests failed, {now.old.errors} of "
            f"{now.old.requests} of the old version; max_error_rate is {rules.max_error_rate:g}"
        )
    ratio = rules.max_latency_ratio
    if ratio is not None and now.old.requests and now.new.mean_s > ratio * now.old.mean_s:
        return (
            f"a request takes it {now.new.mean_s * 1000:.2f} ms, and the old version "
            f"{now.old.mean_s * 1000:.2f} ms; max_latency_ratio is {ratio:g}"
        )
    return None


class Trial:
    """A version that is tried, on its way through the steps. Changed under the manager's lock.

    Attributes:
        percent: its share of the requests.
        shadow: it is asked copies, and answers nobody.
        ordered: what people said: TAKE_OVER or TAKE_BACK.
        paused: as of `Progress`.
        worst: as of `Progress`.
        compared: requests of a shadow whose answers were compared.
    """

    def __init__(self, config: ModelConfig, now_s: float, old: Traffic) -> None:
        self._old_before = old
        self._new_before = Traffic()
        self._inside: dict[Lease, Callable[[], bool]] = {}
        self._since_s = now_s
        self.step = 0
        self.worst = 0.0
        self.compared = 0
        self.ordered: Verdict | None = None
        self.paused = False
        self._of(config)

    def _of(self, config: ModelConfig) -> None:
        rules = config.rollout
        stages = rules.stages if rules is not None else ()
        self.steps = len(stages)
        self.shadow = rules is not None and rules.shadow is not None
        self.percent = stages[min(self.step, len(stages) - 1)].percent if stages else 0.0

    def adopt(self, config: ModelConfig, now_s: float, new: Traffic) -> None:
        """Go by other rules from now on. Between canary and shadow they begin with their first step: what
        was seen of the one is not what the other is to show."""
        was_shadow = self.shadow
        self.step = min(self.step, len(config.rollout.stages) - 1) if config.rollout else 0
        self._of(config)
        if self.shadow is not was_shadow:
            self.step, self._since_s, self._new_before = 0, now_s, new
            self._of(config)

    def watch(self, lease: Lease, gave_up: Callable[[], bool]) -> None:
        """One of both versions has a request from now on; `gave_up` says whether its caller waits no more.

        Any thread may call it.
        """
        self._inside[lease] = gave_up

    def traffic_of(self, instance: ManagedModel) -> Traffic:
        """The requests of one of both versions so far.

        Those that it has and whose callers have given up have failed already: a version that hangs would
        not be found out otherwise, because its requests never end.
        """
        ended, inside = instance.traffic, list(self._inside.items())
        for lease, _ in inside:
            if lease.released:
                self._inside.pop(lease, None)
        lost = sum(
            lease.instance is instance and not lease.released and gave_up()
            for lease, gave_up in inside
        )
        return Traffic(ended.requests + lost, ended.errors + lost, ended.busy_s)

    def judged(
        self, config: ModelConfig, now_s: float, new: Traffic, old: Traffic | None
    ) -> tuple[Verdict, str]:
        """What is to be done, and why; see `judge`.

        Args:
            old: None once the old version serves no more.
        """
        if self.ordered is Verdict.TAKE_OVER:
            return self.ordered, "takes over: somebody has promoted it"
        if self.ordered is Verdict.TAKE_BACK:
            return self.ordered, "was aborted by somebody"
        return judge(
            config,
            Progress(
                self.step,
                now_s - self._since_s,
                new,
                old.since(self._old_before) if old is not None else Traffic(),
                new.since(self._new_before),
                self.worst,
                alone=old is None,
                paused=self.paused,
            ),
        )

    def next_step(self, config: ModelConfig, now_s: float, new: Traffic) -> None:
        """The next step begins."""
        self.step += 1
        self._since_s, self._new_before = now_s, new
        self._of(config)

    def step_ends_s(self, config: ModelConfig) -> float:
        """When the step may end."""
        assert config.rollout is not None
        return self._since_s + config.rollout.stages[self.step].for_s

    @property
    def note(self) -> str:
        """Where it stands, for people."""
        stays = "; goes no further while the model is suspended" if self.paused else ""
        if self.shadow:
            return f"shadow: asked a copy of {self.percent:g} % of the requests{stays}"
        step = f"step {self.step + 1} of {self.steps}"
        return f"canary: {step}, {self.percent:g} % of the requests{stays}"
