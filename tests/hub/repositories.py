"""The repositories behind the stand-in for the Hub: files by commit, refs, stored objects and rights, in memory."""

import base64
import hashlib
import json
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENS = {"hf_me": ("me", True), "hf_reader": ("me", False), "hf_you": ("you", True)}  # owner, may write


class Refused(Exception):
    """An answer other than 2xx: status, and the Hub's code for it."""

    def __init__(self, status: int, code: str, message: str = ""):
        super().__init__(message or code)
        self.status, self.code = status, code


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def oid(path: str, body: bytes) -> str:
    """As the Hub names a file's content: by SHA-256 in LFS, else by git's SHA-1."""
    return sha256(body) if is_lfs(path) else hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


class Repository:
    def __init__(self, files: dict[str, bytes], commit: str, private: bool = False):
        self.commits = {commit: files}
        self.refs = {"main": commit}
        self.private = private

    def commit_at(self, revision: str) -> str:
        found = self.refs.get(revision, revision)
        if found not in self.commits:
            raise Refused(404, "RevisionNotFound")
        return found

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits[self.commit_at(revision)]


class Repositories:
    """``root/models/OWNER/NAME`` and ``root/datasets/OWNER/NAME`` at one commit each, and what is pushed.

    ``faults[request]`` is a list of what happens to the next requests of that kind: a status, or ``"cut"``.
    ``requests`` lists the kinds of all requests, ``stored`` the SHA-256 of each file that was received for LFS,
    ``summaries`` the first lines of the commits.
    """

    def __init__(self, root: Path | None = None):
        self.root = root
        self.known: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.requests: list[str] = []
        self.stored: list[str] = []
        self.summaries: list[str] = []

    def get(self, kind: str, name: str, token: str | None = None) -> Repository:
        folder = self.root / kind / name if self.root else None
        if (kind, name) not in self.known and folder and folder.is_dir():
            files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            self.known[kind, name] = repository = Repository(files, COMMIT)
            repository.refs["v1"] = COMMIT
            self.objects |= {sha256(body): body for body in files.values()}
        found = self.known.get((kind, name))
        if found is None or (found.private and TOKENS.get(token or "", ("",))[0] != name.split("/")[0]):
            raise Refused(404 if token else 401, "RepoNotFound")
        return found

    def user(self, token: str | None) -> str:
        if token is None:
            raise Refused(401, "", "Invalid username or password.")
        if token not in TOKENS:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return TOKENS[token][0]

    def check_rights(self, token: str | None, owner: str) -> None:
        if self.user(token) != owner or not TOKENS[token][1]:
            raise Refused(403, "", f'You don\'t have the rights to write under the namespace "{owner}"')

    def create(self, token: str | None, name: str, private: bool) -> None:
        self.check_rights(token, name.split("/")[0])
        if ("models", name) in self.known:
            raise Refused(409, "", "You already created this model repo")
        self.known["models", name] = Repository(
            {".gitattributes": b""}, hashlib.sha1(name.encode()).hexdigest(), private
        )

    def branch(self, token: str | None, name: str, branch: str) -> None:
        self.check_rights(token, name.split("/")[0])
        repository = self.get("models", name, token)
        if branch in repository.refs:
            raise Refused(409, "", "Reference already exists")
        repository.refs[branch] = repository.refs["main"]

    def commit(self, token: str | None, name: str, revision: str, lines: bytes, pull_request: bool) -> tuple[str, str]:
        """The new commit, and the ref that it is at."""
        if not pull_request:
            self.check_rights(token, name.split("/")[0])
        repository = self.get("models", name, token)
        parent = repository.commit_at(revision)
        files = dict(repository.commits[parent])
        for line in map(json.loads, lines.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.summaries.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = hashlib.sha1(parent.encode() + lines).hexdigest()
        if pull_request:
            revision = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repository.refs)}"
        repository.commits[commit] = files
        repository.refs[revision] = commit
        return commit, revision
