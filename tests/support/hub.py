"""A Hugging Face hub on loopback: the few endpoints that a download uses, over directories on disk."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Serves each of `repositories`, name → directory, at one commit, called `main` and `v1` too."""

    repositories: dict[str, Path]
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request."""
        self.requests.append(f"{method} {path}")
        for name, directory in self.repositories.items():
            if path.startswith(f"/api/models/{name}"):
                return self._describe(name, directory, path)
            if path.startswith(f"/{name}/resolve/"):
                return self._file(directory, path.removeprefix(f"/{name}/resolve/"))
        return _error(404, "RepoNotFound")

    def _describe(self, name: str, directory: Path, path: str) -> tuple[int, dict[str, str], bytes]:
        _, _, rest = path.partition(f"/api/models/{name}")
        kind, _, revision = rest.partition("?")[0].strip("/").partition("/")
        if revision.partition("/")[0] not in ("", "main", "v1", COMMIT):
            return _error(404, "RevisionNotFound")
        files = sorted(p for p in directory.rglob("*") if p.is_file())
        names = [str(p.relative_to(directory)) for p in files]
        if kind == "tree":
            tree = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": _etag(p)}
                for n, p in zip(names, files, strict=True)
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    def _file(self, directory: Path, path: str) -> tuple[int, dict[str, str], bytes]:
        revision, _, name = path.partition("/")
        file = directory / name
        if revision not in ("main", "v1", COMMIT):
            return _error(404, "RevisionNotFound")
        if not file.is_file():
            return _error(404, "EntryNotFound")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(file)}"'}
        return 200, headers, file.read_bytes()


def _error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": code}, b""


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[FakeHub]:
    """The hub, on a free port of 127.0.0.1, while inside."""
    hub = FakeHub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.command, self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
