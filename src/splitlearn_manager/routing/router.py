"""From the name in a request to the READY model that answers it.

    ""              any READY model, by the strategy
    an endpoint     the models that share it, by the strategy
    a model id      that model
    anything else   ModelNotFound

A name with one candidate costs two look-ups: no strategy is asked and no lock is taken. Each
endpoint has a strategy object of its own, so that traffic on one never disturbs the turns of
another. The router keeps no table and no model: only names, and no more of them than one table has.

It knows READY models only. Whether a name it does not find is a model that is loading, parked or
failed is for the caller to say, who knows them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from splitlearn_manager.errors import ModelNotFound, ModelUnavailable
from splitlearn_manager.routing.strategies import (
    RoutingStrategy,
    load_strategy,
    strategy_factory,
)
from splitlearn_manager.routing.table import C, RoutingTable

_NAMES_IN_MESSAGE = 10


@dataclass(frozen=True, slots=True)
class _Routing:
    """A strategy by name, and its objects: one an endpoint, and one under "" for all models."""

    name: str
    make: Callable[[], RoutingStrategy]
    of_endpoint: dict[str, RoutingStrategy] = field(default_factory=dict)


class ModelRouter:
    """Routes requests by name. Safe to use from any thread.

    Args:
        strategy: round_robin, least_loaded, random or `package.module:Class`.

    Raises:
        ConfigError: there is no such strategy; the message names the key `routing`.
    """

    def __init__(self, strategy: str = "round_robin") -> None:
        self._lock = threading.Lock()
        self._routing = _resolved(strategy)

    @property
    def strategy(self) -> str:
        """The name of the strategy in use."""
        return self._routing.name

    def set_strategy(self, name: str) -> None:
        """Uses another strategy from the next request on. Setting the same one changes nothing.

        Raises ConfigError, with the old strategy still in use, if there is no such strategy.
        """
        if name != self._routing.name:
            self._routing = _resolved(name)

    def route(self, name: str, table: RoutingTable[C]) -> C:
        """The model that a request for `name` goes to. See the module's text.

        Raises:
            ModelNotFound: no READY model or endpoint is called that.
            ModelUnavailable: `name` is "" and no model is READY.
        """
        candidates = table.by_endpoint.get(name) if name else table.all
        if candidates is None:
            model = table.by_model.get(name)
            if model is None:
                raise ModelNotFound(_not_found(name, table))
            return model
        if len(candidates) == 1:
            return candidates[0]
        if not candidates:
            raise ModelUnavailable("no model is READY; try again once one has been loaded")
        routing = self._routing
        strategy = routing.of_endpoint.get(name)
        if strategy is None:
            strategy = self._add_endpoint(routing, name, table)
        chosen = strategy.choose(candidates)
        if not any(chosen is candidate for candidate in candidates):
            raise TypeError(
                f"routing: {routing.name} chose {chosen!r}, which is none of its candidates"
            )
        return chosen

    def _add_endpoint(
        self, routing: _Routing, name: str, table: RoutingTable[C]
    ) -> RoutingStrategy:
        """The endpoint's strategy, new. Endpoints that the table lacks are forgotten with it."""
        strategy = routing.make()
        with self._lock:
            for endpoint in [e for e in routing.of_endpoint if e and e not in table.by_endpoint]:
                del routing.of_endpoint[endpoint]
            # Another thread may have been quicker: then its strategy counts.
            return routing.of_endpoint.setdefault(name, strategy)


def _resolved(name: str) -> _Routing:
    # One is made at once, so that a class that cannot be made is refused here, not in a request.
    load_strategy(name)
    return _Routing(name, strategy_factory(name))


def _not_found(name: str, table: RoutingTable[C]) -> str:
    names = sorted(table.by_model.keys() | table.by_endpoint.keys())
    if not names:
        return f"no model or endpoint is called {name!r}, and none is READY"
    shown = ", ".join(names[:_NAMES_IN_MESSAGE])
    more = len(names) - _NAMES_IN_MESSAGE
    return f"no READY model or endpoint is called {name!r}; READY: {shown}" + (
        f" and {more} more" if more > 0 else ""
    )
