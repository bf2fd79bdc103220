"""What a client's caller catches.

    SplitlearnCommError
    ├── RemoteComputeError   (also grpc.RpcError, RuntimeError)   the call failed, and no try is left
    ├── ClientClosed         (also RuntimeError)                  the client was used after close()
    └── UnsupportedByServer  (also RuntimeError)                  the server does not know an extension

Code written for version 1.0 that catches `grpc.RpcError` or `RuntimeError` goes on working.
"""

from __future__ import annotations

import grpc

from splitlearn_comm.core.errors import SplitlearnCommError


class RemoteComputeError(SplitlearnCommError, grpc.RpcError, RuntimeError):
    """A call that ended with a gRPC status other than OK, after all the tries it was allowed.

    Args:
        rpc: the name of the rpc, for the message.
        status: the last try's status.
        details: the server's text, or gRPC's own.
        attempts: how often the call was made.
    """

    def __init__(self, rpc: str, status: grpc.StatusCode, details: str, attempts: int = 1) -> None:
        tries = "" if attempts == 1 else f" after {attempts} attempts"
        super().__init__(f"{rpc} failed{tries}: {status.name}: {details}")
        self.attempts = attempts
        self._status = status
        self._details = details

    def code(self) -> grpc.StatusCode:
        """Return the gRPC status."""
        return self._status

    def details(self) -> str:
        """Return the server's text."""
        return self._details


class ClientClosed(SplitlearnCommError, RuntimeError):
    """The client was used after `close()`; `connect()` opens it again."""


class UnsupportedByServer(SplitlearnCommError, RuntimeError):
    """The client was made for something that this server does not know; nothing was sent."""
