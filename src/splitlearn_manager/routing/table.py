"""The READY models at one moment, by model id and by endpoint, as a value that never changes.

Whoever owns the models builds a new table when one becomes READY, leaves, or changes its endpoint,
and swaps it in whole; a request reads whichever table it finds and needs no lock. A table holds its
candidates, so keep it no longer than a request: a model in an old table cannot be freed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar


class Candidate(Protocol):
    """A model that a request may be sent to."""

    @property
    def model_id(self) -> str: ...

    @property
    def weight(self) -> float:
        """Its share of its endpoint's traffic, relative to the others'; finite and at least 0."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests that it has accepted and not answered yet."""
        ...


C = TypeVar("C", bound=Candidate)


@dataclass(frozen=True, slots=True)
class Tried(Generic[C]):
    """A new version of a model that is tried with a share of its requests.

    Attributes:
        percent: the share, in percent.
        shadow: it is asked copies of them, and answers nobody.
    """

    version: C
    percent: float
    shadow: bool


@dataclass(frozen=True, slots=True)
class RoutingTable(Generic[C]):
    """Candidates in the order of their model ids, whatever order they were given in.

    Attributes:
        by_model: each candidate under its model id.
        by_endpoint: the candidates of each endpoint; none is empty.
        all: every candidate.
        trials: versions that are tried beside a candidate, under its model id. They are no candidates.
    """

    by_model: Mapping[str, C]
    by_endpoint: Mapping[str, tuple[C, ...]]
    all: tuple[C, ...]
    trials: Mapping[str, Tried[C]] = field(default_factory=dict)


def build_table(
    entries: Iterable[tuple[C, str]], trials: Iterable[Tried[C]] = ()
) -> RoutingTable[C]:
    """The table of (candidate, endpoint) pairs. Raises ValueError if two share a model id."""
    by_model: dict[str, C] = {}
    by_endpoint: dict[str, list[C]] = {}
    for candidate, endpoint in sorted(entries, key=lambda entry: entry[0].model_id):
        if candidate.model_id in by_model:
            raise ValueError(f"two candidates of a routing table are called {candidate.model_id!r}")
        by_model[candidate.model_id] = candidate
        by_endpoint.setdefault(endpoint, []).append(candidate)
    return RoutingTable(
        MappingProxyType(by_model),
        MappingProxyType({name: tuple(members) for name, members in by_endpoint.items()}),
        tuple(by_model.values()),
        MappingProxyType({tried.version.model_id: tried for tried in trials}),
    )
