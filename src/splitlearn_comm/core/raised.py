"""What somebody's code has raised, as one line for a person: the type, and what was wrong."""

from __future__ import annotations

_TORCHSCRIPT = "The following operation failed in the TorchScript interpreter"


def in_one_line(error: BaseException) -> str:
    """The error's type and the first line of its text.

    TorchScript begins with its own stack, whose first line is the same for all errors, and says last
    what was wrong: there it is the last line.
    """
    name = type(error).__name__
    lines = str(error).strip().splitlines()
    if not lines:
        return name
    line = lines[-1] if lines[0].startswith(_TORCHSCRIPT) else lines[0]
    # The last line of TorchScript's text has a type of its own, mostly the same.
    return f"{name}: {line.strip().removeprefix(f'{name}: ')}"
