"""One episode: a script played against a node, with everything checked, and then the quiet at the end.

    acts, faults, crashes … ──► all faults over ──► comes to rest (I3) ──► as declared (I4, I5, I15)
                                                                       ──► an hour of nothing (I2)

A step is a turn of the loop, a piece of work, or an act of the world; whatever is due first comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from random import Random

from simulation.checks import Checks, Planned
from simulation.epilogue import play_epilogue
from simulation.machine import Broken, Crash, Line, Machine
from simulation.models import ModelLab
from simulation.node import Node
from simulation.oracle import Accepted, Oracle, accepted_of
from simulation.patching import patched
from simulation.rest import check_rest, check_seen
from simulation.script import Act, Script
from simulation.texts import remembered_parsing
from simulation.truth import Truth
from simulation.words import action_words, actions_words, plan_words
from simulation.world import World
from splitlearn_manager.core.events import ManagerEvent
from splitlearn_manager.core.lifecycle import Owner, State
from splitlearn_manager.desired.state import DesiredState, Instructions
from splitlearn_manager.reconcile import turns
from splitlearn_manager.reconcile.actions import Observed, Plan, Wanted
from splitlearn_manager.reconcile.plan import plan as real_plan
from splitlearn_manager.reconcile.turns import Turn

REST_WITHIN_S = 900.0
TURNS_AT_ONCE = 200
"""More turns than that without time passing: the loop spins."""


@dataclass(frozen=True)
class Outcome:
    """How an episode ended.

    Attributes:
        broken: the property that does not hold; None if all do.
        trace: asked for when it is read, because most are not.
    """

    script: Script
    steps: int
    broken: Broken | None
    trace: Callable[[], list[Line]]


class Episode:
    """See the module's text.

    Attributes:
        node: the running process; None while it is down.
        hearing: what becomes of events about files: well, deaf, slow.
        done: verb, model, mode and detail of all that was executed; done_at_rest: until all was calm.
        races: what others do between planning and execution; each says whether that plan is its moment.
        state_is_known: what the next start finds on the disk is known.
        restart_after: (seconds, with a reboot) that the next crash takes.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.settings = script.settings
        self.machine = Machine(lists_stats=self.settings.seed % 2 == 0)
        self.lab = ModelLab(self.machine)
        self.lab.meanwhile = self._meanwhile
        self.state_is_known = True
        self.checks = Checks(self, Random(f"{self.settings.seed}/checks"))
        self.lab.on_measured = self.checks.sizes.measured
        self.oracle = Oracle(Truth(self.machine.fs))
        self.node: Node | None = None
        self.hearing = "well"
        self.event_delay_s = 0.0
        self.restart_after = (0.0, False)
        self.done: list[tuple[object, ...]] = []
        self.done_at_rest: tuple[tuple[object, ...], ...] = ()
        self.races: list[Callable[[Plan], bool]] = []
        self.lives = 0
        self._booted_at = 0.0
        self._runs = False
        self._depth = 0
        self._restart_at: float | None = None
        self._kept: dict[str, tuple[Accepted | None, ...]] = {}
        self._attempt: dict[str, Accepted] = {}
        self._kept_suspended: frozenset[str] = frozenset()
        self._spoiled = False
        self._plans: list[Plan] = []
        self._turns_at_once = 0
        self._last_turn_at = -1.0
        self.world = World(self)

    def play(self) -> Outcome:
        """Plays the script to its end, or to the first property that does not hold."""
        broken: Broken | None = None
        with remembered_parsing(), self._recorded_plans():
            try:
                self._begin()
                for act in self.script.acts:
                    self.let_pass(act.after_s)
                    self._act(act)
                self._end()
            except Broken as found:
                broken = found
        return Outcome(self.script, self.machine.steps, broken, self.machine.trace)

    # The parts of an episode.

    def _begin(self) -> None:
        for name, text in self.script.files:
            self.machine.tell("world", f"{name} says {text}")
            self.world.directory.write(name, text.data)
        self.let_pass(0.3)
        self._start()

    def _act(self, act: Act) -> None:
        self.machine.steps += 1
        self.machine.tell("world", lambda: str(act))
        with suppress(Crash):
            self.world.act(act)
        self._after_step()

    def _end(self) -> None:
        self.machine.steps += 1
        self.machine.tell("world", "--- all faults are over")
        self.machine.no_more_faults()
        self.races.clear()
        self.lab.no_more_faults()
        self.hearing = "deaf"
        self.world.directory.move_back()
        self.world.directory.make_root()
        if self.settings.tidy:
            self.world.put_right()
        self.oracle.changed(self.machine.t)
        self.let_pass(50.0)
        self.world.resume_rollouts()
        check_seen(self)
        self.hearing = "well"
        self.come_to_rest()
        if self.settings.tidy:
            check_rest(self)
            self.world.last_words()
            self.come_to_rest()
        check_rest(self)
        self.done_at_rest = tuple(self.done)
        self.checks.no_flapping()
        self._idle()
        play_epilogue(self)

    def come_to_rest(self) -> None:
        """I3."""
        until = self.machine.t + REST_WITHIN_S
        while True:
            node = self.node
            assert node is not None
            for item in list(node.executor.waiting):
                self._work(partial(node.executor.run, item))
            self.wake()
            self.let_pass(max(1.0, 2 * node.source.settle_s))
            last = node.last
            assert last is not None
            busy = node.executor.waiting or node.requests or self._passes_by_itself(node)
            if last.settled and not busy:
                return
            if self.machine.t > until:
                raise Broken("I3", f"no rest after {REST_WITHIN_S:g} s; {plan_words(last.plan)}")

    def _passes_by_itself(self, node: Node) -> bool:
        """Something waits for its time, and not for ever again: a passing failure, a limit, keep_alive_s."""
        assert node.last is not None
        for waiting in node.last.plan.waiting:
            model = node.last.desired.models.get(waiting.model_id)
            if waiting.until_s is None or model is None:
                continue
            lasts = model.config.config.kwargs.get("fail") is not None
            passes = not lasts and model.weights_problem is None
            if passes or waiting.reason == "RateLimited":
                return True
        return False

    def _idle(self) -> None:
        """I2: an hour in which nothing changes, and nothing is done."""
        node = self.node
        assert node is not None
        failing = set(node.loop._memory.attempts)
        parked_by_time = {i.model_id for i in node.instances if i.config.keep_alive_s is not None}
        for seconds in (1.0, 1.0, 1.0, 60.0, *([300.0] * 11), 237.0):
            self.machine.move_to(self.machine.t + seconds)
            self._turn(node)
            assert node.last is not None
            for action in node.last.executed:
                concerned = {action.model_id, action.detail.removeprefix("makes room for ")}
                if not concerned & (failing | parked_by_time):
                    raise Broken("I2", f"nothing happens, and {action_words(action)}")
        self._nothing_outstays(node)
        self.let_pass(0.0)
        self.come_to_rest()

    def _nothing_outstays(self, node: Node) -> None:
        """I3: what was idle for an hour is parked, where its keep_alive_s is shorter."""
        assert node.last is not None
        desired = node.last.desired.models
        for instance in node.instances:
            model = desired.get(instance.model_id)
            if model is None or model.suspended or instance.owner is not Owner.DIRECTORY:
                continue
            current = instance.spec.spec_hash == model.spec_hash and instance.state is State.READY
            may_stay = instance.config.keep_alive_s is None or instance.config.pinned
            if current and not may_stay:
                raise Broken("I3", f"{instance!r} is kept for more than its keep_alive_s")

    # Steps.

    def let_pass(self, seconds: float) -> None:
        """Time passes, with all that falls into it, in order."""
        until = self.machine.t + seconds
        while True:
            node = self.node
            turn_at = None
            if node is not None:
                turn_at = self.machine.t if node.woken else max(node.due_at, self.machine.t)
            next_at = self.machine.next_at
            if turn_at is not None and turn_at <= until and (next_at is None or turn_at <= next_at):
                self.machine.move_to(turn_at)
                assert node is not None
                self._turn(node)
            elif next_at is not None and next_at <= until:
                self.machine.move_to(next_at)
                self._work(self.machine.pop())
            else:
                break
        self.machine.move_to(until)

    def _turn(self, node: Node) -> None:
        self.machine.steps += 1
        before = self.machine.t
        try:
            turn = node.turn()
        except Crash:
            self._after_step()
            return
        except Broken:
            raise
        except Exception as error:
            raise Broken("a turn ends", f"{type(error).__name__}: {error}") from error
        self._turns_at_once = self._turns_at_once + 1 if before - self._last_turn_at < 1e-3 else 0
        self._last_turn_at = before
        if self._turns_at_once > TURNS_AT_ONCE:
            raise Broken("I2", f"{TURNS_AT_ONCE} turns without time passing")
        if turn.executed:
            self.done += [(a.verb, a.model_id, a.mode, a.detail) for a in turn.executed]
            self.machine.tell("node", lambda: f"turn: {actions_words(turn.executed)}")
        self.checks.turn(node, turn)
        self._note_kept(node, turn)
        self._after_step()

    def _work(self, do: Callable[[], None]) -> None:
        self.machine.steps += 1
        try:
            do()
        except Crash:
            pass
        except Broken:
            raise
        except Exception as error:
            raise Broken("work ends", f"{type(error).__name__}: {error}") from error
        self._after_step()

    def _meanwhile(self, seconds: float) -> None:
        """Time passes in the middle of a piece of work. Raises Crash if the node does not survive it."""
        self._depth += 1
        try:
            self.let_pass(seconds)
        except Broken as broken:
            # The work that this is the middle of would take it for an error of its own.
            self.machine.violated(broken.property_id, broken.message)
            raise
        finally:
            self._depth -= 1

    def _race(self, made: Plan) -> None:
        for number, race in enumerate(self.races):
            if race(made):
                del self.races[number]
                return

    def work_at_once(self) -> None:
        """The oldest piece of work that waits runs now."""
        if self.node is not None and self.node.executor.waiting:
            self.node.executor.run(self.node.executor.waiting[0])

    def _after_step(self) -> None:
        if self.machine.violation is not None:
            raise self.machine.violation
        node = self.node
        if node is not None and not self.machine.dead:
            with suppress(Crash):
                for request in node.step_requests():
                    who = request.model_id
                    self.machine.tell("node", f"a request for {who} ended: {request.ended}")
        if self.machine.dead:
            if self._depth:
                raise Crash  # out of the work that this is the middle of; its process is gone
            self._bury()
        elif node is not None:
            self.checks.step(node)
            if self.machine.violation is not None:
                raise self.machine.violation

    # The node's processes.

    def _start(self) -> None:
        self.machine.dead = False
        self.lives += 1
        self._spoiled = False
        self.lab.new_process()
        self.checks.new_process()
        if not self.state_is_known:
            self.checks.good.clear()
        kept = self._kept_suspended if self.state_is_known else frozenset()
        self.oracle.suspended &= kept
        self.oracle.truth.see(self.machine.t)
        self.oracle.begin_process(self._kept, is_known=self.state_is_known)
        self.machine.tell("node", f"starts, process {self.lives}")
        self._runs = True
        try:
            node = Node(
                self.machine,
                self.lab,
                self.settings,
                booted_at=self._booted_at,
                life=self.lives,
                reads_devices=self.script.reads_devices,
                on_event=self._on_event,
                on_change=self._on_change,
            )
            self._watch_looks(node)
            self.node = node
            node.start()
        except Crash:
            self._after_step()

    def _bury(self) -> None:
        """What a process leaves when it dies: files, and nothing else."""
        if not self._runs:
            return
        self._runs = False
        if self.node is not None:
            if not self.node.keeps_state:
                self.checks.good.clear()
            self.node.executor.waiting.clear()
        self.node = None
        self.lab.new_process()
        self.checks.shared_causes += 3
        down_s, reboot = self.restart_after
        if reboot:
            self._booted_at = self.machine.t + down_s
        self.machine.later(down_s, self._start)

    def state_damaged(self, *, spoiled: bool) -> None:
        """Files of state_dir are gone (which a look notices), or spoiled (which only a start does)."""
        self.state_is_known = False
        self._spoiled = self._spoiled or spoiled

    def _watch_looks(self, node: Node) -> None:
        real_look = node.source.look

        def look(now: float, instructions: Instructions) -> DesiredState:
            self.oracle.begin_look(self.machine.t)
            faults = self.machine.scan_faults
            try:
                after = real_look(now, instructions)
            except Crash:
                self.oracle.truth.end_look()
                raise
            self._tell_desired(after)
            self.oracle.end_look(
                after,
                self.machine.t,
                node.source.settle_s,
                node.source.prune_guard_percent,
                faults=self.machine.scan_faults != faults,
            )
            self._note_attempt(after)
            return after

        node.source.look = look  # type: ignore[method-assign]

    def _note_attempt(self, after: DesiredState) -> None:
        """From now until the turn has ended, a crash may leave this or what was before."""
        present = {**dict(after.undecided), **after.models}
        attempt = {model_id: accepted_of(model) for model_id, model in present.items()}
        kept: dict[str, tuple[Accepted | None, ...]] = {}
        for model_id in {*self._kept, *attempt}:
            found = dict.fromkeys([*self._kept.get(model_id, (None,)), attempt.get(model_id)])
            if model_id in attempt:
                before = self._attempt.get(model_id)
                if before is None or before.spec_hash != attempt[model_id].spec_hash:
                    self.checks.causes[model_id] += 2
                    self.checks.shared_causes += 1
            kept[model_id] = tuple(found)
        self._kept, self._attempt = kept, attempt

    def _note_kept(self, node: Node, turn: Turn) -> None:
        """The turn has ended; what the node says of its state files is held against it."""
        if node.keeps_state:
            self._kept = {m: (found,) for m, found in self._attempt.items()}
            self._kept_suspended = frozenset(self.oracle.suspended)
            self.state_is_known = self.state_is_known or (turn.looked and not self._spoiled)

    def _tell_desired(self, after: DesiredState) -> None:
        before = self.oracle.managed
        for model_id, model in after.models.items():
            old = before.get(model_id)
            if old is None or old.spec_hash != model.spec_hash:
                self.checks.excuse(model_id)
                self.machine.tell(
                    "node",
                    f"accepts {model_id} generation {model.generation} from {model.source}",
                )
        for model_id in before:
            if model_id not in after.models and model_id not in after.undecided:
                self.machine.tell("node", f"{model_id} is desired no more")
                self.checks.forget(model_id)

    def _on_event(self, event: ManagerEvent) -> None:
        if self.node is None or self.machine.dead:
            return
        self.machine.tell("node", f"{event.key} {event.kind}: {event.message}")
        self.checks.event(self.node, event)

    def _on_change(self) -> None:
        if self.node is not None and not self.machine.dead:
            self.checks.transition(self.node)

    # Events about files.

    def files_changed(self) -> None:
        """Called after each change of the directory."""
        self.oracle.changed(self.machine.t)
        self.hear()

    def hear(self) -> None:
        """An event, as far as they are heard."""
        if self.hearing == "well":
            self.wake()
        elif self.hearing == "slow":
            self.machine.later(self.event_delay_s, self.wake)
            self.machine.later(2 * self.event_delay_s, self.wake)

    def wake(self) -> None:
        if self.node is not None:
            self.node.loop.wake()

    def plans_during(self, seconds: float) -> list[Plan]:
        """The plans with something to do that are made from now on, until so much time has passed."""
        self._plans = []
        self.let_pass(seconds)
        return self._plans

    @contextmanager
    def _recorded_plans(self) -> Iterator[None]:
        def recorded(desired: Mapping[str, Wanted], observed: Observed) -> Plan:
            made = real_plan(desired, observed)
            if self.node is None or desired is not self.node.loop._wishes._wanted:
                return made  # a dry run
            self.checks.planned = Planned(desired, observed, made)
            if made.actions:
                self._plans.append(made)
            if made.actions:
                self._race(made)
            return made

        with patched(turns, "plan", recorded):
            yield
