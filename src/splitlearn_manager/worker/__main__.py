"""`python -m splitlearn_manager.worker DESCRIPTOR`: a worker that is started anew, where none are forked."""

import socket
import sys

from splitlearn_manager.worker.model_worker import work

if __name__ == "__main__":
    work(socket.socket(fileno=int(sys.argv[1])))
