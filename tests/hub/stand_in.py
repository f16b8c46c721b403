"""A local stand-in for the download half of the Hub's HTTP API: one repository per folder, one commit each."""

import contextlib
import hashlib
import http.server
import json
import threading
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


class Handler(http.server.BaseHTTPRequestHandler):
    root: Path

    def log_message(self, *args):
        pass

    def _reply(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code):
        self._reply(404, code.encode(), X_Error_Code=code, X_Error_Message=code)

    def _json(self, value):
        self._reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        folder = self.root / kind / "/".join(parts[:2])
        if not folder.is_dir():
            return self._missing("RepoNotFound")
        action, revision, *path = (*parts[2:4], *parts[4:]) if len(parts) > 3 else ("revision", "main")
        if revision not in REVISIONS:
            return self._missing("RevisionNotFound")
        if api:
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            names = [{"rfilename": str(p.relative_to(folder))} for p in files]
            if action == "tree":
                if path:
                    return self._missing("EntryNotFound")
                return self._json([self._entry(p, folder) for p in files])
            return self._json(
                {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": names, "tags": [], "private": False}
            )
        file = folder.joinpath(*path)
        if action != "resolve" or not file.is_file():
            return self._missing("EntryNotFound")
        body = file.read_bytes()
        self._reply(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        wanted = self.rfile.read(length)
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        folder = self.root / parts[1] / "/".join(parts[2:4])
        if not folder.is_dir() or "paths-info" not in parts:
            return self._missing("RepoNotFound")
        files = [
            p for p in folder.rglob("*") if p.is_file() and str(p.relative_to(folder)).encode() in unquote_all(wanted)
        ]
        self._json([self._entry(p, folder) for p in files])

    def _entry(self, path, folder):
        digest = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": digest}


def unquote_all(body: bytes) -> bytes:
    return unquote(body.decode()).encode()


@contextlib.contextmanager
def hub(root: Path):
    """Serve ``root/models/OWNER/NAME`` and ``root/datasets/OWNER/NAME``; yields the endpoint."""
    handler = type("Bound", (Handler,), {"root": root})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
