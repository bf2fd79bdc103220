"""What a node answers on its control socket, question by question.

It translates: questions into calls of the loop and of its status book, and what they give into data for
JSON. It decides nothing about models; what a command does and refuses is the loop's business. Answers
that wait (`events`, `wait_change`, `look`) look up now and then whether the asker still listens.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from splitlearn_manager.desired.scanner import SERVER_FILE
from splitlearn_manager.errors import ModelNotFound, SplitlearnError
from splitlearn_manager.reconcile.described import history_dict
from splitlearn_manager.reconcile.observation import Observation, to_json
from splitlearn_manager.server.control import Answer, Question

if TYPE_CHECKING:
    from splitlearn_manager.reconcile.record import HistoryEntry

LONGEST_WAIT_S = 300.0

_PAUSE_S = 0.25
_LOOK_PAUSE_S = 5.0
# A loop that is stuck for so long is said to be so by `status`; the command is taken all the same.
_IN_FORCE_S = 5.0


class LoopStuck(SplitlearnError):
    """The loop has ended no turn in the time given."""


class Book(Protocol):
    """What is told of the models: `reconcile.status.StatusBook`."""

    @property
    def phases(self) -> Mapping[str, object]: ...
    @property
    def revision(self) -> int: ...
    def describe(self, model_id: str) -> dict[str, object] | None: ...
    def models(self) -> list[dict[str, object]]: ...
    def node(self) -> dict[str, object]: ...
    def events(
        self, after: int = 0, model_id: str | None = None
    ) -> tuple[list[dict[str, object]], int]: ...
    def explain(self, model_id: str) -> dict[str, object] | None: ...


class Loop(Protocol):
    """What can be asked of the loop: `reconcile.reconciler.Reconciler`."""

    @property
    def status(self) -> Book: ...
    def wake(self) -> None: ...
    def await_turn(self, timeout_s: float) -> bool: ...
    def observe(self) -> Observation: ...
    def history(self, model_id: str) -> tuple[HistoryEntry, ...]: ...
    def suspend(self, model_id: str) -> str: ...
    def resume(self, model_id: str) -> str: ...
    def retry(self, model_id: str) -> str: ...
    def promote(self, model_id: str) -> str: ...
    def abort(self, model_id: str) -> str: ...
    def confirm_prune(self, digest: str) -> str: ...


class Node(Protocol):
    """The node that answers: `server.managed_server.ManagedServer`."""

    @property
    def reconciler(self) -> Loop: ...
    def loop_alive(self) -> bool: ...
    def record_golden(
        self, model_id: str, target: Path, inputs_from: Path | None
    ) -> Mapping[str, object]: ...


def node_answers(node: Node) -> Mapping[str, Answer]:
    """The answers of a node, by the name of the question."""
    api = _NodeApi(node)
    return {
        "observe": lambda question: to_json(node.reconciler.observe()),
        "names": api.names,
        "status": api.status,
        "explain": api.explain,
        "history": api.history,
        "suspend": lambda question: api.command(question, node.reconciler.suspend),
        "resume": lambda question: api.command(question, node.reconciler.resume),
        "retry": lambda question: api.command(question, node.reconciler.retry),
        "promote": lambda question: api.command(question, node.reconciler.promote),
        "abort": lambda question: api.command(question, node.reconciler.abort),
        "confirm_prune": api.confirm_prune,
        "golden": api.golden,
        "events": api.events,
        "wait_change": api.wait_change,
        "look": api.look,
    }


class _NodeApi:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._loop = node.reconciler
        self._book = node.reconciler.status

    def names(self, question: Question) -> Mapping[str, object]:
        return {"model_ids": sorted(self._book.phases)}

    def status(self, question: Question) -> Mapping[str, object]:
        """The node, and all models or those that are named; those that do not exist are left out.

        In brief, of each model only those conditions that are not True are told, and no events.
        """
        # First, so that a change while the rest is gathered is noticed by the next `wait_change`.
        turn = self._book.revision
        wanted = question.texts("models")
        if wanted is None:
            models = self._book.models()
        else:
            described = [self._book.describe(model_id) for model_id in dict.fromkeys(wanted)]
            models = [model for model in described if model is not None]
        if question.flag("brief"):
            models = [_brief(model) for model in models]
        return {
            "turn": turn,
            "loop_alive": self._node.loop_alive(),
            "node": self._book.node(),
            "models": models,
        }

    def explain(self, question: Question) -> Mapping[str, object]:
        explanation = self._book.explain(question.text("model_id"))
        if explanation is None:
            raise self._not_found(question.text("model_id"))
        return explanation

    def history(self, question: Question) -> Mapping[str, object]:
        model_id = question.text("model_id")
        entries = self._loop.history(model_id)
        if not entries and self._book.describe(model_id) is None:
            raise self._not_found(model_id)
        return history_dict(model_id, entries)

    def command(self, question: Question, carry_out: Callable[[str], str]) -> Mapping[str, object]:
        model_id = question.text("model_id")
        if self._book.describe(model_id) is None:
            raise self._not_found(model_id)
        return {"model_id": model_id, "message": self._in_force(carry_out(model_id))}

    def confirm_prune(self, question: Question) -> Mapping[str, object]:
        message = self._loop.confirm_prune(question.text("digest"))
        return {"message": self._in_force(message)}

    def golden(self, question: Question) -> Mapping[str, object]:
        """Records answers of the version that serves in a file."""
        model_id = question.text("model_id")
        if self._book.describe(model_id) is None:
            raise self._not_found(model_id)
        inputs = question.optional_text("inputs")
        return self._node.record_golden(
            model_id, Path(question.text("file")), None if inputs is None else Path(inputs)
        )

    def events(self, question: Question) -> Mapping[str, object]:
        """Events after a serial; waits for some if there are none. `next` is what to ask for next."""
        after, model_id = int(question.number("after", 0)), question.optional_text("model_id")
        found: list[dict[str, object]] = []
        serial = after
        for _ in self._looks(question):
            found, serial = self._book.events(after, model_id)
            if found:
                break
        return {"events": found, "next": serial}

    def wait_change(self, question: Question) -> Mapping[str, object]:
        """Waits until something that `status` shows has changed since it told that `turn`."""
        known = int(question.number("turn", 0))
        for _ in self._looks(question):
            if self._book.revision != known:
                break
        return {"turn": self._book.revision}

    def look(self, question: Question) -> Mapping[str, object]:
        """Has the loop look at the directory at once; answers when a turn that began after it has ended."""
        wait_s = min(question.number("wait_s", 60), LONGEST_WAIT_S)
        end, pause_s = monotonic() + wait_s, _PAUSE_S
        while True:
            # The turn may begin before the wait for it does, which then is for the next one: so it is
            # asked for again, after pauses that soon are longer than any turn.
            self._loop.wake()
            left_s = max(0.0, end - monotonic())
            if self._turn_ends(min(pause_s, left_s)) or not question.listens():
                return {"turn": self._book.revision}
            if left_s <= pause_s:
                raise LoopStuck(
                    f"the node has not ended a look at its directory in {wait_s:g} s; its log says more"
                )
            pause_s = min(2 * pause_s, _LOOK_PAUSE_S)

    def _looks(self, question: Question) -> Iterator[None]:
        """A look at once, and then one after each pause, while there is time and somebody who asks."""
        end = monotonic() + min(question.number("wait_s", 0), LONGEST_WAIT_S)
        while True:
            yield
            left_s = end - monotonic()
            if left_s <= 0 or not question.listens():
                return
            self._turn_ends(min(_PAUSE_S, left_s))

    def _turn_ends(self, pause_s: float) -> bool:
        """Whether a turn begins and ends within the pause; a loop that was stopped waits it out."""
        end = monotonic() + pause_s
        if self._loop.await_turn(pause_s):
            return True
        threading.Event().wait(max(0.0, end - monotonic()))
        return False

    def _in_force(self, message: str) -> str:
        """The message, once the loop has acted on the command and written it down: who is answered can
        count on it, whatever happens to the node then."""
        self._loop.wake()
        self._loop.await_turn(_IN_FORCE_S)
        return message

    def _not_found(self, model_id: str) -> ModelNotFound:
        node = self._book.node()
        conflicts = node.get("conflicts")
        if isinstance(conflicts, dict) and model_id in conflicts:
            places = " and ".join(conflicts[model_id])
            return ModelNotFound(
                f"no declaration of {model_id!r} has been accepted: it is declared in {places}; keep one"
            )
        return ModelNotFound(not_found(model_id, self._book.phases, _not_accepted(model_id, node)))


def _brief(model: dict[str, object]) -> dict[str, object]:
    conditions = model.get("conditions")
    left = [c for c in conditions if c["status"] != "True"] if isinstance(conditions, list) else []
    return {**{k: v for k, v in model.items() if k != "events"}, "conditions": left}


def _not_accepted(model_id: str, node: Mapping[str, object]) -> tuple[str, ...]:
    """The files that may declare the model and are not accepted; one of its name first."""
    problems = node.get("problems")
    files = {str(p["file"]) for p in problems} if isinstance(problems, list) else set()
    return tuple(sorted(files - {SERVER_FILE}, key=lambda f: (PurePath(f).stem != model_id, f)))


def not_found(model_id: str, known: Mapping[str, object], not_accepted: Sequence[str] = ()) -> str:
    """That there is no such model, and which one may be meant, or where it may be declared."""
    message = f"the node has no model {model_id!r}"
    if not_accepted and PurePath(not_accepted[0]).stem == model_id:
        return f"{message}: {not_accepted[0]} is not accepted, `status` says why"
    if similar := difflib.get_close_matches(model_id, known, n=1):
        return f"{message}: did you mean {similar[0]!r}?"
    if not known:
        return f"{message}; it has none at all"
    some = sorted(known)[:6]
    more = len(known) - len(some)
    has = f"{message}; it has {', '.join(some)}" + (f" and {more} more" if more else "")
    if not not_accepted:
        return has
    others = len(not_accepted) - 1
    files = not_accepted[0] + (f" and {others} more" if others else "")
    return f"{has}; it may be declared in a file that is not accepted ({files}): `status` says why"
