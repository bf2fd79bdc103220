"""What the world does: each kind of act of a script, carried out on the machine and the running node.

An act that cannot be carried out does nothing and says so. Whatever takes time (a torn write that is
completed, a directory that comes back) goes on the machine's agenda.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from simulation.directory import Directory
from simulation.models import Fates, weights
from simulation.script import FILES, Act
from simulation.texts import IDS, ROOT, Doc, Text, text_of
from simulation.weights_truth import WEIGHTS, WeightsTruth
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.errors import SplitlearnError
from splitlearn_manager.reconcile.actions import Plan, Verb

if TYPE_CHECKING:
    from simulation.episode import Episode


class World:
    """See the module's text."""

    def __init__(self, episode: Episode) -> None:
        self._episode = episode
        self._machine = episode.machine
        self._fs = episode.machine.fs
        self._make_weights()
        self.weights = WeightsTruth(self._machine)
        self.weights.changed()
        episode.lab.on_rewrite = self.weights.changed
        self.directory = Directory(self._machine, episode.settings.layout, episode.files_changed)

    def act(self, act: Act) -> None:
        getattr(self, f"_{act.kind}")(*act.args)

    def _make_weights(self) -> None:
        self._fs.mkdir(WEIGHTS)
        for number, model_id in enumerate(IDS):
            self._fs.write(f"{WEIGHTS}/{model_id}.pt", weights(20, number))
        self._fs.write(f"{WEIGHTS}/shared.pt", weights(10, 0))
        self._fs.mkdir(f"{WEIGHTS}/dir")
        self._fs.write(f"{WEIGHTS}/dir/part1", weights(10, 0))
        self._fs.write(f"{WEIGHTS}/dir/part2", weights(15, 0))
        self._fs.symlink("m0.pt", f"{WEIGHTS}/link.pt")

    # Files.

    def _wait(self) -> None:
        pass

    def _write(self, name: str, text: Text) -> None:
        self.directory.write(name, text.data)

    def _replace(self, name: str, text: Text) -> None:
        self.directory.write(name, text.data, anew=True)

    def _tear(self, name: str, text: Text, share: float, rest_after_s: float) -> None:
        self.directory.tear(name, text.data, share, rest_after_s)

    def _lie(self, name: str, text: Text) -> None:
        self.directory.lie(name, text.data)

    def _hammer(self, model_id: str, times: int, gap_s: float) -> None:
        name = FILES[IDS.index(model_id)]
        for number in range(times):
            doc = Doc(model_id, (("fail", "fail"), ("v", 1 + number % 3)))
            self._machine.later(
                number * gap_s, partial(self.directory.write, name, text_of([doc]).data)
            )
            self._machine.later((number + 0.9) * gap_s, partial(self._retry, model_id))

    def _try_out(self, model_id: str, text: Text, suspend_at_s: float, for_s: float) -> None:
        self.directory.write(FILES[IDS.index(model_id)], text.data)
        for number in range(1, 13):
            self._machine.later(number * 0.8, partial(self._request, model_id, 0.0, 20.0))
        if suspend_at_s:
            self._machine.later(suspend_at_s, partial(self._suspend, model_id))
            if for_s:
                self._machine.later(suspend_at_s + for_s, partial(self._resume, model_id))

    def _append(self, name: str, text: Text) -> None:
        before = self.directory.content(name)
        self.directory.write(name, (before + b"---\n" if before else b"") + text.data)

    def _break(self, name: str, text: Text) -> None:
        self.directory.write(name, text.data)

    def _delete(self, name: str) -> None:
        self.directory.delete(name)

    def _recreate(self, name: str, text: Text, after_s: float) -> None:
        self.directory.delete(name)
        self._machine.later(after_s, lambda: self.directory.write(name, text.data))

    def _rename(self, old: str, new: str) -> None:
        self.directory.rename(old, new)

    def _touch(self, name: str, mtime_ns: int | None) -> None:
        self.directory.touch(name, mtime_ns)

    def _litter(self, name: str, text: Text) -> None:
        if self.directory.by_hand:
            self.directory.write(name, text.data)

    def _dangle(self, name: str) -> None:
        self.directory.dangle(name)

    def _delete_all(self, gap_s: float) -> None:
        for number, name in enumerate(FILES):
            self._machine.later(number * gap_s, lambda n=name: self.directory.delete(n))

    def _root_away(self, for_s: float) -> None:
        self.directory.move_away()
        self._machine.later(for_s, self.directory.move_back)

    def _root_anew(self, after_s: float, gap_s: float) -> None:
        if self.directory.is_away:
            # Between it and what comes back nobody could tell that another one had been there.
            self._machine.tell("world", "it is away")
            return
        held = self.directory.delete_root()
        self._machine.later(after_s, self.directory.make_root)
        for number, (name, data) in enumerate(sorted(held.items())):
            delay_s = after_s + number * gap_s
            self._machine.later(delay_s, lambda n=name, d=data: self.directory.write(n, d))

    def _root_empty(self) -> None:
        self.directory.replace_by_empty()

    def _unreadable(self, name: str, for_s: float) -> None:
        path = f"{ROOT}/{name}" if name else ROOT
        self._fs.fail(path, errno.EACCES)
        self._episode.files_changed()
        self._machine.later(for_s, lambda: self._heal(path))

    def _heal(self, path: str) -> None:
        self._fs.heal(path)
        self._episode.files_changed()

    def _io_error(self, after: int) -> None:
        self._machine.fail_fs_call(after)

    def _mid_scan(self, after: int, name: str, text: Text) -> None:
        self._machine.change_in_mid_scan(after, lambda: self.directory.write(name, text.data))

    def _mid_rename(self, after: int, old: str, new: str) -> None:
        self._machine.change_in_mid_scan(after, lambda: self.directory.rename(old, new))

    def _chase(self, old: str, new: str, scans: int, after: int) -> None:
        self._machine.change_in_each_scan(scans, after, partial(self._swing, old, new))

    def _swing(self, old: str, new: str) -> None:
        """From one name to the other, whichever it has."""
        if old in self.directory.names():
            self.directory.rename(old, new)
        elif new in self.directory.names():
            self.directory.rename(new, old)

    # Weights.

    def _weights(self, path: str, data: bytes, how: str) -> None:
        if how == "anew":
            self._change(path, lambda: self._fs.replace(path, data))
        elif how == "torn":
            self._change(path, lambda: self._fs.write(path, data[: len(data) // 2]))
            self._machine.later(0.4, lambda: self._change(path, lambda: self._fs.write(path, data)))
        else:
            self._change(path, lambda: self._fs.write(path, data))

    def _weights_gone(self, path: str) -> None:
        self._change(path, lambda: self._fs.delete(path))

    def _weights_touch(self, path: str) -> None:
        self._change(path, lambda: self._fs.touch(path))

    def _weights_link(self, target: str) -> None:
        self._change("link", lambda: self._fs.symlink(target, f"{WEIGHTS}/link.pt"))

    def _change(self, path: str, change: object) -> None:
        try:
            change()  # type: ignore[operator]
        except (OSError, KeyError):
            self._machine.tell("world", f"{path}: not possible")
            return
        self.weights.changed()
        self._episode.checks.shared_causes += 2
        self._episode.hear()

    # The node's settings.

    def _server(self, text: Text) -> None:
        self.directory.write("server.yaml", text.data)
        self._episode.checks.shared_causes += 2

    def _server_broken(self) -> None:
        self.directory.write("server.yaml", b"max_models: many\n")

    def _server_gone(self) -> None:
        self.directory.delete("server.yaml")

    # Requests, Python, commands.

    def _request(self, model_id: str, hold_s: float, wait_s: float) -> None:
        self._episode.checks.shared_causes += 1
        if (node := self._episode.node) is not None:
            request = node.request(model_id, hold_s, wait_s)
            self._machine.later(wait_s, lambda: None)
            outcome = request.ended or ("runs" if request.lease is not None else "waits")
            self._machine.tell("node", f"the request for {model_id} {outcome}")

    def _turns(self, model_ids: tuple[str, ...], times: int, gap_s: float, hold_s: float) -> None:
        for number in range(times * len(model_ids)):
            model_id = model_ids[number % len(model_ids)]
            self._machine.later(number * gap_s, partial(self._request, model_id, hold_s, 20.0))

    def _race(self, what: str, model_id: str) -> None:
        """Other threads do something after the loop has planned, and before it acts."""
        if what == "a request for each that goes":
            self._episode.races.append(self._ask_for_those_that_go)
            return
        doings = {
            "a request": partial(self._request, model_id, 5.0, 1.0),
            "Python's load": partial(self._api_load_of_another, model_id),
            "work": self._episode.work_at_once,
            "Python's unload": partial(self._api_unload, model_id),
        }
        self._episode.races.append(partial(self._now, doings[what]))

    def _now(self, do: Callable[[], None], made: Plan) -> bool:
        self._machine.tell("world", "meanwhile the loop has planned, and not acted yet:")
        do()
        return True

    def _ask_for_those_that_go(self, made: Plan) -> bool:
        going = [a.model_id for a in made.actions if a.verb in (Verb.EVICT, Verb.UNLOAD)]
        if going:
            self._machine.tell("world", "they go by the plan, which is not carried out yet:")
        for model_id in going:
            self._request(model_id, 5.0, 1.0)
        return bool(going)

    def _api_load(self, model_id: str, keys: tuple[tuple[str, object], ...]) -> None:
        self._episode.checks.shared_causes += 2
        if (node := self._episode.node) is not None:
            config = ModelConfig(
                model_id=model_id,
                model_path=f"{WEIGHTS}/{model_id}.pt",
                device="cpu",
                config={"kwargs": dict(keys)},  # type: ignore[arg-type]
            )
            self._machine.tell("node", f"Python's load of {model_id} {node.api_load(config)}")

    def _api_load_of_another(self, model_id: str) -> None:
        """Of one that is not there, and that the directory is not likely to declare."""
        if (node := self._episode.node) is not None:
            first = IDS.index(model_id)
            there = {instance.model_id for instance in node.instances}
            absent = [i for i in (*IDS[first:], *IDS[:first]) if i not in there]
            if absent:
                self._api_load(absent[-1], ())

    def _api_unload(self, model_id: str) -> None:
        self._episode.checks.shared_causes += 2
        if (node := self._episode.node) is not None:
            self._machine.tell("node", f"Python's unload of {model_id} {node.api_unload(model_id)}")

    def _suspend(self, model_id: str) -> None:
        if self._command("suspend", model_id):
            self._episode.oracle.suspended.add(model_id)
            self._episode.oracle.ever_suspended.add(model_id)

    def _resume(self, model_id: str) -> None:
        if self._command("resume", model_id):
            self._episode.oracle.suspended.discard(model_id)

    def _retry(self, model_id: str) -> None:
        if self._command("retry", model_id):
            self._episode.checks.excuse(model_id)

    def _promote(self, model_id: str) -> None:
        if self._command("promote", model_id):
            self._episode.checks.promoted.add(model_id)

    def _abort(self, model_id: str) -> None:
        if self._command("abort", model_id):
            self._episode.checks.shared_causes += 1

    def _confirm(self, which: str) -> None:
        guards = self._episode.oracle.guards
        digest = "0123456789ab"
        if which != "wrong" and guards:
            node = self._episode.node
            current = node.last.desired.prune_guard if node and node.last else None
            digest = current.digest if which == "right" and current else list(guards)[-1]
        if self._command("confirm_prune", digest):
            self._episode.oracle.confirmed |= guards.get(digest, frozenset())

    def _command(self, name: str, argument: str) -> bool:
        """Whether the node took the command."""
        if (node := self._episode.node) is None:
            return False
        self._episode.checks.shared_causes += 1
        try:
            said = getattr(node.loop, name)(argument)
        except SplitlearnError as error:
            self._machine.tell("node", f"refuses to {name} {argument}: {error.reason}")
            return False
        self._machine.tell("node", f"{name} {argument}: {said}")
        return True

    # Events.

    def _deaf(self, for_s: float) -> None:
        self._episode.hearing = "deaf"
        self._machine.later(for_s, self._hear_well)

    def _slow_events(self, by_s: float) -> None:
        self._episode.hearing = "slow"
        self._episode.event_delay_s = by_s
        self._machine.later(20 * by_s, self._hear_well)

    def _hear_well(self) -> None:
        self._episode.hearing = "well"

    def _noise(self) -> None:
        self._episode.wake()

    # Faults of the machine.

    def _fates(self, model_id: str, fates: Fates) -> None:
        self._episode.lab.add_fates(model_id, fates)

    def _hang(self, model_id: str, fates: Fates) -> None:
        self._episode.lab.add_fates(model_id, fates)

    def _midway(self, model_id: str, fates: Fates) -> None:
        self._episode.lab.add_fates(model_id, fates)

    def _slow_close(self, takes_s: float) -> None:
        self._episode.lab.close_takes_s = takes_s

    def _close_raises(self) -> None:
        self._episode.lab.closes_that_raise += 1

    def _no_threads(self, count: int) -> None:
        self._episode.lab.threads_refused += count

    def _others(self, device: str, share: float, for_s: float) -> None:
        others, mb = self._episode.lab.others, share * self._episode.settings.totals_mb[device]
        self._episode.checks.shared_causes += 3
        others.take(device, mb, self._machine.t)
        self._machine.later(for_s, lambda: others.take(device, 0.0, self._machine.t))

    def _stall(self, device: str, for_s: float) -> None:
        stalled = self._episode.lab.others.stalled
        self._episode.checks.shared_causes += 3
        stalled.add(device)
        self._machine.later(for_s, lambda: stalled.discard(device))

    def _crash(self, down_s: float, reboot: bool) -> None:
        self._episode.restart_after = (down_s, reboot)
        if self._episode.node is not None:
            self._machine.die("from outside")

    def _crash_at(self, kind: str, after: int, down_s: float, reboot: bool) -> None:
        self._episode.restart_after = (down_s, reboot)
        self._machine.crash_at = (kind, after)

    def _disk_full(self, for_s: float) -> None:
        self._machine.state.error = errno.ENOSPC
        self._machine.later(for_s, self._machine.state.heal)

    def _state_lost(self) -> None:
        self._machine.state.held.clear()
        self._episode.state_damaged(spoiled=False)

    def _state_spoiled(self, which: int) -> None:
        names = sorted(self._machine.state.held)
        if names:
            self._machine.state.held[names[which % len(names)]] = b'{"version": 1, "mod'
            self._episode.state_damaged(spoiled=True)

    def _wall_jump(self, by_s: float) -> None:
        self._machine.wall_jump_s += by_s

    # The end.

    def last_words(self) -> None:
        """People take back what they asked for, and confirm what is guarded."""
        node = self._episode.node
        assert node is not None
        assert node.last is not None
        for model_id, model in node.last.desired.models.items():
            if model.suspended:
                self._resume(model_id)
        if node.last.desired.prune_guard is not None:
            self._confirm("wrong")
            self._episode.let_pass(2 * node.source.settle_s)
        self._confirm("right")
        for model_id in IDS:
            self._api_unload(model_id)

    def resume_rollouts(self) -> None:
        """A rollout of a suspended model would stay where it is for ever."""
        node = self._episode.node
        for instance in node.instances if node is not None else ():
            if instance.trial is not None:
                self._resume(instance.model_id)

    def put_right(self) -> None:
        """People see to it that each model has one valid file, and that there is room for all."""
        server = b'max_models: 12\nmemory_quota_mb: {cpu: 2000, "cuda:0": 2000}\n'
        for name in self.directory.names():
            if name not in FILES:
                self.directory.delete(name)
        for name in FILES:
            model_id = IDS[FILES.index(name)]
            if model_id in self._episode.settings.ids and self.directory.content(name) is not None:
                self.directory.write(name, text_of([Doc(model_id, (("v", 1),))]).data)
            else:
                self.directory.delete(name)
        self.directory.write("server.yaml", server)
        for number, model_id in enumerate(IDS):
            self._fs.write(f"{WEIGHTS}/{model_id}.pt", weights(20, number))
        self.weights.changed()
