"""`ModelLoader`: from a ModelConfig to a module that takes one tensor and returns one.

It finds out which loader reads the model, has it read, gives the module its one form (`adapters`), converts
and moves it, and measures it. It does not admit, warm up or serve. Loads run side by side in threads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from splitlearn_comm.core.out_of_memory import is_out_of_memory
from splitlearn_manager.config.model_config import ModelConfig
from splitlearn_manager.config.model_source import ModelSource, resolve_source
from splitlearn_manager.errors import InvalidModel, LoadError, SplitlearnError, WeightsNotFound
from splitlearn_manager.runtime.base import LoadedModel, nothing_to_release

if TYPE_CHECKING:
    import torch
    from torch import nn

    from splitlearn_manager.core.loaders.slots import Destination
    from splitlearn_manager.core.loaders.user_code import FactoryCall

__all__ = ["LoadedModel", "ModelLoader", "weights_mb"]

OUT_OF_MEMORY = "OutOfMemory"
"""Reason of the LoadError for a load that the device has no memory for."""

_MB = 2**20


def weights_mb(module: nn.Module) -> float:
    """Size of a module's parameters and buffers in MB (2**20 bytes); shared memory counts once."""
    sizes: dict[tuple[str, int], int] = {}
    tensors = (*module.parameters(), *module.buffers())
    for tensor in (part for whole in tensors for part in _dense_parts(whole)):
        storage = tensor.untyped_storage()
        sizes[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values()) / _MB


def _dense_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensor itself, or what a sparse one consists of: that alone has a storage."""
    import torch

    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


class ModelLoader:
    """Reads models of all kinds. It keeps nothing between two loads."""

    def load(self, config: ModelConfig, device: str) -> LoadedModel:
        """The model on `device`, in eval mode, with weights that can be trained.

        Args:
            device: a concrete one: cpu, cuda:0, mps.

        Raises:
            WeightsNotFound: nothing is at model_path (yet).
            LoadError: the files are cut off or damaged (reason `CorruptCheckpoint`), the hub cannot be
                reached (`HubUnreachable`), there is no memory (`OutOfMemory`), or the user's code raised.
            InvalidModel: the files hold no model that can be read.
            UntrustedCheckpoint: loading would run code from the files, and `trusted` is not set.
        """
        import torch

        from splitlearn_manager.core.loaders.torch_setup import TORCH_SETUP

        TORCH_SETUP.ensure()
        try:
            # Weights made under inference_mode could never be trained; a caller may be in it.
            with torch.inference_mode(False), torch.enable_grad():
                return _load(config, device)
        except Exception as error:
            if _ran_out_of_memory(error):
                raise LoadError(
                    f"there is not enough memory on {device} to load {config.model_path}: "
                    f"{_first_line(error)}",
                    reason=OUT_OF_MEMORY,
                ) from error
            if isinstance(error, SplitlearnError):
                raise
            raise LoadError(
                f"loading {config.model_path} failed: {type(error).__name__}: {_first_line(error)}"
            ) from error


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether that is behind it, whatever the code in between made of it: a damaged file, say."""
    while error is not None:
        if is_out_of_memory(error):
            return True
        error = error.__cause__
    return False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _load(config: ModelConfig, device: str) -> LoadedModel:
    from splitlearn_manager.core.loaders.custom import factory_call

    source = resolve_source(config)
    call = factory_call(source, config, device)
    destination = _destination(config, device)
    match source.loader:
        case "huggingface":
            from splitlearn_manager.core.loaders.huggingface import load_huggingface

            module, notes = load_huggingface(_directory(source), config, destination)
            return _finished(module, device, source.loader, notes)
        case "pytorch":
            return _load_pytorch(source, call, config, destination)
        case "custom":
            return _load_custom(call, config, device)


def _destination(config: ModelConfig, device: str) -> Destination:
    import torch

    from splitlearn_manager.core.loaders.sharing import RESIDENT, Borrower
    from splitlearn_manager.core.loaders.slots import Destination

    dtype = getattr(torch, config.weights_dtype) if config.weights_dtype else None
    return Destination(device, dtype, Borrower(RESIDENT) if device == "cpu" else None)


def _load_pytorch(
    source: ModelSource, call: FactoryCall | None, config: ModelConfig, destination: Destination
) -> LoadedModel:
    from splitlearn_manager.core.loaders.pytorch import PytorchFile, load_pytorch

    if source.path is None:
        raise InvalidModel(
            f"{config.model_path} names no file; for a repository of the hub leave out model_type"
        )
    built = load_pytorch(PytorchFile(source.path, config.trusted, call, destination))
    if destination.borrower is not None:
        destination.borrower.settle(built.module)
    return _adapted(built.module, config, destination.device, source.loader, built.release)


def _load_custom(call: FactoryCall | None, config: ModelConfig, device: str) -> LoadedModel:
    from splitlearn_manager.core.loaders.user_code import build

    if call is None:
        raise InvalidModel(f"{config.model_path} names no package.module:function")
    built = build(call)
    return _adapted(built.module, config, device, "custom", built.release)


def _directory(source: ModelSource) -> Path:
    """The directory of a Hugging Face model; a repository of the hub is fetched if it must be."""
    if source.kind == "hub" and source.repo_id is not None:
        from splitlearn_manager.core.loaders.hub import fetch

        return fetch(source.repo_id, source.revision, source.path)
    if source.path is None or not source.path.exists():
        raise WeightsNotFound(f"nothing is at {source.path or source.written}")
    if not source.path.is_dir():
        raise InvalidModel(
            f"{source.path} is a file, and `model_type: huggingface` reads a directory with a config.json; "
            "leave model_type out, or let model_path name the directory"
        )
    return source.path


def _adapted(
    module: nn.Module,
    config: ModelConfig,
    device: str,
    loader: str,
    release: Callable[[], None],
) -> LoadedModel:
    """Give a module of any kind its one form."""
    import torch

    from splitlearn_manager.core.loaders.adapters import CallOptions, adapt

    options = config.config
    call = CallOptions(options.output, options.max_sequence_length, options.forward_kwargs)
    try:
        if config.weights_dtype is not None:
            module = module.to(getattr(torch, config.weights_dtype))
        return _finished(adapt(module, call), device, loader, (), release)
    except BaseException:
        release()
        raise


def _finished(
    module: nn.Module,
    device: str,
    loader: str,
    notes: tuple[str, ...],
    release: Callable[[], None] = nothing_to_release,
) -> LoadedModel:
    """Move the module, make its weights trainable and known to others, and measure it."""
    from splitlearn_manager.core.loaders.sharing import RESIDENT

    module = module.to(device).eval()
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.is_leaf:
            parameter.requires_grad_()
    RESIDENT.add(module)
    return LoadedModel(module, weights_mb(module), loader, notes, release)
