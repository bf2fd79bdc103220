"""The shape of a measurement of the machine, as monitoring needs it.

`ResourceUsage` and `ResourceManager` fit these; monitoring does not import them, so that it can be
given measurements from anywhere. Memory in MB (2**20 bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class GpuReading(Protocol):
    """The memory of one GPU; `index` is N of `cuda:N`."""

    @property
    def index(self) -> int: ...
    @property
    def total_mb(self) -> float: ...
    @property
    def used_mb(self) -> float: ...


class UsageReading(Protocol):
    """The use of the machine at one moment; percentages from 0 to 100."""

    @property
    def cpu_percent(self) -> float: ...
    @property
    def memory_mb(self) -> float: ...
    @property
    def memory_percent(self) -> float: ...
    @property
    def process_memory_mb(self) -> float: ...
    @property
    def gpu(self) -> Sequence[GpuReading]: ...


class Resources(Protocol):
    """What measures, and the share of memory above which the machine counts as too full."""

    @property
    def max_memory_percent(self) -> float: ...

    def get_current_usage(self) -> UsageReading: ...
