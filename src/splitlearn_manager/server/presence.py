"""That a node is there, for others on the machine: the claim on its state directory, and its socket.

Neither is needed to serve: what cannot be made is said once, as a warning, and tried again while the node
runs; so is what somebody has deleted. Only that another node has the directory ends the start.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from splitlearn_manager.errors import ServerError
from splitlearn_manager.logs import log_event
from splitlearn_manager.server.control import Answer, ControlSocket
from splitlearn_manager.server.signpost import Signpost
from splitlearn_manager.server.state_dir import Claim, socket_of

log = logging.getLogger(__name__)


class Presence:
    """From its making until `close`.

    Args:
        state_dir: the node's own directory.
        directory: the desired directory.
        answers: what is answered on the socket; None listens to nobody.

    Raises:
        ServerError: another node has the state directory.
    """

    def __init__(
        self, state_dir: Path, directory: Path, answers: Mapping[str, Answer] | None
    ) -> None:
        self._directory = directory
        self._place = socket_of(state_dir)
        self._answers = answers
        self._control: ControlSocket | None = None
        self._signpost: Signpost | None = None
        self._said = ""
        self._claim = Claim(state_dir, str(directory))
        self._say(self._claim.problem or self._listen())

    def refresh(self) -> None:
        """Makes anew what has gone, or could not be made before."""
        try:
            self._claim.renew()
        except ServerError as error:
            self._say(error.message)
            return
        self._say(self._claim.problem or self._listen())

    def close(self) -> None:
        """Stops listening, and lets another node have the directory."""
        self._stop_listening()
        self._claim.release()

    def _listen(self) -> str:
        """Opens the socket unless it is open; why it cannot, or an empty text."""
        if self._answers is None or (self._control is not None and self._place.exists()):
            return ""
        self._stop_listening()
        try:
            self._control = ControlSocket(self._place, self._answers)
        except ServerError as error:
            return error.message
        self._signpost = Signpost(self._directory, self._place)
        return ""

    def _stop_listening(self) -> None:
        if self._signpost is not None:
            self._signpost.take_down()
            self._signpost = None
        if self._control is not None:
            self._control.close()
            self._control = None

    def _say(self, problem: str) -> None:
        if problem and problem != self._said:
            message = (
                f"{problem}: the command line cannot reach this node, or another one may be started "
                "beside it; serving goes on; let state_dir name a directory that can be written"
            )
            log_event(log, logging.WARNING, "NotReachable", message)
        self._said = problem
