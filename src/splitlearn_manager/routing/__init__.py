"""Which READY model a request goes to.

`table` says who may be chosen, `strategies` how one of several is, and `router` puts a request's
name, the table and a strategy together. Nothing here loads, leases or waits for a model.
"""

from splitlearn_manager.routing.router import ModelRouter
from splitlearn_manager.routing.strategies import (
    LeastLoaded,
    Random,
    RoundRobin,
    RoutingStrategy,
    load_strategy,
)
from splitlearn_manager.routing.table import Candidate, RoutingTable, build_table

__all__ = [
    "Candidate",
    "LeastLoaded",
    "ModelRouter",
    "Random",
    "RoundRobin",
    "RoutingStrategy",
    "RoutingTable",
    "build_table",
    "load_strategy",
]
