"""A thread that takes up whoever comes to a socket server, and sleeps for as long as nobody does.

The standard library's `serve_forever` looks up ten times a second whether it should end; an idle node
has better things to do.
"""

from __future__ import annotations

import selectors
import socket
import socketserver
import threading


class Acceptor:
    """Accepts from the moment it is made until `end`.

    Args:
        server: is bound; whoever made it closes it, after `end`.
        name: of the thread.
    """

    def __init__(self, server: socketserver.TCPServer, name: str) -> None:
        self._server = server
        self._ending = threading.Event()
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Accepts nobody any more; connections that are open stay. To be called once."""
        self._ending.set()
        self._waker.send(b"x")
        self._thread.join()
        self._waker.close()
        self._woken.close()

    def _accept(self) -> None:
        with selectors.DefaultSelector() as comers:
            comers.register(self._server, selectors.EVENT_READ)
            comers.register(self._woken, selectors.EVENT_READ)
            while True:
                comers.select()
                if self._ending.is_set():
                    return
                self._server.handle_request()
