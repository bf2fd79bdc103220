"""Which directory a command means, and the running node that serves it.

A directory that is named is meant. Otherwise `desired` in the working directory if there is one, else
the directory of the one node that this user runs. Whatever cannot be found is said in a sentence that
names the directory and what to type next.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from splitlearn_manager.cli.asking import (
    PATIENCE_S,
    NodeError,
    NodeGone,
    NodeNotRunning,
    NodeSilent,
    NotAllowed,
    ask,
)
from splitlearn_manager.server.state_dir import socket_of, state_dir_for

DEFAULT = Path("desired")

_GLANCE_S = 1.0


class NotFound(Exception):
    """No directory or no node could be meant; the message is for people."""


@dataclass(frozen=True)
class RunningNode:
    """A node that answers.

    Attributes:
        directory: the directory it serves, as it was typed if it was.
        about: what the node says of itself.
    """

    directory: Path
    socket: Path
    about: dict[str, object]

    @property
    def process_id(self) -> object:
        return self.about.get("process_id")

    def ask(self, do: str, **arguments: object) -> dict[str, object]:
        """The node's answer. Raises NodeError with a sentence that says what to do; Refused as it is."""
        try:
            return ask(self.socket, do, patience_s=PATIENCE_S, **arguments)
        except (NodeGone, NodeNotRunning):
            raise NodeGone(
                f"the node that serves {self.directory} (process {self.process_id}) ended before it "
                f"had answered. Its log says why; to start it again: "
                f"{_run_command(self.directory)}"
            ) from None
        except NodeSilent as error:
            raise NodeSilent(_hung(self.directory, self.process_id, error)) from None


def program() -> str:
    """How this command line was called, to be typed again."""
    name = os.path.basename(sys.argv[0])
    return "splitlearn-manager reconcile" if name == "splitlearn-manager" else _module()


def _run_command(directory: Path) -> str:
    """The command that starts the node of a directory, as it can be typed."""
    return f"{program()} run {shlex.quote(str(directory))}"


def _module() -> str:
    return f"{interpreter()} -m splitlearn_manager.reconcile"


def interpreter() -> str:
    """This Python as a person would type it here."""
    here = os.path.relpath(sys.executable)
    return here if not here.startswith("..") else sys.executable


def looks_like_directory(word: str) -> bool:
    """Whether a word that may be a model's id or a directory is the latter: ids contain no slash."""
    return os.sep in word or word in (".", "..") or os.path.isdir(word)


def split_targets(words: Sequence[str]) -> tuple[tuple[str, ...], Path | None]:
    """`[ID…] [DIRECTORY]`: ids, and the directory if the last word is one."""
    if words and looks_like_directory(words[-1]):
        return tuple(words[:-1]), Path(words[-1])
    return tuple(words), None


def directory_or_default(directory: Path | None, command: str) -> Path:
    """The directory that is meant, for a command that does not need a node. Raises NotFound."""
    if directory is not None:
        return directory
    if DEFAULT.is_dir():
        return DEFAULT
    # A second node on a directory is never meant.
    nodes = running_nodes() if command in ("plan", "validate") else ()
    if len(nodes) == 1:
        return nodes[0].directory
    raise NotFound(
        f"which directory? There is no {DEFAULT}/ here{_and_running(nodes)}. "
        f"Name one, as in: {program()} {command} DIRECTORY"
    )


def check_directory(directory: Path) -> None:
    """Raises NotFound if it is no directory."""
    if not directory.exists():
        raise NotFound(f"{directory}: there is no such directory")
    if not directory.is_dir():
        raise NotFound(f"{directory}: expected a directory of YAML files, got a file")


def find_node(directory: Path | None, server_file: Path | None = None) -> RunningNode:
    """The node that is meant.

    Raises:
        NotFound: there is none, or it cannot be asked.
    """
    if directory is None and not DEFAULT.is_dir():
        nodes = running_nodes()
        if len(nodes) == 1:
            return nodes[0]
        if not nodes:
            raise NotFound(
                f"no node of yours is running, and there is no {DEFAULT}/ here. "
                f"To start one: {program()} run DIRECTORY"
            )
        raise NotFound(f"which node?{_and_running(nodes)}. Name its directory.")
    directory = directory or DEFAULT
    node = node_of(directory, server_file)
    if node is None:
        raise NotFound(_no_node(directory, server_file))
    return node


def node_of(directory: Path, server_file: Path | None = None) -> RunningNode | None:
    """The node that serves the directory; None if there is none.

    Raises:
        NotFound: there is one, and it cannot be asked.
    """
    for socket in _sockets(directory, server_file):
        try:
            answer = ask(socket, "status", models=[])
        except NodeNotRunning:
            continue
        except NodeSilent as error:
            raise NotFound(_hung(directory, _holder(socket), error)) from None
        except NotAllowed as error:
            raise NotFound(
                f"the node that serves {directory} cannot be asked: {error}. "
                "Only the user who started it may."
            ) from None
        except NodeError as error:
            raise NotFound(f"the node that serves {directory} cannot be asked: {error}") from None
        about = answer.get("node")
        node = RunningNode(directory, socket, about if isinstance(about, dict) else {})
        _check_serves(node, directory)
        return node
    return None


def running_nodes() -> tuple[RunningNode, ...]:
    """All nodes of this user that answer at once, in the order of their directories."""
    found: dict[str, RunningNode] = {}
    for socket in _known_sockets():
        try:
            about = ask(socket, "status", patience_s=_GLANCE_S, models=[]).get("node")
        except NodeError:
            continue
        if isinstance(about, dict) and (directory := about.get("directory")):
            found[str(directory)] = RunningNode(_short(str(directory)), socket, about)
    return tuple(found[directory] for directory in sorted(found))


def _sockets(directory: Path, server_file: Path | None) -> tuple[Path, ...]:
    """Where the node of a directory may listen, likeliest first."""
    places = [state_dir_for(directory)]
    configured = _configured_state_dir(directory, server_file)
    if configured is not None:
        places.insert(0 if server_file is not None else 1, configured)
    return tuple(dict.fromkeys(socket_of(place) for place in places))


def _configured_state_dir(directory: Path, server_file: Path | None) -> Path | None:
    """`state_dir` of the server file; None without one. An invalid file says nothing: it may be that
    of a node that runs with its last good one."""
    path = server_file or directory / "server.yaml"
    try:
        if b"state_dir" not in path.read_bytes():
            return None
        from splitlearn_manager.config.server_config import ServerConfig
        from splitlearn_manager.errors import ConfigError
    except OSError:
        return None
    try:
        return ServerConfig.from_yaml(path).resolved_state_dir
    except (ConfigError, OSError):
        return None


def _known_sockets() -> Iterable[Path]:
    base = state_dir_for(DEFAULT).parent
    yield from sorted(base.glob("*/node.sock"))
    yield from sorted(Path(tempfile.gettempdir()).glob(f"splitlearn-{os.getuid()}-*.sock"))


def _check_serves(node: RunningNode, directory: Path) -> None:
    served = str(node.about.get("directory") or directory)
    if os.path.abspath(served) == os.path.abspath(directory):
        return
    if os.path.realpath(served) == os.path.realpath(directory):
        return
    raise NotFound(
        f"the node with the state directory {node.socket.parent} serves {served}, not {directory}"
    )


def _no_node(directory: Path, server_file: Path | None) -> str:
    sockets = _sockets(directory, server_file)
    crashed = next((path for path in sockets if path.exists()), None)
    if crashed is None:
        why = f"nobody listens on {sockets[0]}"
    else:
        why = f"the one that listened on {crashed} ended without cleaning up"
    try:
        check_directory(directory)
    except NotFound as problem:
        if directory.exists():
            return str(problem)
        return f"{problem}, and no node serves it{_and_running(running_nodes())}"
    start = f"To start one: {_run_command(directory)}"
    return f"no node serves {directory}: {why}{_and_running(running_nodes())}. {start}"


def _and_running(nodes: Sequence[RunningNode]) -> str:
    if not nodes:
        return ""
    listed = ", ".join(f"{node.directory} (process {node.process_id})" for node in nodes)
    return f" (running: {listed})"


def _hung(directory: Path, process_id: object, error: NodeSilent) -> str:
    return (
        f"the node that serves {directory} (process {process_id or 'unknown'}) does not answer: "
        f"{error}. It is stopped, hangs or is overloaded. If it stays so, end it with "
        f"`kill -9 {process_id or 'PROCESS'}` and start it again: what it had accepted is kept."
    )


def _holder(socket: Path) -> str:
    """The process id in the lock beside the socket; empty if there is none."""
    try:
        return (socket.resolve().parent / "lock").read_text().strip()
    except OSError:
        return ""


def _short(directory: str) -> Path:
    """A directory as a person would type it here."""
    relative = os.path.relpath(directory)
    return Path(relative if not relative.startswith("..") else directory)
