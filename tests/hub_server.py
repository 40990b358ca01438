"""A Hub of one's own: as much of the Hugging Face Hub's API as `huggingface_hub` needs to upload and download models.

It speaks HTTP on localhost, so that the real client runs in tests. Repositories are dicts in memory: a list of commits,
each with all files of the repository at that time.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

USER = "someone"
TOKEN = "hf_of_a_test"


class Repository:
    """Commits, oldest first: their hash, message and files."""

    def __init__(self) -> None:
        self.commits: list[tuple[str, str, dict[str, bytes]]] = [(self._hash("initial"), "initial commit", {})]

    @property
    def files(self) -> dict[str, bytes]:
        """Of the newest commit."""
        return self.commits[-1][2]

    def commit(self, message: str, changes: dict[str, bytes | None]) -> str:
        """Add a commit; None deletes a file."""
        files = {name: data for name, data in {**self.files, **changes}.items() if data is not None}
        self.commits.append((self._hash(f"{message}{len(self.commits)}"), message, files))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Hash and files at a revision: `main`, or a commit's hash."""
        if revision == "main":
            return self.commits[-1][0], self.files
        return next(((sha, files) for sha, _, files in self.commits if sha == revision), None)

    @staticmethod
    def _hash(text: str) -> str:
        return hashlib.sha1(text.encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server; `repositories` by id."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.unknown: list[str] = []

    @property
    def url(self) -> str:
        """What to set `HF_ENDPOINT` to."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A server that runs in a thread of its own."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Silence."""

    def do_POST(self) -> None:
        """Uploads."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Unauthorized"}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/[^/]+", path):
            if self._repository(found[1]):
                files = [file["path"] for file in json.loads(body)["files"]]
                self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._missing()

    def do_GET(self) -> None:
        """Downloads, and what they begin with."""
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            self._json({"type": "user", "name": USER, "auth": {"type": "access_token"}, "orgs": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            self._tree(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[2], found[3])
        else:
            self._missing()

    do_HEAD = do_GET

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or USER}/{wanted['name'].split('/')[-1]}"
        there = name in self.server.repositories
        self.server.repositories.setdefault(name, Repository())
        self._json({"url": f"{self.server.url}/{name}", "name": name}, 409 if there else 200)

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        if (repository := self._repository(name)) is None:
            return
        changes: dict[str, bytes | None] = {}
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
        sha = repository.commit(message, changes)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    def _info(self, name: str, revision: str) -> None:
        if (found := self._at(name, revision)) is not None:
            sha, files = found
            self._json(
                {"id": name, "modelId": name, "sha": sha, "siblings": [{"rfilename": f} for f in files], "tags": []}
            )

    def _tree(self, name: str, revision: str, under: str | None) -> None:
        if (found := self._at(name, revision)) is None:
            return
        inside = {path: data for path, data in found[1].items() if path.startswith(f"{under}/" if under else "")}
        if under and not inside:
            self._error(404, "EntryNotFound", "no such folder")
            return
        self._json(
            [{"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in inside.items()]
        )

    def _file(self, name: str, revision: str, path: str) -> None:
        if (found := self._at(name, revision)) is None:
            return
        sha, files = found
        if path not in files:
            self._error(404, "EntryNotFound", "no such file", sha)
            return
        self._send(files[path], 200, {"X-Repo-Commit": sha, "ETag": f'"{_etag(files[path])}"'})

    def _repository(self, name: str) -> Repository | None:
        """The repository; None if there is none, and then that is the answer."""
        if name not in self.server.repositories:
            self._error(404, "RepoNotFound", f"no repository {name}")
        return self.server.repositories.get(name)

    def _at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Hash and files; None if there are none, and then that is the answer."""
        repository = self._repository(name)
        found = repository.at(revision) if repository else None
        if repository and found is None:
            self._error(404, "RevisionNotFound", f"no revision {revision}")
        return found

    def _missing(self) -> None:
        self.server.unknown.append(f"{self.command} {self.path}")
        self._error(404, "", "this is no path of the test's Hub")

    def _error(self, status: int, code: str, message: str, sha: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, **({"X-Repo-Commit": sha} if sha else {})}
        self._send(json.dumps({"error": message}).encode(), status, headers)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
