"""What the world does: each kind of act of a script, carried out on the machine and the running node.

An act that cannot be carried out does nothing and says so. Whatever takes time (a torn write that is
completed, a directory that comes back) goes on the machine's agenda.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from simulation.directory import Directory
from simulation.models import Fates, weights
from simulation.script import FILES, Act
from simulation.texts import IDS, ROOT, Doc, Text, text_of
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.errors import SplitlearnError

if TYPE_CHECKING:
    from simulation.episode import Episode

WEIGHTS = "/weights"


class World:
    """See the module's text."""

    def __init__(self, episode: Episode) -> None:
        self._episode = episode
        self._machine = episode.machine
        self._fs = episode.machine.fs
        self._make_weights()
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

    def _race(self, what: str, model_id: str) -> None:
        """Other threads do something after the loop has planned, and before it acts."""
        if what == "a request":
            self._episode.races.append(lambda: self._request(model_id, 5.0, 1.0))
        elif what == "work":
            self._episode.races.append(self._episode.work_at_once)
        else:
            self._episode.races.append(lambda: self._api_unload(model_id))

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

    def _api_unload(self, model_id: str) -> None:
        self._episode.checks.shared_causes += 2
        if (node := self._episode.node) is not None:
            self._machine.tell("node", f"Python's unload of {model_id} {node.api_unload(model_id)}")

    def _suspend(self, model_id: str) -> None:
        if self._command("suspend", model_id):
            self._episode.oracle.suspended.add(model_id)

    def _resume(self, model_id: str) -> None:
        if self._command("resume", model_id):
            self._episode.oracle.suspended.discard(model_id)

    def _retry(self, model_id: str) -> None:
        if self._command("retry", model_id):
            self._episode.checks.excuse(model_id)

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
        self._confirm("right")
        for model_id in IDS:
            self._api_unload(model_id)

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
