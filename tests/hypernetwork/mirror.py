"""A Hugging Face hub on this machine: the requests that pulling and pushing make, and faults.

Speaks what huggingface_hub's client asks for: the listing of a commit, files with ranges, and the
steps of a commit (create, preupload, LFS batch, upload, verify, commit). Files named `*.pt`,
`*.safetensors` and `tokenizer.json` are large files, known by their sha256; the others by git's
blob id. There is no Xet, so its headers are absent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


def is_large(path: str) -> bool:
    return path.endswith((".pt", ".safetensors", "tokenizer.json"))


@dataclass
class Repository:
    """One repository at one commit."""

    revision: str
    files: dict[str, bytes]
    licence: str | None = None
    listing: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Path -> what to say of it instead of the truth."""

    @property
    def sha(self) -> str:
        """The commit that is said to have been given."""
        return self.revision

    def siblings(self) -> list[dict[str, Any]]:
        entries = {path: self._entry(path, data) for path, data in self.files.items()}
        for path, lie in self.listing.items():
            entries[path] = {**entries.get(path, self._entry(path, b"")), **lie}
        return list(entries.values())

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob}
        if is_large(path):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
        return entry


@dataclass
class Mirror:
    """What is served, what was asked, and what is to go wrong."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range or nothing)."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """Path of a file -> after how many bytes each coming response hangs up."""
    stalls: dict[str, int] = field(default_factory=dict)
    """Path of a file -> after how many bytes nothing more comes, until it is taken out."""
    swaps: dict[str, bytes] = field(default_factory=dict)
    """Path of a file -> what is sent instead of it."""
    ignores_ranges: bool = False
    redirects: dict[str, str] = field(default_factory=dict)
    """Path of a file -> the address of the server that has it."""
    tokens_seen: list[str | None] = field(default_factory=list)
    """What each request for a listing or a file showed."""
    token: str | None = None
    """What a request has to show, if anything."""
    takes_uploads: bool = True
    uploads: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[dict[str, Any]]] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    endpoint: str = ""

    def asked_for(self, path: str) -> list[str]:
        """Return the ranges of the requests for a file."""
        return [r for method, p, r in self.requests if method == "GET" and p.endswith(path)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mirror: Mirror

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.mirror.requests.append((self.command, path, self.headers.get("Range", "")))
        shown = self.headers.get("Authorization")
        self.mirror.tokens_seen.append(shown)
        if self.mirror.token and shown != f"Bearer {self.mirror.token}":
            return self._answer(401, {"error": "who are you"})
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            return self._list(name, revision)
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        repository = self.mirror.repositories.get(name)
        if repository is None or revision != repository.revision or file not in repository.files:
            return self._answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
        if file in self.mirror.redirects:
            return self._answer(302, {}, {"Location": self.mirror.redirects[file] + self.path})
        self._send_file(repository, file)

    def _list(self, name: str, revision: str) -> None:
        repository = self.mirror.repositories.get(name)
        if repository is None:
            return self._answer(404, {"error": "none"}, {"X-Error-Code": "RepoNotFound"})
        if revision != repository.revision:
            return self._answer(404, {"error": "none"}, {"X-Error-Code": "RevisionNotFound"})
        card = {"license": repository.licence} if repository.licence else {}
        self._answer(
            200,
            {
                "id": name,
                "modelId": name,
                "sha": repository.sha,
                "cardData": card,
                "siblings": repository.siblings(),
            },
        )

    def _send_file(self, repository: Repository, file: str) -> None:
        data = self.mirror.swaps.get(file, repository.files[file])
        start = 0
        if (wanted := self.headers.get("Range")) and not self.mirror.ignores_ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(data):
            return self._answer(416, {"error": "nothing there"})
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", repository.revision)
        self.send_header("X-Linked-Size", str(len(data)))
        self.end_headers()
        body = data[start:]
        cuts = self.mirror.cuts.get(file)
        if cuts:
            body = body[: cuts.pop(0)]
            self.close_connection = True
        if (sent := self.mirror.stalls.get(file)) is not None:
            self.wfile.write(body[:sent])
            while file in self.mirror.stalls:
                time.sleep(0.02)
            self.close_connection = True
            return
        self.wfile.write(body)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.mirror.requests.append((self.command, path, ""))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.mirror.token and self.headers.get("Authorization") != f"Bearer {self.mirror.token}":
            return self._answer(401, {"error": "who are you"})
        if path == "/api/repos/create":
            self.mirror.created.append(made := json.loads(body))
            url = f"{self.mirror.endpoint}/{made['organization']}/{made['name']}"
            return self._answer(200, {"url": url})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in path:
            return self._answer(200, {"files": [_mode(f) for f in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return self._answer(
                200, {"objects": [self._slot(o) for o in json.loads(body)["objects"]]}
            )
        if path == "/verify":
            return self._answer(200, {})
        if "/commit/" in path:
            self.mirror.commits.append([json.loads(line) for line in body.splitlines()])
            repository = path.removeprefix("/api/models/").partition("/commit/")[0]
            url = f"{self.mirror.endpoint}/{repository}/commit/{'c' * 40}"
            return self._answer(200, {"commitUrl": url, "commitOid": "c" * 40})
        self._answer(404, {"error": f"nothing is known of {path}"})

    def do_PUT(self) -> None:
        self.mirror.requests.append((self.command, self.path, ""))
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.mirror.takes_uploads:
            return self._answer(403, {"error": "no"})
        self.mirror.uploads[self.path.removeprefix("/upload/")] = data
        self._answer(200, {})

    def _slot(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.mirror.endpoint}/upload/{wanted['oid']}"}
        verify = {"href": f"{self.mirror.endpoint}/verify"}
        return {**wanted, "actions": {"upload": upload, "verify": verify}}

    def _answer(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if is_large(file["path"]) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about clients that hang up."""


@contextmanager
def serve() -> Iterator[Mirror]:
    """Serve a hub on a free port of the loopback until the block ends."""
    mirror = Mirror()
    handler = type("Handler", (_Handler,), {"mirror": mirror})
    server = _Server(("127.0.0.1", 0), handler)
    mirror.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield mirror
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def committed(commit: list[dict[str, Any]]) -> dict[str, bytes | str]:
    """Return path -> content of a commit's small files, and the sha256 of its large ones."""
    files: dict[str, bytes | str] = {}
    for line in commit:
        if line["key"] == "file":
            files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        elif line["key"] == "lfsFile":
            files[line["value"]["path"]] = line["value"]["oid"]
    return files
