"""Stand in for the Hugging Face Hub, over local HTTP.

    with hub.running() as stand_in:
        stand_in.fail("POST .*/commit/", 503, times=2)
        subprocess.run(..., env=os.environ | stand_in.environment(home))

It has the endpoints that huggingface_hub 2.4 uses to publish and to download. Repositories live in
memory, with their commits, branches, tags and large files. Private ones are shown only to those who
may see them. `fail` makes requests fail as the Hub and networks do. `environment` switches off the
client's other road for large files, Xet, as a user may do: the regular one is spoken here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.waiting import HANGS

LARGE = (".safetensors", ".bin", ".gguf")
Cut = Literal["before", "after", "silent"]

WRITER, READER, FINE, FINE_ELSEWHERE = (
    "hf_planted_writer",
    "hf_planted_reader",
    "hf_planted_fine",
    "hf_planted_elsewhere",
)


def _account(token: dict[str, Any]) -> dict[str, Any]:
    orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "watched", "roleInOrg": "read"}]
    return {
        "type": "user",
        "name": "me",
        "orgs": orgs,
        "auth": {"type": "access_token", "accessToken": token},
    }


def _fine(entity: str) -> dict[str, Any]:
    scope = {
        "entity": {"type": "user", "name": entity},
        "permissions": ["repo.content.read", "repo.write"],
    }
    return _account(
        {"displayName": "fine", "role": "fineGrained", "fineGrained": {"scoped": [scope]}}
    )


ACCOUNTS = {
    WRITER: _account({"displayName": "writer", "role": "write"}),
    READER: _account({"displayName": "reader", "role": "read"}),
    FINE: _fine("me"),
    FINE_ELSEWHERE: _fine("somebody-else"),
}
"""The answer of whoami to each token."""


@dataclass(frozen=True)
class Commit:
    """Hold a state of a repository, and the commit that made it."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """Hold a repository: commits of all branches, oldest first, and its branches and tags."""

    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        digest = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits.append(Commit(digest, message, files))
        self.branches[branch] = digest
        return self.commits[-1]

    def pushed(self, branch: str = "main") -> list[Commit]:
        """Return the commits that somebody pushed to a branch, without the one that made it."""
        return [commit for commit in self.commits if commit.message.startswith(f"{branch}: ")]

    @property
    def files(self) -> dict[str, bytes]:
        """Return the files of main."""
        head = self.at("main")
        return head.files if head else {}


@dataclass
class Fault:
    """Describe what happens to the next `times` requests whose `METHOD /path` matches."""

    match: str
    what: int | Cut | float | threading.Event
    times: int
    headers: dict[str, str]


class Hub:
    """Hold the stand-in's state, and its switches."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.settled: list[str] = []
        """Requests that were carried out or refused, whether or not anybody still waited for the
        answer."""
        self._faults: list[Fault] = []
        self.lock = threading.RLock()

    def fail(
        self,
        match: str,
        what: int | Cut | float | threading.Event,
        times: int = 10**6,
        **headers: str,
    ) -> None:
        """Let matching requests fail.

        A number is the status of the answer. A word cuts the connection before or after the work,
        or falls silent after it. A float delays the work by that many seconds, an event until it is
        set.
        """
        self._faults.append(
            Fault(
                match,
                what,
                times,
                {name.replace("_", "-"): value for name, value in headers.items()},
            )
        )

    def heal(self) -> None:
        """End all faults."""
        self._faults.clear()

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for one in self._faults:
                if one.times > 0 and re.search(one.match, request):
                    one.times -= 1
                    return one
        return None

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """Add a repository that is there already."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", "initial commit", files)
        return repo

    def count(self, match: str) -> int:
        """Return the number of requests that matched."""
        return sum(bool(re.search(match, request)) for request in self.requests)

    def environment(self, home: Path) -> dict[str, str]:
        """Return variables that make a process take this for the Hub, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_TOKEN": WRITER,
        }


@contextmanager
def running() -> Iterator[Hub]:
    """Run a stand-in on a free local port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


class _Refused(Exception):
    """Raise an answer other than success: status, and the Hub's own code and message."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return None

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path, body = parts.path, self._body()
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = self.hub.fault(request)
        if fault is not None and isinstance(fault.what, float):
            time.sleep(fault.what)
            fault = None
        if fault is not None and isinstance(fault.what, threading.Event):
            fault.what.wait(HANGS)
            fault = None
        if fault is not None and isinstance(fault.what, int):
            self._answer(fault.what, {"error": "as the test wants it"}, fault.headers)
            return
        if fault is not None and fault.what == "before":
            self._cut()
            return
        try:
            with self.hub.lock:
                found = self._route(path, parse_qs(parts.query), body)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            found = (
                refused.status,
                {"error": refused.message},
                {k: v for k, v in headers.items() if v},
            )
        self.hub.settled.append(request)
        if fault is not None and fault.what == "silent":
            with suppress(ConnectionError):
                self.connection.recv(1)  # until the client gives up
        if fault is not None:
            self._cut()
            return
        with suppress(ConnectionError):  # whoever asked may have given up
            self._answer(*found)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(
        self, status: int, content: Any = None, headers: dict[str, str] | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[Any, ...]:
        for method, pattern, action in _ROUTES:
            if self.command in method.split("|") and (match := re.fullmatch(pattern, path)):
                return action(
                    self, *(unquote(part or "") for part in match.groups()), body=body, query=query
                )
        raise _Refused(404, message=f"no such endpoint here: {self.command} {path}")

    def _token(self) -> str | None:
        """Return the token of a request, if it has one.

        A token that nobody was given is refused.
        """
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in ACCOUNTS:
            raise _Refused(401, message="Invalid credentials in Authorization header")
        return given or None

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        token, repo = self._token(), self.hub.repos.get(repo_id)
        if repo is None or (repo.private and token is None):
            raise _Refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if write and (token is None or token == READER):
            raise _Refused(403, message="you must use a write token")
        return repo

    def _revision(self, repo_id: str, revision: str) -> Commit:
        commit = self._repo(repo_id).at(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def whoami(self, **_: Any) -> tuple[Any, ...]:
        token = self._token()
        if token is None:
            raise _Refused(401, message="Invalid username or password.")
        return 200, ACCOUNTS[token]

    def create(self, body: bytes, **_: Any) -> tuple[Any, ...]:
        wanted, token = json.loads(body), self._token()
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if token in (None, READER) or repo_id.split("/")[0] not in ("me", "team"):
            raise _Refused(
                403, message="You don't have the rights to create a model under this namespace"
            )
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            return 409, answer | {"error": "You already created this model repo"}
        self.hub.add(
            repo_id,
            {".gitattributes": b"*.safetensors filter=lfs\n"},
            wanted.get("visibility") == "private",
        )
        return 200, answer

    def info(self, repo_id: str, revision: str, **_: Any) -> tuple[Any, ...]:
        commit, repo = self._revision(repo_id, revision or "main"), self._repo(repo_id)
        card = _front_matter(commit.files.get("README.md", b"").decode())
        files = [{"rfilename": path} for path in sorted(commit.files)]
        return 200, {
            "id": repo_id,
            "sha": commit.oid,
            "private": repo.private,
            "siblings": files,
            "cardData": card,
        }

    def tree(self, repo_id: str, revision: str, **_: Any) -> tuple[Any, ...]:
        files = self._revision(repo_id, revision).files
        return 200, [
            {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
            for path, data in files.items()
        ]

    def preupload(self, repo_id: str, revision: str, body: bytes, **_: Any) -> tuple[Any, ...]:
        self._repo(repo_id, write=True)
        held = self._revision(repo_id, revision).files
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            large = path.endswith(LARGE) or file["size"] > 10 * 2**20
            oid = None
            if path in held:
                oid = _sha256(held[path]) if large else _git(held[path])
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}

    def batch(self, repo_id: str, body: bytes, **_: Any) -> tuple[Any, ...]:
        self._repo(repo_id, write=True)
        objects = []
        for one in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/storage/{one['oid']}"}}
            verify = {"verify": {"href": f"{self.hub.endpoint}/{repo_id}/verify"}}
            objects.append(
                one if one["oid"] in self.hub.large else one | {"actions": upload | verify}
            )
        return 200, {"transfer": "basic", "objects": objects}

    def upload(self, oid: str, body: bytes, **_: Any) -> tuple[Any, ...]:
        if _sha256(body) != oid:
            raise _Refused(400, message="another content than was announced")
        self.hub.large[oid] = body
        return 200, {}, {"ETag": oid}

    def verify(self, repo_id: str, body: bytes, **_: Any) -> tuple[Any, ...]:
        wanted = json.loads(body)
        if len(self.hub.large.get(wanted["oid"], b"")) != wanted["size"]:
            raise _Refused(404, message="not uploaded")
        return 200, {}

    def commit(self, repo_id: str, branch: str, body: bytes, **_: Any) -> tuple[Any, ...]:
        repo = self._repo(repo_id, write=True)
        files, message = dict(self._revision(repo_id, branch).files), ""
        for line in body.decode().splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
                    raise _Refused(
                        412, message="A commit has happened since. Please refresh and try again."
                    )
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise _Refused(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                raise _Refused(400, message=f"unknown operation {key}")
        made = repo.commit(branch, f"{branch}: {message}", files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{made.oid}"
        return 200, {"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""}

    def branch(self, repo_id: str, name: str, **_: Any) -> tuple[Any, ...]:
        repo = self._repo(repo_id, write=True)
        if name in repo.branches:
            raise _Refused(409, message="Reference already exists")
        repo.branches[name] = repo.branches["main"]
        return 200, {}

    def tag(self, repo_id: str, revision: str, body: bytes, **_: Any) -> tuple[Any, ...]:
        repo, name = self._repo(repo_id, write=True), json.loads(body)["tag"]
        if name in repo.tags:
            raise _Refused(409, message="Tag reference exists already")
        repo.tags[name] = self._revision(repo_id, revision).oid
        return 200, {}

    def untag(self, repo_id: str, name: str, **_: Any) -> tuple[Any, ...]:
        if self._repo(repo_id, write=True).tags.pop(name, None) is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return 200, {}

    def refs(self, repo_id: str, **_: Any) -> tuple[Any, ...]:
        repo = self._repo(repo_id)

        def listed(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [
                {"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid}
                for n, oid in refs.items()
            ]

        return 200, {
            "branches": listed("heads", repo.branches),
            "converts": [],
            "tags": listed("tags", repo.tags),
        }

    def validate(self, body: bytes, **_: Any) -> tuple[Any, ...]:
        card = _front_matter(json.loads(body)["content"])
        for name, kind in (
            ("base_model", str),
            ("license", str),
            ("tags", list),
            ("model-index", list),
        ):
            if name in card and not isinstance(card[name], kind):
                return 400, {
                    "errors": [{"message": f'"{name}" must be a {kind.__name__}'}],
                    "warnings": [],
                }
        return 200, {"errors": [], "warnings": []}

    def resolve(self, repo_id: str, revision: str, path: str, **_: Any) -> tuple[Any, ...]:
        commit = self._revision(repo_id, revision)
        if path not in commit.files:
            raise _Refused(404, "EntryNotFound", f"{path} does not exist")
        data = commit.files[path]
        return 200, data, {"ETag": f'"{_git(data)}"', "X-Repo-Commit": commit.oid}


_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/(?:models|datasets)/{_ID}(?:/revision/([^/]+))?", _Handler.info),
    ("GET", f"/api/(?:models|datasets)/{_ID}/tree/([^/]+)", _Handler.tree),
    ("GET", f"/api/(?:models|datasets)/{_ID}/refs", _Handler.refs),
    ("POST", f"/api/(?:models|datasets)/{_ID}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/api/(?:models|datasets)/{_ID}/commit/([^/]+)", _Handler.commit),
    ("POST", f"/api/(?:models|datasets)/{_ID}/branch/([^/]+)", _Handler.branch),
    ("POST", f"/api/(?:models|datasets)/{_ID}/tag/([^/]+)", _Handler.tag),
    ("DELETE", f"/api/(?:models|datasets)/{_ID}/tag/([^/]+)", _Handler.untag),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/storage/([0-9a-f]{64})", _Handler.upload),
    ("POST", f"/{_ID}/verify", _Handler.verify),
    ("GET|HEAD", f"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


def _front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    content = yaml.safe_load(found.group(1)) if found else {}
    return content if isinstance(content, dict) else {}


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
