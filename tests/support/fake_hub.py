"""A stand-in for the Hugging Face Hub on loopback: repositories, and the files of each commit."""

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import huggingface_hub
import pytest

from support.endpoints import Handler, send

TOKEN = "hf_of_ann"


@dataclass
class FakeHub:
    """The Hub with one user, ann; the fields that a test sets make it refuse."""

    repositories: dict[str, bool] = field(default_factory=dict)
    """Name -> whether it is private."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Name -> the files of its last commit."""
    asked: list[str] = field(default_factory=list)
    """Paths of all requests."""
    refuses_commits: bool = False
    url: str = ""

    def respond(self, handler: Handler, path: str, content: bytes) -> None:
        self.asked.append(path)
        if handler.headers["Authorization"] != f"Bearer {TOKEN}":
            send(handler, {"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            body = json.loads(content)
            name = f"{body['organization'] or 'ann'}/{body['name']}"
            if not name.startswith("ann/"):
                send(handler, {"error": "You don't have the rights to create a model"}, 403)
                return
            status = 409 if name in self.repositories else 200
            self.repositories.setdefault(name, body.get("visibility") == "private")
            send(handler, {"url": f"{self.url}/{name}"}, status)
        elif path == "/api/validate-yaml":
            send(handler, {"errors": [], "warnings": []})
        else:
            self._of_repository(handler, path.removeprefix("/api/models/"), content)

    def _of_repository(self, handler: Handler, path: str, content: bytes) -> None:
        name, _, action = path.partition("/")[2].partition("/")
        name = f"{path.partition('/')[0]}/{name}"
        if name not in self.repositories:
            send(handler, {"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif action == "":
            send(handler, {"id": name, "private": self.repositories[name]})
        elif action == "preupload/main":
            paths = [file["path"] for file in json.loads(content)["files"]]
            modes = [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in paths]
            send(handler, {"files": modes})
        elif self.refuses_commits:
            send(handler, {"error": "You have exceeded\nyour storage limit."}, 403)
        else:
            assert action == "commit/main"
            lines = [json.loads(line) for line in content.splitlines()]
            assert [line["key"] for line in lines] == ["header"] + ["file"] * (len(lines) - 1)
            files = [line["value"] for line in lines[1:]]
            self.files[name] = {one["path"]: base64.b64decode(one["content"]) for one in files}
            send(
                handler, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{name}/commit/0"}
            )


@contextmanager
def serving(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve the stand-in, and let huggingface_hub use it with ann's token."""

    class Requests(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = self.headers.get("Content-Length")
            content = self.rfile.read(int(length)) if length else self._chunks()
            hub.respond(self, self.path.partition("?")[0], content)

        do_GET = do_POST

        def _chunks(self) -> bytes:
            found = b""
            while self.headers.get("Transfer-Encoding") == "chunked":
                size = int(self.rfile.readline(), 16)
                found += self.rfile.read(size)
                self.rfile.readline()
                if not size:
                    break
            return found

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
