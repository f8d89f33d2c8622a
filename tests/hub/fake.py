"""A local HTTP server that answers as much of the Hugging Face Hub's interface as models need."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def commit(revision: str) -> str:
    """The commit that a revision's name stands for, or the commit itself."""
    return revision if len(revision) == 40 else hashlib.sha1(revision.encode()).hexdigest()


class Hub:
    """Repositories by name: {"org/name": {revision: {file: bytes}}}; those of ``gated`` need the token."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.token = "hf_right"
        self.asked: list[str] = []
        self.address = ""

    def add(self, name: str, directory: Path, revision: str = "main") -> None:
        """The files of a directory and what no command here needs beside them."""
        files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        files |= {"pytorch_model.bin": b"pickle", "original/weights.safetensors": b"others", "README.md": b"# card"}
        self.repositories.setdefault(name, {})[revision] = files


@contextlib.contextmanager
def served() -> Iterator[Hub]:
    """A hub that listens on this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, content=b"", head=False, **headers):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if not head:
                self.wfile.write(body)

        def refused(self, name):
            if name not in hub.repositories:
                return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound") or True
            if name in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.answer(403, {"error": "gated"}, X_Error_Code="GatedRepo") or True
            return False

        def do_HEAD(self):
            self.do_GET(head=True)

        def do_GET(self, head=False):
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            hub.asked.append("/".join(parts))
            api = parts[:2] == ["api", "models"]
            name = "/".join(parts[2:4] if api else parts[:2])
            if self.refused(name):
                return
            revisions = hub.repositories[name] | {commit(one): files for one, files in hub.repositories[name].items()}
            rest = parts[4:] if api else parts[2:]
            revision = rest[1] if len(rest) > 1 else "main"
            if revision not in revisions:
                return self.answer(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")
            files = revisions[revision]
            if api and rest[:1] == ["tree"]:
                return self.answer(
                    200,
                    [
                        {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for path, data in files.items()
                    ],
                )
            if api:
                return self.answer(
                    200,
                    {
                        "id": name,
                        "modelId": name,
                        "sha": commit(revision),
                        "private": False,
                        "tags": [],
                        "downloads": 0,
                        "likes": 0,
                        "siblings": [{"rfilename": path} for path in files],
                    },
                )
            data = files["/".join(rest[2:])]
            self.answer(200, data, head=head, X_Repo_Commit=commit(revision), ETag=f'"{hashlib.sha1(data).hexdigest()}"')

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            hub.asked.append("/".join(parts))
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.answer(401, {"error": "Invalid username or password."})
            if parts == ["api", "repos", "create"]:
                said = json.loads(body)
                name = f"{said['organization']}/{said['name']}" if said.get("organization") else said["name"]
                hub.repositories.setdefault(name, {"main": {}})
                return self.answer(200, {"url": f"{hub.address}/{name}", "name": name})
            if parts == ["api", "validate-yaml"]:  # the head of README.md
                return self.answer(200, {"errors": [], "warnings": []})
            name = "/".join(parts[2:4])
            if parts[4] == "preupload":
                files = json.loads(body)["files"]
                return self.answer(
                    200,
                    {
                        "files": [
                            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for file in files
                        ]
                    },
                )
            for line in body.decode().splitlines():
                said = json.loads(line)
                if said["key"] == "file":
                    hub.repositories[name]["main"][said["value"]["path"]] = base64.b64decode(said["value"]["content"])
            oid = commit("main")
            self.answer(200, {"commitUrl": f"{hub.address}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
