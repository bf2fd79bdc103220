"""Loads TorchScript archives, after reading their source for anything that reaches outside the model.

TorchScript is a language of its own without Python's reach: it has no imports, no sockets, no processes. A
few of its operators do touch files, though, and some of its code runs during the load. So before an untrusted
archive is loaded, the text of all its code is searched for those operators, for operators outside torch's
arithmetic, and for classes implemented in C++. A harmless model in which such a word occurs needs
`trusted: true`; models that torch.jit.trace and torch.jit.script write normally have none of them.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch
from torch import nn

from splitlearn_manager.core.loaders.file_format import archive_members, corrupt
from splitlearn_manager.errors import InvalidModel, UntrustedCheckpoint

_REACHES_OUT = re.compile(r"\b(from_file|save|load_tensor)\b")
"""Operators that read or write files, in whatever way they are called."""

_OPERATOR = re.compile(r"\bops\s*\.\s*(\w+)")
_NAMESPACES = frozenset({"aten", "prim", "prims", "quantized", "torchvision"})
_CLASS = re.compile(r"torch\.classes\.(\w+)")
_CLASSES = frozenset({"quantized"})
_INDIRECT = re.compile(r"\bgetattr\b")
_PLAIN_GETATTR = re.compile(r"\bgetattr\([^()\"'\\]*,\s*\"[\w.]*\"\)")


def load_torchscript(path: Path, *, trusted: bool) -> nn.Module:
    """The module of a TorchScript archive, on the CPU.

    Raises:
        UntrustedCheckpoint: its code reaches outside the model and `trusted` is not set.
        InvalidModel: torch cannot load it.
        LoadError: the archive is cut off or damaged (reason `CorruptCheckpoint`).
    """
    if not trusted and (found := suspicious_code(path)):
        raise UntrustedCheckpoint(
            f"{path.name} is TorchScript whose code uses {', '.join(found)}, which can reach files or "
            "code outside the model; if you trust its author, write `trusted: true` for this model"
        )
    try:
        module: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidModel(
            f"{path.name}: torch cannot load this TorchScript: {first_line}"
        ) from error
    return module


def suspicious_code(path: Path) -> tuple[str, ...]:
    """What an archive's code uses that an untrusted model may not; empty for an ordinary model."""
    found: set[str] = set()
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive_members(path):
                if _is_tensor_data(name):
                    continue
                text = archive.read(name).decode("latin-1")
                found |= {f"torch.classes.{c}" for c in _CLASS.findall(text) if c not in _CLASSES}
                if name.endswith(".py"):
                    found |= _suspicious_words(text)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise corrupt(path, f"is cut off or damaged ({error})") from error
    return tuple(sorted(found))


def _is_tensor_data(name: str) -> bool:
    # `ROOT/data/7` and `ROOT/constants/7` hold numbers; everything else is read as text.
    parts = name.split("/")
    return len(parts) == 3 and parts[1] in ("data", "constants") and parts[2].isdigit()


def _suspicious_words(text: str) -> set[str]:
    found = set(_REACHES_OUT.findall(text))
    found |= {f"ops.{n}" for n in _OPERATOR.findall(text) if n not in _NAMESPACES}
    # A name put together of escapes would be found by none of the searches above.
    if len(_INDIRECT.findall(text)) > len(_PLAIN_GETATTR.findall(text)):
        found.add("getattr with a name that is not written out")
    return found
