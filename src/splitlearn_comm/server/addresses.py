"""Where a server listens: TCP ports, and sockets in the file system that only its own user may use."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

import grpc

from splitlearn_comm.core.errors import ServerStartError

_LONGEST_PATH = 103
"""Bytes; the least that a system allows is 104 with the zero at the end."""


def join_address(host: str, port: int) -> str:
    """Return `host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def bind(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Listen on `host:port` or `unix:PATH`; the port.

    Raises:
        ServerStartError: if the address cannot be listened on.
    """
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ServerStartError(
            f"cannot listen on {address}: the port is taken, or the address is not one of this "
            "machine; choose another port, or 0 for any free one"
        ) from error


@dataclass(frozen=True)
class BoundSocket:
    """A socket that a server has put into the file system, and what it is known by there."""

    path: Path
    identity: tuple[int, int, int]

    def remove(self) -> None:
        """Remove it, once the server has stopped; what somebody else has put in its place stays."""
        with contextlib.suppress(OSError):
            if _identity(self.path) == self.identity:
                self.path.unlink()


def bind_socket(server: grpc.Server, path: Path) -> BoundSocket:
    """Listen on a socket at `path`, for the user of this process alone. One that nobody uses is replaced.

    Raises:
        ServerStartError: if that cannot be, or somebody listens there already.
    """
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ServerStartError(
            f"cannot listen on {path}: a socket's path has at most {_LONGEST_PATH} bytes, this one has "
            f"{len(os.fsencode(path))}"
        )
    try:
        _remove_unused(path)
        # So that at no moment anybody else may connect.
        before = os.umask(0o177)
        try:
            server.add_insecure_port(f"unix:{path}")
        finally:
            os.umask(before)
        return BoundSocket(path, _identity(path))
    except (OSError, RuntimeError) as error:
        what = error.strerror if isinstance(error, OSError) else None
        raise ServerStartError(
            f"cannot listen on {path}: {what or 'its directory does not exist or cannot be written'}"
        ) from error


def _identity(path: Path) -> tuple[int, int, int]:
    """What another socket at the same path does not share: a number of a file alone may be used again."""
    found = path.lstat()
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _remove_unused(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ServerStartError(f"cannot listen on {path}: there is a file that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ServerStartError(f"cannot listen on {path}: another process listens there")
