"""Sockets that listen at an address, and the names of those who come, as gRPC has both."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Any

_WAITING_CONNECTIONS = 1024
_FREE_PORTS_TRIED = 16


def listen(address: str) -> list[socket.socket]:
    """Sockets for all that the address stands for, at one port."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(path)
            listening.listen(_WAITING_CONNECTIONS)
        except OSError:
            listening.close()
            raise
        listening.setblocking(False)
        return [listening]
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    tries = 1 if int(port) else _FREE_PORTS_TRIED
    while True:
        tries -= 1
        try:
            return _listen_at(host, int(port))
        except OSError as error:
            # A port that is free at one of the addresses may be taken at another.
            if not tries or error.errno != errno.EADDRINUSE:
                raise


def _listen_at(host: str, at: int) -> list[socket.socket]:
    found: list[socket.socket] = []
    failure = None
    for family, name in _names(host):
        dual = family == socket.AF_INET6 and name == "::" and socket.has_dualstack_ipv6()
        try:
            listening = socket.create_server(
                (name, at), family=family, backlog=_WAITING_CONNECTIONS, dualstack_ipv6=dual
            )
        except OSError as error:
            failure = error
            if error.errno == errno.EADDRINUSE and name != "::":
                # Some callers of that name would get to whoever listens there.
                for listening in found:
                    listening.close()
                raise
            continue
        listening.setblocking(False)
        at = listening.getsockname()[1]
        found.append(listening)
        if dual:
            break
    if not found:
        raise failure or OSError(f"{host!r} is no address")
    return found


def _names(host: str) -> Sequence[tuple[socket.AddressFamily, str]]:
    if host in ("", "::", "0.0.0.0", "*"):
        # Whatever address of this machine, of either kind, as gRPC has it.
        return (socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")
    known = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in known))


def peer_of(address: tuple[Any, ...]) -> str:
    """As gRPC writes addresses."""
    host, port = address[:2]
    if host.startswith("::ffff:") and "." in host:
        # By IPv4, at a socket that listens for both.
        host = host.removeprefix("::ffff:")
    return f"ipv6:%5B{host.replace('%', '%25')}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"
