"""Fetches repositories of the Hugging Face hub into its usual cache.

The cache comes first: a revision that is there in full is used without a word to the network, whether it is a
commit or the name of a branch or tag that was resolved before. What is missing is downloaded from HF_ENDPOINT
(https://huggingface.co unless set): weights in safetensors only, unless the repository has none.
"""

from __future__ import annotations

import os
from pathlib import Path

from splitlearn_manager.config.hub_cache import hub_cache_dir
from splitlearn_manager.core.loaders.hf_directory import SAFETENSORS, TORCH_BIN, read_json
from splitlearn_manager.errors import InvalidModel, LoadError, WeightsNotFound

HUB_UNREACHABLE = "HubUnreachable"
"""Reason of the LoadError for a repository that is neither cached nor to be had; tried again."""

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.py"]
_WEIGHTS = ["*.safetensors"]
_OLD_WEIGHTS = ["pytorch_model*.bin"]


def is_complete(snapshot: Path) -> bool:
    """Whether a cached snapshot has its config and all the weights that it names."""
    if not (snapshot / "config.json").is_file():
        return False
    for name in (SAFETENSORS, TORCH_BIN):
        if (snapshot / name).is_file():
            return True
        index = snapshot / f"{name}.index.json"
        if index.is_file():
            parts = read_json(index).get("weight_map")
            return isinstance(parts, dict) and all(
                (snapshot / str(part)).is_file() for part in parts.values()
            )
    return False


def fetch(repo_id: str, revision: str | None, cached: Path | None) -> Path:
    """The snapshot's directory, downloaded unless `cached` is complete.

    Raises:
        WeightsNotFound: the repository has no weights of a kind that can be read.
        LoadError: it is not cached and the hub cannot be reached (reason `HubUnreachable`).
        InvalidModel: the hub has no such repository or revision, or keeps it from us.
    """
    if cached is not None and is_complete(cached):
        return cached
    path = _download(repo_id, revision, _SMALL_FILES + _WEIGHTS)
    if not is_complete(path):
        path = _download(repo_id, revision, _SMALL_FILES + _OLD_WEIGHTS)
    if not is_complete(path):
        # Without a connection huggingface_hub gives what part of a snapshot there is.
        raise WeightsNotFound(
            f"{path} is not complete after the download of {repo_id}@{revision or 'main'}: it needs a "
            f"config.json and a {SAFETENSORS} or {TORCH_BIN}, with all parts that an index names"
        )
    return path


def _download(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = f"{repo_id}@{revision or 'main'}"
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=patterns,
                endpoint=endpoint,
                cache_dir=hub_cache_dir(),
                tqdm_class=_silent_bar(),
            )
        )
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise InvalidModel(
            f"the hub at {endpoint} has no repository {repo_id}, or shows it to others only "
            "(set HF_TOKEN to a token that may read it)"
        ) from error
    except RevisionNotFoundError as error:
        raise InvalidModel(f"the hub at {endpoint} has no {wanted}") from error
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise LoadError(
            f"{wanted} is not complete in the cache ({hub_cache_dir()}), and could not be fetched "
            f"from {endpoint}: {type(error).__name__}: {lines[0] if lines else ''}",
            reason=HUB_UNREACHABLE,
        ) from error


def _silent_bar() -> type:
    from huggingface_hub.utils.tqdm import tqdm

    class SilentBar(tqdm):
        """A progress bar that draws nothing."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return SilentBar
