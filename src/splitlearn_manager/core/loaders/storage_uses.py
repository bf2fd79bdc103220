"""What the storages of a module that was saved whole are used for, told from its records.

A storage of weights alone (parameters and buffers) may be read as what the model is to have them as, where it
is to have them. One that something else refers to, an attribute that is a tensor say, stays as it is stored:
moving or converting a module leaves such tensors alone too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from splitlearn_manager.core.loaders.module_records import (
    ModuleRecord,
    ParameterRecord,
    TensorRecord,
)
from splitlearn_manager.core.loaders.own_memory import contiguous_stride


@dataclass
class _Use:
    dtypes: set[object] = field(default_factory=set)
    parameters: list[TensorRecord] = field(default_factory=list)
    buffers: int = 0
    others: int = 0


class StorageUses:
    """The uses of all storages below a module, by their keys."""

    def __init__(self, module: ModuleRecord) -> None:
        self._uses: dict[str, _Use] = {}
        self._seen: set[int] = set()
        self._look(module, "")

    def of_one_form(self, key: str) -> bool:
        """Whether all tensors take the storage for elements of the same dtype."""
        return len(self._uses[key].dtypes) == 1

    def weights_alone(self, key: str) -> bool:
        """Whether only parameters and buffers are in it, all of one dtype."""
        return self.of_one_form(key) and not self._uses[key].others

    def parameter_alone(self, key: str) -> tuple[int, ...] | None:
        """The shape of the one parameter that is the whole storage; None if there is more to it."""
        use = self._uses[key]
        if use.buffers or use.others or len(use.parameters) != 1:
            return None
        record = use.parameters[0]
        whole = record.offset == 0 and record.stride == contiguous_stride(record.size)
        count = 1
        for size in record.size:
            count *= size
        return tuple(record.size) if whole and count == record.storage.numel else None

    def _look(self, value: object, place: str) -> None:
        if isinstance(value, TensorRecord | ParameterRecord | ModuleRecord | list | dict | tuple):
            if id(value) in self._seen and not isinstance(value, TensorRecord):
                return
            self._seen.add(id(value))
        match value:
            case ParameterRecord():
                self._note(value.data, place)
            case TensorRecord():
                self._note(value, "other" if place == "_parameters" else place)
            case ModuleRecord():
                for key, inner in value.state.items():
                    self._look(inner, key if key in ("_parameters", "_buffers") else "")
            case Mapping():
                for inner in value.values():
                    self._look(inner, place)
            case list() | tuple():
                for inner in value:
                    self._look(inner, "")

    def _note(self, record: TensorRecord, place: str) -> None:
        use = self._uses.setdefault(record.storage.key, _Use())
        use.dtypes.add(record.storage.dtype)
        if place == "_parameters":
            use.parameters.append(record)
        elif place == "_buffers":
            use.buffers += 1
        else:
            use.others += 1
