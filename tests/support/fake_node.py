"""A node that only answers, where the command line looks for it, with what a test wants to be said."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from splitlearn_manager.server.control import Answer, ControlSocket, Question
from splitlearn_manager.server.state_dir import socket_of, state_dir_for

NOW = 1_700_000_000.0


def model(model_id: str, /, **keys: object) -> dict[str, object]:
    """A model that is well, as `reconcile.described` tells of it, with other values where given."""
    return {
        "model_id": model_id,
        "owner": "directory",
        "phase": "Ready",
        "phase_since": NOW - 7200,
        "sync": "Synced",
        "health": "Healthy",
        "reason": "",
        "message": "",
        "next_retry_s": None,
        "next_retry_at": None,
        "failed_for_good": False,
        "attempts": 0,
        "generation": 1,
        "observed_generation": 1,
        "source": f"{model_id}.yaml",
        "line": 1,
        "held": "",
        "suspended": False,
        "endpoint": model_id,
        "priority": 0,
        "pinned": False,
        "device": "cpu",
        "memory_mb": 87.0,
        "reserved_mb": 91.0,
        "in_flight": 0,
        "requests": 12,
        "errors": 0,
        "conditions": [],
        "events": [],
        **keys,
    }


def condition(kind: str, status: str, reason: str, message: str) -> dict[str, object]:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "since": NOW - 60,
    }


def node(directory: Path | str = "/srv/models", /, **keys: object) -> dict[str, object]:
    """A node with nothing to say, with other values where given."""
    return {
        "directory": str(directory),
        "state_dir": "/var/lib/splitlearn",
        "process_id": os.getpid(),
        "version": "0.1.0",
        "started_at": NOW - 3 * 86_400,
        "grpc": "127.0.0.1:50051",
        "http": "127.0.0.1:8000",
        "watch_mode": "inotify",
        "watch_reason": "",
        "source_available": True,
        "source_message": "",
        "pending": False,
        "settled": True,
        "converged": True,
        "problems": [],
        "conflicts": {},
        "prune_guard": None,
        "suspended": [],
        "restart_required": [],
        "devices": [{"device": "cpu", "reserved_mb": 87.0, "budget_mb": 18_432.0}],
        "max_models": 5,
        "models": {"Pending": 0, "Ready": 1},
        "conditions": [],
        **keys,
    }


class FakeNode:
    """Answers as the node of a directory while the `with` lasts.

    Attributes:
        models, about: what `status` tells; may be replaced at any time.
        asked: every question so far.
        answers: by question; a test may put in others.
    """

    def __init__(self, directory: Path, *models: dict[str, object], **about: object) -> None:
        self.directory = directory
        self.models = list(models)
        self.about = node(os.path.abspath(directory), **about)
        self.asked: list[Question] = []
        self.socket = socket_of(state_dir_for(directory))
        self.answers: dict[str, Answer] = {
            "status": self._status,
            "names": lambda question: {"model_ids": [m["model_id"] for m in self.models]},
            "look": lambda question: {"turn": 1},
            "wait_change": lambda question: {"turn": 2},
        }

    def __enter__(self) -> FakeNode:
        self.socket.parent.mkdir(parents=True, exist_ok=True)
        self._control = ControlSocket(self.socket, _Noted(self.answers, self.asked))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._control.close()

    def questions(self, name: str) -> list[Mapping[str, object]]:
        """The arguments of each question of that name."""
        return [question.arguments for question in self.asked if question.name == name]

    def _status(self, question: Question) -> Mapping[str, object]:
        wanted = question.texts("models")
        models = [m for m in self.models if wanted is None or m["model_id"] in wanted]
        return {"turn": 1, "loop_alive": True, "node": self.about, "models": models}


class _Noted(dict[str, Answer]):
    """Answers that note what was asked."""

    def __init__(self, answers: Mapping[str, Answer], asked: list[Question]) -> None:
        super().__init__()
        self._answers = answers
        self._asked = asked

    def __contains__(self, name: object) -> bool:
        return name in self._answers

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._answers)

    def __getitem__(self, name: str) -> Answer:
        answer: Callable[[Question], Mapping[str, object] | bytes] = self._answers[name]

        def noted(question: Question) -> Mapping[str, object] | bytes:
            self._asked.append(question)
            return answer(question)

        return noted
