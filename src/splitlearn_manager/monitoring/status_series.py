"""Where each model stands, as series: phase, sync, health, generations, conditions, the next retry.

They are made at each scrape from what a source tells at that moment. So nothing is updated between
scrapes, nothing is kept for a model, and the series of a model that is gone are gone with it. With ten
thousand models a scrape has some 70,000 of these series; `text` therefore writes them directly, about
ten times as fast as the client library does, which `collect` serves for other users of the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.samples import Sample


@dataclass(frozen=True, slots=True)
class VersionReading:
    """The requests of one version of a model, and those of them that failed.

    Attributes:
        role: `serves`, or `tried` beside what serves. The generation alone does not tell them apart: new
            weights behind an unchanged spec have the generation of the old ones.
    """

    generation: int
    role: str
    requests: int
    errors: int


@dataclass(frozen=True, slots=True)
class ModelReading:
    """Where one model stands at one moment.

    Attributes:
        generation, observed_generation: accepted, and serving; None if none is.
        conditions: type and status of each.
        next_retry_at: unix time of the next try of a failed load; None if no time is set.
        estimated_mb: what its weights were thought to take before they were loaded; None if nothing told.
        versions: of each that serves or is tried.
        weights_mb, activations_mb: what its latest load measured; None if none did.
    """

    model_id: str
    phase: str
    sync: str
    health: str
    generation: int | None = None
    observed_generation: int | None = None
    conditions: Sequence[tuple[str, str]] = ()
    next_retry_at: float | None = None
    estimated_mb: float | None = None
    weights_mb: float | None = None
    activations_mb: float | None = None
    versions: Sequence[VersionReading] = ()


Series = tuple[tuple[str, ...], float]
"""Values of the labels, and the value."""


@dataclass(frozen=True, slots=True)
class _Family:
    """One metric: its series are those that `of` gives for each model."""

    name: str
    text: str
    labels: tuple[str, ...]
    of: Callable[[ModelReading], Iterable[Series]]


def _generation(reading: ModelReading) -> Iterator[Series]:
    if reading.generation is not None:
        yield (reading.model_id,), reading.generation


def _observed_generation(reading: ModelReading) -> Iterator[Series]:
    if reading.observed_generation is not None:
        yield (reading.model_id,), reading.observed_generation


def _conditions(reading: ModelReading) -> Iterator[Series]:
    for kind, status in reading.conditions:
        yield (reading.model_id, kind, status), 1


def _next_retry(reading: ModelReading) -> Iterator[Series]:
    if reading.next_retry_at is not None:
        yield (reading.model_id,), reading.next_retry_at


def _estimated(reading: ModelReading) -> Iterator[Series]:
    if reading.estimated_mb is not None:
        yield (reading.model_id,), reading.estimated_mb


def _measured(reading: ModelReading) -> Iterator[Series]:
    if reading.weights_mb is not None:
        yield (reading.model_id, "weights"), reading.weights_mb
    if reading.activations_mb is not None:
        yield (reading.model_id, "activations"), reading.activations_mb


def _requests(reading: ModelReading) -> Iterator[Series]:
    for version in reading.versions:
        yield (reading.model_id, str(version.generation), version.role), version.requests


def _errors(reading: ModelReading) -> Iterator[Series]:
    for version in reading.versions:
        yield (reading.model_id, str(version.generation), version.role), version.errors


_FAMILIES = (
    _Family(
        "splitlearn_model_phase",
        "1 for the phase that a model is in.",
        ("model_id", "phase"),
        lambda reading: [((reading.model_id, reading.phase), 1)],
    ),
    _Family(
        "splitlearn_model_sync",
        "1 for whether what runs is what is declared.",
        ("model_id", "sync"),
        lambda reading: [((reading.model_id, reading.sync), 1)],
    ),
    _Family(
        "splitlearn_model_health",
        "1 for the health of a model.",
        ("model_id", "health"),
        lambda reading: [((reading.model_id, reading.health), 1)],
    ),
    _Family("splitlearn_model_generation", "Generation accepted last.", ("model_id",), _generation),
    _Family(
        "splitlearn_model_observed_generation",
        "Generation that serves.",
        ("model_id",),
        _observed_generation,
    ),
    _Family(
        "splitlearn_model_condition",
        "1 for the status that a condition has.",
        ("model_id", "type", "status"),
        _conditions,
    ),
    _Family(
        "splitlearn_model_next_retry_timestamp_seconds",
        "Unix time of the next try of a failed load.",
        ("model_id",),
        _next_retry,
    ),
    _Family(
        "splitlearn_model_estimated_mb",
        "Memory that the weights were thought to take before they were loaded, in MB.",
        ("model_id",),
        _estimated,
    ),
    _Family(
        "splitlearn_model_measured_mb",
        "Memory that the latest load measured, in MB: weights, and activations of the largest batch.",
        ("model_id", "part"),
        _measured,
    ),
    _Family(
        "splitlearn_version_requests",
        "Requests that a version has ended since it was loaded, of those that serve or are tried.",
        ("model_id", "generation", "role"),
        _requests,
    ),
    _Family(
        "splitlearn_version_errors",
        "Those of them that failed.",
        ("model_id", "generation", "role"),
        _errors,
    ),
)


class _Lazy(GaugeMetricFamily):
    """A metric whose samples are made when somebody looks at them."""

    def __init__(self, family: _Family, readings: Callable[[], Sequence[ModelReading]]) -> None:
        self._family = family
        self._readings = readings
        super().__init__(family.name, family.text, labels=family.labels)

    @property
    def samples(self) -> list[Sample]:
        family = self._family
        return [
            Sample(family.name, dict(zip(family.labels, values, strict=True)), value)
            for reading in self._readings()
            for values, value in family.of(reading)
        ]

    @samples.setter
    def samples(self, value: list[Sample]) -> None:
        """The base class begins with none."""


class StatusSeries:
    """A collector for a registry. `source` is asked once at each scrape."""

    def __init__(self, source: Callable[[], Iterable[ModelReading]]) -> None:
        self._source = source

    def describe(self) -> Iterable[Metric]:
        return [_Lazy(family, list) for family in _FAMILIES]

    def collect(self) -> Iterable[Metric]:
        taken: list[ModelReading] | None = None

        def readings() -> Sequence[ModelReading]:
            nonlocal taken
            if taken is None:
                taken = list(self._source())
            return taken

        return [_Lazy(family, readings) for family in _FAMILIES]

    @staticmethod
    def wrote(metric: Metric) -> bool:
        """Whether `text` has what this metric would give."""
        return isinstance(metric, _Lazy)

    def text(self) -> str:
        """All series in Prometheus' text format."""
        readings = list(self._source())
        lines: list[str] = []
        for family in _FAMILIES:
            lines.append(f"# HELP {family.name} {family.text}\n# TYPE {family.name} gauge\n")
            shape = ",".join(f'{label}="%s"' for label in family.labels)
            line = f"{family.name}{{{shape}}} "
            for reading in readings:
                for values, value in family.of(reading):
                    lines.append(f"{line % tuple(map(_escaped, values))}{value}\n")
        return "".join(lines)


def _escaped(value: str) -> str:
    if value.isascii() and value.isprintable() and '"' not in value and "\\" not in value:
        return value
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
