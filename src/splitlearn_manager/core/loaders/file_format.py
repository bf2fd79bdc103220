"""Finds out what a weights file is by looking at its content; the file's name decides nothing.

It opens the file, reads its first bytes and, for zip archives, the list of members. It never unpickles
anything. A file that ends too early is told apart from one that is no checkpoint at all: the first may be
a copy still under way, and is worth another try; the second is not.
"""

from __future__ import annotations

import zipfile
from enum import Enum
from pathlib import Path

from splitlearn_manager.errors import InvalidModel, LoadError, WeightsNotFound

CORRUPT_CHECKPOINT = "CorruptCheckpoint"
"""Reason of the LoadError for a file that is cut off or damaged; loading is tried again."""

_ZIP = b"PK\x03\x04"
_ZIP_END = b"PK\x05\x06"
_ZIP_END_SIZE = 22
_HEAD_BYTES = 512
_TAR_MAGIC = slice(257, 262)
_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
"""The number that torch.save pickles first in its old format."""

_LEGACY_BYTES = 40


class FileFormat(Enum):
    """The kinds of file that hold a model, by content."""

    TORCH_ZIP = "torch.save archive"
    TORCH_LEGACY = "torch.save file of the format before 1.6"
    TORCH_TAR = "torch.save file of the format before 0.4"
    TORCHSCRIPT = "TorchScript archive"
    EXPORTED = "torch.export archive"
    SAFETENSORS = "safetensors file"


def corrupt(path: Path, what: str) -> LoadError:
    """The error for a file that is cut off or damaged."""
    return LoadError(
        f"{path.name} {what}; if it is still being copied, it is loaded once it is complete",
        reason=CORRUPT_CHECKPOINT,
    )


def detect(path: Path) -> FileFormat:
    """What the file at `path` is.

    Raises:
        WeightsNotFound: there is no such file, or it cannot be read (reason `WeightsUnreadable`).
        LoadError: it is empty, cut off or damaged (reason `CorruptCheckpoint`).
        InvalidModel: it is something else.
    """
    head = _head(path)
    if not head:
        raise corrupt(path, "is empty")
    if not head.strip(b"\0"):
        raise corrupt(path, "begins with zero bytes, as a file does whose content has not arrived")
    if head.startswith(_ZIP):
        return _zip_format(path)
    if len(head) >= 9 and head[8:9] == b"{":
        return FileFormat.SAFETENSORS
    if _LEGACY_MAGIC in head[:_LEGACY_BYTES]:
        return FileFormat.TORCH_LEGACY
    if head[_TAR_MAGIC] == b"ustar":
        return FileFormat.TORCH_TAR
    if path.suffix == ".safetensors":
        raise corrupt(path, "has no complete safetensors header")
    raise InvalidModel(f"{path.name} is no checkpoint: {_described(head)}")


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except IsADirectoryError:
        if (path / "config.json").exists():
            raise InvalidModel(
                f"{path} is a directory with a config.json, which is read as `model_type: huggingface`; "
                "leave model_type out"
            ) from None
        raise InvalidModel(
            f"{path} is a directory without a config.json; let model_path name the file with the "
            f"weights{_candidates(path)}"
        ) from None
    except FileNotFoundError:
        raise WeightsNotFound(f"nothing is at {path}") from None
    except OSError as error:
        raise WeightsNotFound(
            f"{path} cannot be read: {error.strerror}", reason="WeightsUnreadable"
        ) from error


def _candidates(directory: Path) -> str:
    suffixes = (".pt", ".pth", ".bin", ".safetensors", ".pt2", ".jit", ".ckpt")
    names = sorted(p.name for p in directory.iterdir() if p.suffix in suffixes)
    return f" (it has {', '.join(names[:5])})" if names else ""


def _described(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the real file with `git lfs pull`"
    if head.startswith(b"\x80"):
        return "it is a pickle, but not one that torch.save has written"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file, which PyTorch cannot run"
    return f"it begins with {head[:16]!r}, which is none of the formats that are known"


def _zip_format(path: Path) -> FileFormat:
    names = set(archive_members(path))
    if any(name.endswith("/constants.pkl") for name in names):
        return FileFormat.TORCHSCRIPT
    exported = ("/archive_format", "serialized_exported_program.json")
    if any(name.endswith(exported) for name in names):
        return FileFormat.EXPORTED
    if any(name.endswith("/data.pkl") for name in names):
        return FileFormat.TORCH_ZIP
    raise InvalidModel(
        f"{path.name} is a zip archive, but not one that torch.save, torch.jit.save or "
        "torch.export.save has written"
    )


def archive_members(path: Path) -> list[str]:
    """The names of a zip archive's members.

    The archive must begin at the file's first byte, end with its last, and name no member twice. Then
    there is one way to read it, and what was checked is what torch's own reader will see.

    Raises:
        LoadError: it is cut off or damaged (reason `CorruptCheckpoint`).
        InvalidModel: it could be read in more than one way.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            tail_is_end = _ends_with_directory(path)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise corrupt(path, f"is cut off or damaged ({error})") from error
    names = [member.filename for member in members]
    folded = {name.casefold() for name in names}
    starts_at_zero = not members or min(member.header_offset for member in members) == 0
    if not tail_is_end or not starts_at_zero or len(folded) != len(names):
        raise InvalidModel(
            f"{path.name} is a zip archive with bytes around it or with a member named twice; "
            "save the model again"
        )
    return names


def _ends_with_directory(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-_ZIP_END_SIZE, 2)
        tail = file.read()
    return tail.startswith(_ZIP_END) and tail.endswith(b"\0\0")
