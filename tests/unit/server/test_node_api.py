"""What a node answers, question by question, from its loop and its status book."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from splitlearn_manager.errors import ModelNotFound, SplitlearnError
from splitlearn_manager.reconcile.record import HistoryEntry
from splitlearn_manager.reconcile.status import StatusBook
from splitlearn_manager.server import node_api
from splitlearn_manager.server.control import Question
from splitlearn_manager.server.node_api import node_answers, not_found
from support.fake_node import condition, model, node


class Book:
    """What is told of two models."""

    def __init__(self) -> None:
        self.revision = 1
        self.held = {m: model(m) for m in ("bert", "minilm")}
        self.about = node()
        self.found: list[dict[str, object]] = []

    @property
    def phases(self) -> Mapping[str, object]:
        return {model_id: m["phase"] for model_id, m in self.held.items()}

    def describe(self, model_id: str) -> dict[str, object] | None:
        return self.held.get(model_id)

    def models(self) -> list[dict[str, object]]:
        return list(self.held.values())

    def node(self) -> dict[str, object]:
        return self.about

    def events(
        self, after: int = 0, model_id: str | None = None
    ) -> tuple[list[dict[str, object]], int]:
        found = [e for e in self.found if model_id in (None, e["model_id"])]
        return found[after:], len(self.found)

    def explain(self, model_id: str) -> dict[str, object] | None:
        return {"model_id": model_id, "headline": "is well"} if model_id in self.held else None


class Loop:
    """A loop that ends a turn whenever somebody waits for one, and notes what it is told."""

    def __init__(self) -> None:
        self.status = Book()
        self.told: list[tuple[str, str]] = []
        self.turns = True
        self.at_turn = lambda: None

    def wake(self) -> None:
        self.told.append(("wake", ""))

    def await_turn(self, timeout_s: float) -> bool:
        self.at_turn()
        return self.turns

    def history(self, model_id: str) -> tuple[HistoryEntry, ...]:
        if model_id == "minilm":
            return ()
        return (HistoryEntry(3, 12.5, "priority 0 → 1", "bert.yaml:1", "Ready"),)

    def _order(self, name: str, argument: str) -> str:
        self.told.append((name, argument))
        return f"{name} {argument}: done"

    def suspend(self, model_id: str) -> str:
        return self._order("suspend", model_id)

    def resume(self, model_id: str) -> str:
        return self._order("resume", model_id)

    def retry(self, model_id: str) -> str:
        return self._order("retry", model_id)

    def confirm_prune(self, digest: str) -> str:
        if digest != "abc":
            raise SplitlearnError("there is nothing to confirm", reason="NothingToConfirm")
        return self._order("confirm_prune", digest)


class Node:
    def __init__(self) -> None:
        self.reconciler = Loop()

    def loop_alive(self) -> bool:
        return True

    def ask(self, name: str, **arguments: object) -> dict[str, object]:
        answer = node_answers(self)[name](Question(name, arguments))  # type: ignore[arg-type]
        assert isinstance(answer, Mapping)
        return dict(answer)


@pytest.fixture
def asked() -> Node:
    return Node()


def test_the_status_book_is_what_the_api_asks() -> None:
    book: node_api.Book = StatusBook(lambda: 0.0)
    assert book.models() == []


def test_status_tells_the_node_and_all_models_or_those_that_are_named(asked: Node) -> None:
    everything = asked.ask("status")
    assert everything["node"] == node()
    assert everything["loop_alive"] is True
    assert everything["models"] == [model("bert"), model("minilm")]
    assert asked.ask("status", models=["minilm", "minilm", "none"])["models"] == [model("minilm")]
    assert asked.ask("status", models=[])["models"] == []


def test_status_in_brief_leaves_out_what_is_as_it_should_be(asked: Node) -> None:
    bad = condition("Ready", "False", "LoadFailed", "it raised")
    good = condition("Accepted", "True", "SpecAccepted", "generation 1")
    asked.reconciler.status.held = {
        "bert": model("bert", conditions=[good, bad], events=[{"at": 1}])
    }
    (brief,) = asked.ask("status", brief=True)["models"]  # type: ignore[misc]
    assert brief == {k: v for k, v in model("bert", conditions=[bad]).items() if k != "events"}


def test_history_is_told_as_data(asked: Node) -> None:
    assert asked.ask("history", model_id="bert") == {
        "model_id": "bert",
        "history": [
            {
                "generation": 3,
                "at": 12.5,
                "what": "priority 0 → 1",
                "source": "bert.yaml:1",
                "outcome": "Ready",
            }
        ],
    }
    assert asked.ask("history", model_id="minilm")["history"] == []


@pytest.mark.parametrize("command", ["suspend", "resume", "retry"])
def test_a_command_reaches_the_loop_and_its_sentence_comes_back(asked: Node, command: str) -> None:
    answer = asked.ask(command, model_id="bert")
    assert answer == {"model_id": "bert", "message": f"{command} bert: done"}
    assert asked.reconciler.told[0] == (command, "bert")


@pytest.mark.parametrize("question", ["suspend", "resume", "retry", "confirm_prune"])
def test_a_command_is_answered_when_the_loop_has_acted_on_it(asked: Node, question: str) -> None:
    """Then it is written down: who has an answer can count on it."""
    seen: list[list[tuple[str, str]]] = []
    asked.reconciler.at_turn = lambda: seen.append(list(asked.reconciler.told))
    asked.ask(question, model_id="bert", digest="abc")
    assert [told[0][0] for told in seen] == [question]


def test_a_confirmation_is_the_loops_to_accept_or_to_refuse(asked: Node) -> None:
    assert asked.ask("confirm_prune", digest="abc") == {"message": "confirm_prune abc: done"}
    with pytest.raises(SplitlearnError, match="nothing to confirm"):
        asked.ask("confirm_prune", digest="other")


@pytest.mark.parametrize("question", ["explain", "history", "suspend", "resume", "retry"])
def test_an_id_that_is_misspelt_is_told_what_may_be_meant(asked: Node, question: str) -> None:
    asked.reconciler.history = lambda model_id: ()  # type: ignore[method-assign]
    with pytest.raises(ModelNotFound, match=r"the node has no model 'brt': did you mean 'bert'\?"):
        asked.ask(question, model_id="brt")
    assert asked.reconciler.told == []


def test_an_id_whose_file_is_not_accepted_is_told_so() -> None:
    known = {"bert": "Ready"}
    assert not_found("gpt2", known, ("gpt2.yaml", "a.yaml")) == (
        "the node has no model 'gpt2': gpt2.yaml is not accepted, `status` says why"
    )
    assert not_found("zzz", known, ("a.yaml", "b.yaml")) == (
        "the node has no model 'zzz'; it has bert; it may be declared in a file that is not accepted "
        "(a.yaml and 1 more): `status` says why"
    )


def test_the_file_of_the_models_name_is_named_before_others(asked: Node) -> None:
    problems = [{"file": name} for name in ("a.yaml", "team/gpt2.yaml", "server.yaml")]
    told = asked.reconciler.status.node()
    asked.reconciler.status.node = lambda: {**told, "problems": problems}  # type: ignore[method-assign]
    with pytest.raises(ModelNotFound, match=r"'gpt2': team/gpt2\.yaml is not accepted"):
        asked.ask("explain", model_id="gpt2")


def test_an_id_that_is_unlike_all_others_is_told_which_there_are(asked: Node) -> None:
    with pytest.raises(ModelNotFound, match="no model 'zzz'; it has bert, minilm"):
        asked.ask("explain", model_id="zzz")
    asked.reconciler.status.held = {f"m{n}": model(f"m{n}") for n in range(9)}
    with pytest.raises(ModelNotFound, match="it has m0, m1, m2, m3, m4, m5 and 3 more"):
        asked.ask("explain", model_id="zzz")
    asked.reconciler.status.held = {}
    with pytest.raises(ModelNotFound, match="no model 'zzz'; it has none at all"):
        asked.ask("explain", model_id="zzz")


def test_an_id_that_only_conflicting_files_declare_is_told_where(asked: Node) -> None:
    asked.reconciler.status.about = node(conflicts={"gpt": ["a.yaml:1", "b.yaml:3"]})
    with pytest.raises(ModelNotFound, match=r"declared in a\.yaml:1 and b\.yaml:3; keep one"):
        asked.ask("suspend", model_id="gpt")


def test_events_are_told_at_once_if_there_are_some(asked: Node) -> None:
    asked.reconciler.status.found = [{"model_id": "bert"}, {"model_id": "minilm"}]
    assert asked.ask("events") == {
        "events": [{"model_id": "bert"}, {"model_id": "minilm"}],
        "next": 2,
    }
    assert asked.ask("events", after=1)["events"] == [{"model_id": "minilm"}]
    assert asked.ask("events", model_id="bert")["events"] == [{"model_id": "bert"}]
    assert asked.ask("events", after=2) == {"events": [], "next": 2}


def test_events_are_waited_for(asked: Node) -> None:
    book = asked.reconciler.status
    asked.reconciler.at_turn = lambda: book.found.append({"model_id": "bert"})  # type: ignore[assignment]
    assert asked.ask("events", wait_s=20) == {"events": [{"model_id": "bert"}], "next": 1}


def test_a_wait_is_over_when_its_time_is_or_its_asker_leaves(asked: Node) -> None:
    assert asked.ask("events", wait_s=0.05) == {"events": [], "next": 0}
    gone = Question("events", {"wait_s": 300}, listens=lambda: False)
    answers = node_answers(asked)  # type: ignore[arg-type]
    assert answers["events"](gone) == {"events": [], "next": 0}


def test_a_change_is_waited_for(asked: Node) -> None:
    book = asked.reconciler.status
    assert asked.ask("wait_change", turn=0) == {"turn": 1}
    asked.reconciler.at_turn = lambda: setattr(book, "revision", 2)
    assert asked.ask("wait_change", turn=1, wait_s=20) == {"turn": 2}
    assert asked.ask("wait_change", turn=2, wait_s=0.05) == {"turn": 2}


def test_a_look_wakes_the_loop_and_answers_when_its_turn_has_ended(asked: Node) -> None:
    assert asked.ask("look", wait_s=20) == {"turn": 1}
    assert asked.reconciler.told == [("wake", "")]


def test_a_loop_that_ends_no_turn_is_said_to_be_stuck(asked: Node) -> None:
    asked.reconciler.turns = False
    with pytest.raises(SplitlearnError, match=r"has not ended a look at its directory in 0\.05 s"):
        asked.ask("look", wait_s=0.05)


def test_a_wait_for_a_loop_that_was_stopped_does_not_spin(asked: Node) -> None:
    """Seen to fail when an answer that waits asked a stopped loop, which answers at once, in a circle."""
    asked.reconciler.turns = False
    looks: list[int] = []
    asked.reconciler.at_turn = lambda: looks.append(threading.get_ident())  # type: ignore[assignment]
    asked.ask("events", wait_s=0.3)
    assert len(looks) <= 3
