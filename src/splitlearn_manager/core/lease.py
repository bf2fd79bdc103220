"""A request's hold on an instance."""

from __future__ import annotations

from collections.abc import Callable

from splitlearn_manager.core.managed_model import ManagedModel


class Lease:
    """A request's hold on an instance. Give it back with `release`, or use it in a `with`.

    Attributes:
        ok: whether the request was answered.
        counts: False if the instance was asked nothing in the end: then it is no request of its.
        plain: False for what a version that is tried is never asked: training, and requests with a cache.
    """

    __slots__ = ("_closed", "_give_back", "counts", "instance", "ok", "plain", "started_s")

    def __init__(
        self, instance: ManagedModel, started_s: float, give_back: Callable[[Lease], None]
    ) -> None:
        self._give_back = give_back
        self._closed = False
        self.instance = instance
        self.started_s = started_s
        self.ok = True
        self.counts = True
        self.plain = True

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.ok = False
        self.release()

    @property
    def released(self) -> bool:
        """Whether it has been given back."""
        return self._closed

    def release(self) -> None:
        """Gives the instance back. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._give_back(self)
