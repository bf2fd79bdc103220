"""How one of several models is chosen for a request: in turn, by load, by chance, or by your class.

A strategy sees the candidates and names one of them; it never takes a lease and never waits.
The router makes one strategy object for each endpoint, so its state is that endpoint's alone.
A candidate of weight 0 gets no traffic, unless all have weight 0: then all count alike.

Your own strategy is a class with the one method of `RoutingStrategy` that can be made without
arguments; the server file names it as `routing: package.module:Class`. It is called by many threads
at a time. Its `choose` runs for every request that has a choice, so keep it fast.
"""

from __future__ import annotations

import difflib
import importlib
import random
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, cast, runtime_checkable

from splitlearn_manager.errors import ConfigError
from splitlearn_manager.routing.table import C

# Weights become integers of this resolution, so that credits add up exactly and never drift.
_UNITS_PER_WEIGHT = 2**32


@runtime_checkable
class RoutingStrategy(Protocol):
    """Chooses among candidates."""

    def choose(self, candidates: Sequence[C]) -> C:
        """One of `candidates`: READY models, two or more, ordered by model id.

        Called without a lock, by several threads at a time. An exception fails the request.
        """
        ...


def open_candidates(candidates: Sequence[C]) -> tuple[Sequence[C], list[float]]:
    """The candidates that may get traffic, with their weights; none of these is 0."""
    weights = [candidate.weight for candidate in candidates]
    if min(weights) > 0:
        return candidates, weights
    chosen = [(c, w) for c, w in zip(candidates, weights, strict=True) if w > 0]
    if not chosen:
        return candidates, [1.0] * len(candidates)
    return [c for c, _ in chosen], [w for _, w in chosen]


class RoundRobin:
    """In turn, each as often as its weight says, and as evenly spread as can be.

    Every candidate earns credit of its weight at each choice; the one with the most credit is
    chosen and pays what all have earned together. With equal weights that is a strict rotation.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shares: dict[str, int] = {}
        self._credits: dict[str, int] = {}

    def choose(self, candidates: Sequence[C]) -> C:
        open_, weights = open_candidates(candidates)
        shares = {
            c.model_id: max(1, round(w * _UNITS_PER_WEIGHT))
            for c, w in zip(open_, weights, strict=True)
        }
        with self._lock:
            if shares != self._shares:
                self._adopt(shares)
            credits_ = self._credits
            best, most = open_[0], None
            for candidate in open_:
                credit = credits_[candidate.model_id] + shares[candidate.model_id]
                credits_[candidate.model_id] = credit
                if most is None or credit > most:
                    best, most = candidate, credit
            credits_[best.model_id] -= sum(shares.values())
        return best

    def _adopt(self, shares: dict[str, int]) -> None:
        """Goes on with these candidates: forgets those that are gone, and debts of old weights."""
        total = sum(shares.values())
        self._credits = {
            model_id: max(-total, min(total, self._credits.get(model_id, 0))) for model_id in shares
        }
        self._shares = shares


class LeastLoaded:
    """The one with the fewest requests in flight for its weight; equals take turns by weight."""

    def __init__(self) -> None:
        self._turns = RoundRobin()

    def choose(self, candidates: Sequence[C]) -> C:
        open_, weights = open_candidates(candidates)
        # Read once: the counts change while we look.
        loads = [c.in_flight / w for c, w in zip(open_, weights, strict=True)]
        least = min(loads)
        idlest = [c for c, load in zip(open_, loads, strict=True) if load == least]
        return idlest[0] if len(idlest) == 1 else self._turns.choose(idlest)


class Random:
    """By chance, in proportion to the weights."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()

    def choose(self, candidates: Sequence[C]) -> C:
        open_, weights = open_candidates(candidates)
        return self._rng.choices(open_, weights)[0]


def strategy_factory(name: str) -> Callable[[], RoutingStrategy]:
    """What makes strategies of this name: round_robin, least_loaded, random or `pkg.mod:Class`.

    Raises ConfigError, naming the key `routing`, if there is none.
    """
    built_in: dict[str, Callable[[], RoutingStrategy]] = {
        "round_robin": RoundRobin,
        "least_loaded": LeastLoaded,
        "random": Random,
    }
    if ":" in name:
        return _imported(name)
    if name not in built_in:
        near = difflib.get_close_matches(name, built_in, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            "routing: expected round_robin, least_loaded, random or package.module:Class, "
            f"got {name!r}{hint}"
        )
    return built_in[name]


def load_strategy(name: str) -> RoutingStrategy:
    """A new strategy of this name. Raises ConfigError, naming the key `routing`."""
    make = strategy_factory(name)
    try:
        strategy: object = make()
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"routing: {name} could not be made without arguments: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(strategy, RoutingStrategy):
        raise ConfigError(
            f"routing: {name} has no method choose(candidates), which a routing strategy needs"
        )
    return strategy


def _imported(name: str) -> Callable[[], RoutingStrategy]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"routing: expected package.module:Class, got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's: it may raise anything
        raise ConfigError(
            f"routing: {module_name!r} of {name!r} could not be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    found: object = getattr(module, attribute, None)
    if found is None:
        raise ConfigError(f"routing: {module_name} has no class called {attribute!r}")
    if not callable(found):
        raise ConfigError(f"routing: expected a class at {name}, found a {type(found).__name__}")
    return cast("Callable[[], RoutingStrategy]", found)
