"""How a client's tensors get to the server and the answers back, beyond plain bytes in the message.

    tensor ─► `Carriage.load` ─► bytes for the message, and what its metadata says ─► call
    answer ◄─ `Load.unload`   ◄─ bytes of the message, or where else they are      ◄─┘

What the metadata announces is only for servers that know it: one of version 1.0 would take the bytes for
float32. So the server is asked, once, before the first request that announces anything.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping

import torch

from splitlearn_comm.client.errors import UnsupportedByServer
from splitlearn_comm.client.messages import encode_exactly
from splitlearn_comm.core import shared_memory
from splitlearn_comm.core.codec import TensorCodec
from splitlearn_comm.core.frames import Bytes
from splitlearn_comm.protocol import compute_pb2

_KEPT_FILES = 16
SMALLEST_SHARED_BYTES = 64 * 1024
"""What is smaller costs less in the message (`tests/benchmarks/bench_same_machine.py`)."""


class Load:
    """One request's tensor on its way, and the way of its answer.

    Attributes:
        data: for the message; empty once it is answered.
        shape: of the tensor.
        metadata: for the message.
    """

    def __init__(
        self,
        carriage: Carriage,
        data: Bytes,
        shape: list[int],
        metadata: dict[str, str],
        file: shared_memory.SharedFile | None,
    ) -> None:
        self.data = data
        self.shape = shape
        self.metadata = metadata
        self._carriage = carriage
        self._file = file

    def unload(self, response: compute_pb2.ComputeResponse, data: Bytes) -> torch.Tensor:
        """The answer, a CPU tensor in the codec's dtype; to be asked for once, and given up if this raises.

        Args:
            response: all but the tensor's bytes are taken from it.
            data: these bytes, as the message has them.
        """
        if self._file is not None:
            if response.HasField("shared_bytes"):
                data = self._file.take(response.shared_bytes)
            file, self._file = self._file, None
            self._carriage.keep(file)
        answer = self._carriage.codec.decode(data, response.shape)
        # It is not sent again, and who keeps the answer's future keeps this.
        self.data = b""
        return answer

    def renew(self) -> None:
        """It is sent once more, in another file: an answer to the last time may still be written.

        Raises:
            OSError: if there is no room in shared memory.
        """
        if self._file is None:
            return
        file = self._carriage.new_file(self._file.given())
        self._file.close()
        self._file = file
        self.metadata = {**self.metadata, shared_memory.KEY: file.said}

    def give_up(self) -> None:
        """There is no answer; the server may still write one. A second call does nothing."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


class Carriage:
    """See the module's text. Safe to use from several threads.

    Args:
        codec: how tensors travel.
        announces: whether each request says so.
        shared: whether tensors go through shared memory.
        known: gives what the server says that it knows (`extensions` of its service information).
    """

    def __init__(
        self,
        codec: TensorCodec,
        *,
        announces: bool,
        shared: bool,
        known: Callable[[], Mapping[str, str]],
    ) -> None:
        self.codec = codec
        self._announced = _announcement(codec) if announces else {}
        self._shared = shared
        self._known = known
        self._needs = tuple(f"{key}:{value}" for key, value in self._announced.items())
        if shared:
            self._needs += (shared_memory.KEY,)
        self._asked = not self._needs
        self._lock = threading.Lock()
        self._files: list[shared_memory.SharedFile] = []
        self._looked = False

    @property
    def announced(self) -> dict[str, str]:
        """What each request says in its metadata, wherever its tensor is."""
        return self._announced

    @property
    def server_is_known(self) -> bool:
        """Whether `check_server` has nothing to ask."""
        return self._asked

    def check_server(self) -> None:
        """Ask the server, once, whether it knows what requests announce.

        Raises:
            UnsupportedByServer: it does not.
            RemoteComputeError: it could not be asked.
        """
        if self._asked:
            return
        known = self._known().get("extensions", "").split()
        missing = [need for need in self._needs if need not in known]
        if missing:
            raise UnsupportedByServer(
                f"the server does not know {', '.join(missing)}; it would take the bytes for "
                f"something else. It knows: {', '.join(known) or 'nothing beyond wire 1.0'}"
            )
        self._asked = True

    def load(self, tensor: torch.Tensor) -> Load:
        """Encode a tensor for a request.

        Raises:
            ValueError: if integers in `tensor` would not arrive as they are.
            OSError: if there is no room in shared memory.
        """
        if not self._shared:
            data, shape = encode_exactly(tensor, self.codec)
            return Load(self, data, shape, self._announced, None)
        # Viewed, for it is copied into the file.
        view, shape = encode_exactly(tensor, self.codec, copies=False)
        if len(view) < SMALLEST_SHARED_BYTES:
            return Load(self, bytes(view), shape, self._announced, None)
        file = self.new_file(view)
        return Load(self, b"", shape, {**self._announced, shared_memory.KEY: file.said}, file)

    def new_file(self, data: Bytes) -> shared_memory.SharedFile:
        """One with these bytes. Raises OSError if there is no room in shared memory."""
        file = self._file()
        try:
            file.put(data)
        except BaseException:
            file.close()
            raise
        return file

    def _file(self) -> shared_memory.SharedFile:
        while True:
            with self._lock:
                file = self._files.pop() if self._files else None
                looked, self._looked = self._looked, True
            if not looked:
                shared_memory.remove_left()
            if file is None:
                return shared_memory.SharedFile()
            if file.own:
                return file
            file.close()

    def keep(self, file: shared_memory.SharedFile) -> None:
        """It can be used again."""
        with self._lock:
            if len(self._files) < _KEPT_FILES:
                self._files.append(file)
                return
        file.close()

    def close(self) -> None:
        """Remove the files."""
        with self._lock:
            files, self._files = self._files, []
        for file in files:
            file.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _announcement(codec: TensorCodec) -> dict[str, str]:
    announced = {"dtype": codec.wire_dtype}
    if codec.compression is not None:
        announced["compression"] = codec.compression.name
    return announced
