"""Where the Hugging Face cache keeps a repository, by the layout of its directories alone.

    $HF_HUB_CACHE/models--org--name/refs/main            text: the commit that the branch had
                                   /snapshots/COMMIT/…   the files of that commit

It reads; downloading is the loader's. huggingface_hub itself is not imported, for that takes longer
than a whole plan.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from splitlearn_manager.config.files import FileSystem

_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_cache_dir() -> Path:
    """The cache's directory: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(os.path.abspath(os.path.expanduser(os.path.expandvars(named))))
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.abspath(os.path.expanduser(os.path.expandvars(home)))) / "hub"


def cached_snapshot(
    repo_id: str, revision: str | None, fs: FileSystem
) -> tuple[Path | None, str | None]:
    """The directory with a repository's files at a revision, and its commit, if cached.

    Args:
        revision: a commit, branch or tag; None: the main branch.

    Returns:
        (None, None) if the revision is not in the cache.
    """
    repository = hub_cache_dir() / ("models--" + repo_id.replace("/", "--"))
    commit = revision or "main"
    if not _COMMIT.fullmatch(commit):
        try:
            commit = fs.read(str(repository / "refs" / commit), 100).decode("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None, None
    if not _COMMIT.fullmatch(commit):
        return None, None
    snapshot = repository / "snapshots" / commit
    try:
        return (snapshot, commit) if fs.stat(str(snapshot)).is_dir else (None, None)
    except OSError:
        return None, None
