"""A local stand-in for the Hub's HTTP API: repositories, downloads and uploads, regular and LFS, and faults."""

import contextlib
import http.server
import json
import re
import socket
import threading
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

from repositories import COMMIT, Refused, Repositories, is_lfs, oid, sha256

__all__ = ["COMMIT", "Repositories", "hub"]

API = "/api/(models|datasets)/([^/]+/[^/]+)"
ROUTES = {
    "whoami": "GET /api/whoami-v2",
    "info": f"GET {API}(?:/revision/([^/]+))?",
    "tree": f"GET {API}/tree/([^/]+)/?(.*)",
    "resolve": "GET /(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)",
    "object": "GET /objects/([0-9a-f]+)",
    "put": "PUT /objects/([0-9a-f]+)",
    "verify": "POST /verify",
    "validate": "POST /api/validate-yaml",
    "create": "POST /api/repos/create",
    "batch": r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch",
    "preupload": f"POST {API}/preupload/([^/]+)",
    "commit": f"POST {API}/commit/([^/]+)",
    "branch": f"POST {API}/branch/([^/]+)",
    "paths_info": f"POST {API}/paths-info/([^/]+)",
}


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Repositories

    def log_message(self, *args):
        pass

    def do_GET(self):
        url = urlparse(self.path)
        method = "GET" if self.command == "HEAD" else self.command
        found = ((name, re.fullmatch(route, f"{method} {url.path}")) for name, route in ROUTES.items())
        name, match = next(((name, match) for name, match in found if match), ("unknown", None))
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.faults[name].pop(0) if self.hub.faults.get(name) else None
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.query = parse_qs(url.query)
        groups = [unquote(group or "") for group in match.groups()] if match else []
        self.hub.requests.append(name)
        if fault == "cut":
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.body = self.rfile.read(length)
        try:
            if match is None:
                raise Refused(404, "EntryNotFound")
            if fault:
                raise Refused(fault, "")
            getattr(self, name)(*groups)
        except Refused as error:
            commit = {"X_Repo_Commit": error.commit} if hasattr(error, "commit") else {}
            self._reply(error.status, b"", X_Error_Code=error.code, X_Error_Message=str(error), **commit)

    do_HEAD = do_POST = do_PUT = do_GET

    def _reply(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value):
        self._reply(200, json.dumps(value).encode(), Content_Type="application/json")

    @property
    def _endpoint(self):
        return f"http://{self.headers['Host']}"

    def whoami(self):
        self._json({"type": "user", "name": self.hub.user(self.token)})

    def info(self, kind, name, revision):
        repository = self.hub.get(kind, name, self.token)
        files = [{"rfilename": path} for path in repository.files(revision or "main")]
        commit = repository.commit_at(revision or "main")
        self._json({"id": name, "sha": commit, "siblings": files, "tags": [], "private": repository.private})

    def tree(self, kind, name, revision, path):
        files = self.hub.get(kind, name, self.token).files(revision)
        if path:
            raise Refused(404, "EntryNotFound")
        self._json([_entry(path, body) for path, body in files.items()])

    def paths_info(self, kind, name, revision):
        files = self.hub.get(kind, name, self.token).files(revision)
        wanted = unquote(self.body.decode())
        self._json([_entry(path, body) for path, body in files.items() if path in wanted])

    def resolve(self, kind, name, revision, path):
        repository = self.hub.get(kind or "models", name, self.token)
        commit, body = repository.commit_at(revision), repository.files(revision).get(path)
        if body is None:
            error = Refused(404, "EntryNotFound")
            error.commit = commit
            raise error
        tag = f'"{oid(path, body)}"'
        if is_lfs(path):
            linked = {"X_Linked_ETag": tag, "X_Linked_Size": str(len(body)), "X_Repo_Commit": commit}
            storage = self._endpoint.replace("127.0.0.1", "localhost")  # on the Hub, too, it is another host
            return self._reply(302, Location=f"{storage}/objects/{sha256(body)}", **linked)
        self._reply(200, body, ETag=tag, X_Repo_Commit=commit)

    def object(self, digest):
        self._reply(200, self.hub.objects[digest], ETag=f'"{digest}"')

    def put(self, digest):
        assert sha256(self.body) == digest
        self.hub.objects[digest] = self.body
        self.hub.stored.append(digest)
        self._reply(200)

    def verify(self):
        wanted = json.loads(self.body)
        known = len(self.hub.objects.get(wanted["oid"], b"")) == wanted["size"]
        self._reply(200 if known else 404)

    def validate(self):
        self._json({"errors": [], "warnings": []})

    def create(self):
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or self.hub.user(self.token)}/{wanted['name']}"
        url = {"url": f"{self._endpoint}/{name}", "name": name}
        try:
            self.hub.create(self.token, name, wanted.get("visibility") == "private" or wanted.get("private", False))
        except Refused as error:
            if error.status != 409:
                raise
            return self._reply(409, json.dumps(url).encode(), Content_Type="application/json")
        self._json(url)

    def preupload(self, kind, name, revision):
        files = self.hub.get(kind, name, self.token).files(revision)
        found = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            entry = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
            found.append(entry | ({"oid": oid(path, files[path])} if path in files else {}))
        self._json({"files": found})

    def batch(self, name):
        self.hub.user(self.token)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self._endpoint}/objects/{wanted['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self._endpoint}/verify"}}
            objects.append(wanted | ({} if wanted["oid"] in self.hub.objects else {"actions": actions}))
        self._json({"transfer": "basic", "objects": objects})

    def commit(self, kind, name, revision):
        pull_request = "create_pr" in self.query
        commit, ref = self.hub.commit(self.token, name, revision, self.body, pull_request)
        discussion = f"{self._endpoint}/{name}/discussions/{ref.rpartition('/')[2]}" if pull_request else None
        url = f"{self._endpoint}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": discussion})

    def branch(self, kind, name, branch):
        self.hub.branch(self.token, name, branch)
        self._json({})


def _entry(path, body):
    entry = {"type": "file", "path": path, "size": len(body), "oid": oid(path, body)}
    return entry | ({"lfs": {"oid": sha256(body), "size": len(body), "pointerSize": 1}} if is_lfs(path) else {})


@contextlib.contextmanager
def hub(repositories: Path | Repositories):
    """Serve repositories, or a folder with ``models/OWNER/NAME`` and ``datasets/OWNER/NAME``; yields the endpoint."""
    known = repositories if isinstance(repositories, Repositories) else Repositories(repositories)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": known}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
