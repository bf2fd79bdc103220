"""What handlers in a pool learn of their call, and tell about it: a `grpc.ServicerContext`."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import grpc

from splitlearn_comm.http2.headers import Metadata
from splitlearn_comm.http2.stream import NEVER_S, StreamOfCall

_log = logging.getLogger(__name__)

DONE = object()
"""Nothing more comes: the call has its status, or its messages have ended."""
_KEY = re.compile("[0-9a-z_.-]+")
_VALUE = re.compile("[ -~]*")


class Aborted(Exception):
    """Ends a handler whose call has been given its status."""


class Context(grpc.ServicerContext):
    """What handlers learn of their call, and tell about it."""

    def __init__(self, stream: StreamOfCall) -> None:
        self._stream = stream
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] | None = []
        self.room = threading.Semaphore(0)

    # What runs a handler.

    def run(self, work: Callable[[], Any]) -> Any:
        """What `work` gives; `DONE` if it raised, and the caller has been told."""
        try:
            return work()
        except Aborted:
            self._stream.finish(*self.status)
        except Exception as error:
            _log.exception("method=%s", self._stream.head.method)
            text = f"the server's handler raised {type(error).__name__}"
            self._stream.finish(grpc.StatusCode.UNKNOWN, text)
        return DONE

    def answer(self, response: object, serialize: Callable[[Any], bytes] | None) -> None:
        """Send the one message of the answer, or the status that the handler has set instead."""
        if self.status[0] is not grpc.StatusCode.OK:
            self._stream.finish(*self.status)
            return
        data = self.run(lambda: written(serialize, response))
        if data is not DONE:
            self._stream.answer(data)

    @property
    def status(self) -> tuple[grpc.StatusCode, str]:
        """What the call ends with."""
        code = self._code or grpc.StatusCode.OK
        # What is no status, and no text, must not keep the call from ending.
        return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN, (
            str(self._details or "")
        )

    def end(self) -> None:
        """The call is over."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks, None
        self.room.release()
        for callback in callbacks or ():
            try:
                callback()
            except Exception:
                # It ends with the calls beside it, which must be told too.
                _log.exception("method=%s", self._stream.head.method)

    # As gRPC has it.

    def is_active(self) -> bool:
        return self._stream.active

    def time_remaining(self) -> float | None:  # type: ignore[override]
        left_s = self._stream.remaining_s()
        return None if left_s == NEVER_S else left_s

    def cancel(self) -> None:
        self._stream.finish(grpc.StatusCode.CANCELLED, "cancelled by the server")

    def add_callback(self, callback: Callable[[], None]) -> bool:
        with self._lock:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            return True

    def invocation_metadata(self) -> Metadata:
        return self._stream.head.metadata

    def peer(self) -> str:
        return self._stream.peer()

    def peer_identities(self) -> None:
        return None

    def peer_identity_key(self) -> None:
        return None

    def auth_context(self) -> dict[str, bytes]:
        return {}

    def send_initial_metadata(self, initial_metadata: Any) -> None:
        self._stream.begin_answer(_as_metadata(initial_metadata))

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self._stream.trailing = _as_metadata(trailing_metadata)

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        self._code, self._details = code, details
        raise Aborted(details)

    def abort_with_status(self, status: grpc.Status) -> NoReturn:
        if status.trailing_metadata:
            self.set_trailing_metadata(status.trailing_metadata)
        self.abort(status.code, status.details)

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details


def _as_metadata(pairs: Iterable[tuple[str, str | bytes]]) -> Metadata:
    """What a handler adds to its answer.

    Raises:
        ValueError: if that cannot travel: told here, where the handler hears of it.
    """
    return tuple(_as_field(key, value) for key, value in pairs)


def _as_field(key: str, value: str | bytes) -> tuple[str, str | bytes]:
    if not _KEY.fullmatch(key):
        text = f"metadata {key!r}: a key has lower-case letters, digits and _ . - alone"
        raise ValueError(text)
    if key.endswith("-bin"):
        return key, value.encode() if isinstance(value, str) else bytes(value)
    text = value if isinstance(value, str) else bytes(value).decode("latin-1")
    if not _VALUE.fullmatch(text):
        raise ValueError(f"metadata {key!r}: a value is printable ASCII, or its key ends in -bin")
    return key, text


def written(serialize: Callable[[Any], bytes] | None, response: Any) -> bytes:
    """A message's bytes."""
    data: bytes = response if serialize is None else serialize(response)
    return data
