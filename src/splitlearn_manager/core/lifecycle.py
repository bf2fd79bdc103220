"""The life of one loaded copy of a model (an *instance*), and of what it is a copy.

    LOADING ──► READY ──► UNLOADING ──► GONE
       │          │           ▲
       └► FAILED ◄┘           │
            └─────────────────┘

No other edge exists; `check_edge` refuses them. An instance runs one spec for all its life: a new
spec that touches the loaded model is a new instance.

Pure: this module decides nothing about when an instance is loaded or closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from splitlearn_manager.config.model_config import ModelConfig


class State(StrEnum):
    """States of an instance."""

    LOADING = "LOADING"
    READY = "READY"
    FAILED = "FAILED"
    UNLOADING = "UNLOADING"
    GONE = "GONE"


EDGES: Mapping[State, frozenset[State]] = {
    State.LOADING: frozenset({State.READY, State.FAILED}),
    State.READY: frozenset({State.UNLOADING, State.FAILED}),
    State.FAILED: frozenset({State.UNLOADING}),
    State.UNLOADING: frozenset({State.GONE}),
    State.GONE: frozenset(),
}


class Owner(StrEnum):
    """Who asked for a model: the reconciler touches only what the directory owns."""

    DIRECTORY = "directory"
    API = "api"


class IllegalTransition(AssertionError):
    """A transition that the lifecycle does not have: a bug in the manager, never a user's mistake."""


def check_edge(old: State, new: State) -> None:
    """Raises IllegalTransition unless the lifecycle has an edge from `old` to `new`."""
    if new not in EDGES[old]:
        raise IllegalTransition(f"no edge {old} → {new}")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One accepted version of a model: its config, and the fingerprint of the files behind it.

    `load_hash` and `weights` together say what must be loaded; `spec_hash` covers every key, so two
    specs with equal `version` and different `spec_hash` differ in keys that are applied in place.
    """

    config: ModelConfig
    spec_hash: str
    load_hash: str
    weights: str
    generation: int

    @classmethod
    def of(cls, config: ModelConfig, *, weights: str = "", generation: int = 1) -> ModelSpec:
        return cls(config, config.spec_hash(), config.load_hash(), weights, generation)

    @property
    def model_id(self) -> str:
        return self.config.model_id

    def named_beside(self, old: ModelSpec | None) -> str:
        """It, for people, while another version serves: new weights alone keep the generation."""
        same = old is not None and old.generation == self.generation
        return f"generation {self.generation}" + (" with new weights" if same else "")

    @property
    def version(self) -> tuple[str, str]:
        """What distinguishes two loads: equal versions would load the same model."""
        return (self.load_hash, self.weights)
