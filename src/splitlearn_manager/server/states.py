"""What a node tells over HTTP of itself and its models: the status book, and the versions of each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitlearn_manager.reconcile.described import history_dict
from splitlearn_manager.reconcile.reconciler import Reconciler


class NodeStates:
    """Data for JSON, the same as on the control socket. Any thread may ask."""

    def __init__(self, loop: Reconciler) -> None:
        self._loop = loop
        self._book = loop.status

    def node(self) -> Mapping[str, object]:
        return self._book.node()

    def models(self) -> Sequence[Mapping[str, object]]:
        return self._book.models()

    def describe(self, model_id: str) -> Mapping[str, object] | None:
        return self._book.describe(model_id)

    def explain(self, model_id: str) -> Mapping[str, object] | None:
        return self._book.explain(model_id)

    def history(self, model_id: str) -> Mapping[str, object] | None:
        """The versions that were accepted; None for a model that is not known."""
        entries = self._loop.history(model_id)
        known = bool(entries) or model_id in self._book.phases
        return history_dict(model_id, entries) if known else None

    def events(
        self, after: int = 0, model_id: str | None = None
    ) -> tuple[Sequence[Mapping[str, object]], int]:
        return self._book.events(after, model_id)
