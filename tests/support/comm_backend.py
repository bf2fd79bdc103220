"""A backend of several functions, which notes what it is asked and can be made to refuse."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from splitlearn_comm.core import ComputeFunction, TensorCodec, UnknownTarget
from splitlearn_comm.server import Health, Opened, ServiceInfo


@dataclass(frozen=True)
class Open:
    """One call of `open`."""

    model_id: str
    forward_id: str | None
    remaining_s: float | None


class FakeNode:
    """Serves `functions` by id; an empty id takes the next in turn, as a router would.

    Attributes:
        refusal: raised by `open` if set.
        opens, observed: what was asked and told.
        held: targets that are open at the moment.
        on_open: called inside `open`, before the target is yielded.
    """

    version = "9.9"

    def __init__(
        self,
        functions: Mapping[str, ComputeFunction],
        codecs: Mapping[str, TensorCodec] | None = None,
        endpoints: Mapping[str, str] | None = None,
    ) -> None:
        self.functions = dict(functions)
        self.codecs = dict(codecs or {})
        self.endpoints = dict(endpoints or {})
        self.refusal: Exception | None = None
        self.status = Health()
        self.opens: list[Open] = []
        self.observed: list[tuple[str, str]] = []
        self.told = threading.Semaphore(0)
        self.held = 0
        self.on_open = lambda: None
        self._turn = 0

    @contextmanager
    def open(
        self, model_id: str, *, forward_id: str | None = None, remaining_s: float | None = None
    ) -> Iterator[Opened]:
        self.opens.append(Open(model_id, forward_id, remaining_s))
        self.on_open()
        if self.refusal is not None:
            raise self.refusal
        chosen = self.endpoints.get(model_id, model_id) or self._next()
        if chosen not in self.functions:
            raise UnknownTarget(f"no model {chosen!r}")
        self.held += 1
        try:
            codec = self.codecs.get(chosen, TensorCodec())
            yield Opened(chosen, self.functions[chosen], codec)
        finally:
            self.held -= 1

    def health(self) -> Health:
        return self.status

    def service_info(self) -> ServiceInfo:
        return ServiceInfo("node", "cpu", {"models": ",".join(self.functions)})

    def observe(self, model_id: str, status: str, duration_s: float) -> None:
        assert duration_s >= 0
        self.observed.append((model_id, status))
        self.told.release()

    def wait_observed(self) -> tuple[str, str]:
        """Wait until one more request has ended, and return what was told of the newest."""
        assert self.told.acquire(timeout=60), "no request ended"
        return self.observed[-1]

    def _next(self) -> str:
        ids = list(self.functions)
        self._turn += 1
        return ids[(self._turn - 1) % len(ids)]
