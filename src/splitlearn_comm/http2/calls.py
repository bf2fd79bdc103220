"""Calls that are taken over: begun as their message arrives, answered from any thread.

    polling thread:          headers → room for it? → message → `begin(message, call)` ┐
    whoever has the answer:  `call.send(bytes)` or `call.refuse(status, details)`      ◄┘

Handing a request from thread to thread costs more than anything else that a small request costs. What waits
or takes long must not be done on the polling thread: `call.run` hands it to a pool.

A handler of a call with one message each way takes it over if its function has a method `begin(message,
call)`; one of a call with many if it has `open(wire)`, which gives a `Stream`; and one with an attribute
`full` refuses it with that text, before its message is read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import grpc

from splitlearn_comm.core.frames import Bytes


class Call(Protocol):
    """A call that is answered once, from any thread."""

    def remaining_s(self) -> float:
        """Seconds until the caller's deadline; very many without one."""
        ...

    def active(self) -> bool:
        """Whether somebody waits for the answer."""
        ...

    def peer(self) -> str:
        """Who calls, as gRPC writes it: `ipv4:…`, `ipv6:…` or `unix:…`."""
        ...

    def name_version(self, version: str) -> None:
        """Have the answer say, in its trailing metadata, which version of the model gave it."""
        ...

    def send(self, *response: Bytes) -> None:
        """Answer with an encoded message, given in parts, which may change once this returns."""
        ...

    def refuse(self, status: grpc.StatusCode, details: str) -> None:
        """End the call without an answer."""
        ...

    def run(self, handle: Callable[[Any, grpc.ServicerContext], object], request: object) -> None:
        """Have a thread of the pool call `handle(request, context)` as gRPC would, and answer with that."""
        ...


class Wire(Protocol):
    """The network's side of a stream."""

    def remaining_s(self) -> float:
        """Seconds until the caller's deadline; very many without one."""
        ...

    def active(self) -> bool:
        """Whether somebody is there."""
        ...

    def peer(self) -> str:
        """Who calls, see `Call`."""
        ...

    def write(self, *frame: Bytes) -> None:
        """Send a message, given as for `Call.send`, after those that were written before; from any thread."""
        ...

    def read_on(self) -> None:
        """Go on reading, after `Stream.received` said that it does not want more."""
        ...

    def end(self, status: grpc.StatusCode, details: str) -> None:
        """End the call once all is sent."""
        ...


class Stream(Protocol):
    """Our side of a stream. None of these waits, or raises."""

    def received(self, frame: Bytes) -> bool:
        """A message came; whether further ones are wanted now."""
        ...

    def sent(self) -> None:
        """A message that was written has been sent."""
        ...

    def no_more(self) -> None:
        """The caller sends nothing more, or is gone."""
        ...


VERSION_KEY = "splitlearn-version"
"""In trailing metadata: which version of the model has answered."""


@lru_cache(maxsize=1024)
def version_metadata(version: str) -> tuple[tuple[str, str], ...]:
    """The trailing metadata of an answer."""
    return ((VERSION_KEY, version),)
