"""A small Hub on the loopback interface: what huggingface_hub's client says to the real one, kept in memory.

    with HubServer() as hub:
        hub.tokens["hf_..."] = ("ann", "write")
        hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "7"})  # the next such request, once
        hub.requests  # every request: (method, path with query, authorization or None)

Faults: a status, `cut=n` (the connection is closed after n bytes of the body, sent or received), `slow=s` (seconds before
every 16 KB of a file), `deaf` (a commit is made, and the connection closed before the answer).
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep  # by name: tests take the client's pauses away
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".png", ".bin", ".zip", ".parquet", ".gif")


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha -> files
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def at(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class Fault:
    method: str
    pattern: str
    times: int
    status: int | None = None
    headers: dict = field(default_factory=dict)
    body: dict = field(default_factory=dict)
    cut: int | None = None
    slow: float = 0.0
    deaf: bool = False


class HubServer:
    def __init__(self):
        self.tokens: dict[str, tuple[str, str]] = {}  # token -> (user, role)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}  # what was uploaded, by sha256
        self.requests: list[tuple[str, str, str | None]] = []
        self.faults: list[Fault] = []
        self.sent = 0  # bytes of files
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # clients that hang up are part of the tests
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo: str, files: dict[str, bytes], kind: str = "model", private: bool = False, branch: str = "main") -> str:
        entry = self.repos.setdefault((kind, repo), Repo(private, {}))
        if "main" not in entry.branches:
            entry.commit({".gitattributes": b""})
        return entry.commit({".gitattributes": b"", **files}, branch)

    def files(self, repo: str, kind: str = "model") -> dict[str, bytes]:
        entry = self.repos[kind, repo]
        return {n: f for n, f in entry.commits[entry.branches["main"]].items() if n != ".gitattributes"}

    def fail(self, method: str, pattern: str, times: int = 1, **how) -> None:
        self.faults.append(Fault(method, pattern, times, **how))

    def asked(self, method: str, pattern: str) -> list[str]:
        return [path for m, path, _ in self.requests if m == method and re.search(pattern, path)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_):
        pass

    def answer(self) -> None:
        self.token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        url = urlsplit(self.path)
        self.parts, self.query = unquote(url.path), parse_qs(url.query)
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, self.headers.get("authorization")))
            self.fault = next((f for f in self.hub.faults if f.method == self.command and f.times
                               and re.search(f.pattern, self.path)), None)
            if self.fault:
                self.fault.times -= 1
        length = int(self.headers.get("content-length") or 0)
        if self.fault and self.fault.cut is not None and self.command in ("PUT", "POST"):
            self.rfile.read(min(self.fault.cut, length))
            return self.hang_up()
        if self.headers.get("transfer-encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = b""
            while len(self.body) < length:
                if self.fault and self.fault.slow:
                    sleep(self.fault.slow)
                part = self.rfile.read(min(2**14, length - len(self.body)))
                if not part:  # the client went away
                    return self.hang_up()
                self.body += part
        if self.fault and self.fault.status:
            return self.json(self.fault.body or {"error": "injected"}, self.fault.status, self.fault.headers)
        for method, pattern, action in ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, self.parts)):
                return action(self, **found.groupdict())
        self.json({"error": f"no route {self.parts}"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def json(self, value, status: int = 200, headers: dict | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def user(self) -> tuple[str, str] | None:
        return self.hub.tokens.get(self.token)

    def refuse(self) -> bool:
        """A bad token is told so, whatever it asks for."""
        if self.token and not self.user:
            self.json({"error": "Invalid credentials"}, 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
            return True
        return False

    def repo(self, kind: str, repo: str, write: bool = False) -> Repo | None:
        """The repository, or None after an answer that says no, as the Hub does: 401 to a stranger, 404 to a user."""
        if self.refuse():
            return None
        entry = self.hub.repos.get((kind, repo))
        mine = self.user and self.user[0] == repo.split("/")[0]
        if entry is None or entry.private and not mine:
            self.json({"error": "Repository not found"}, 404 if self.user else 401, {"X-Error-Code": "RepoNotFound"})
        elif write and (not mine or self.user[1] == "read"):
            self.json({"error": "no right to write"}, 403, {"X-Error-Message": "Forbidden: you need write access"})
        else:
            return entry

    # --- accounts and repositories -----------------------------------------------------------------------------------

    def whoami(self) -> None:
        if self.user is None:
            self.json({"error": "Invalid credentials in Authorization header"}, 401,
                      {"X-Error-Message": "Invalid credentials in Authorization header"})
        else:
            self.json({"type": "user", "name": self.user[0], "orgs": [],
                       "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": self.user[1]}}})

    def create(self) -> None:
        if self.refuse():
            return None
        asked = json.loads(self.body)
        kind, repo = asked.get("type") or "model", f"{asked.get('organization') or self.user[0]}/{asked['name']}"
        if self.user[1] == "read" or repo.split("/")[0] != self.user[0]:
            return self.json({"error": "You don't have the rights to create a model"}, 403)
        if (kind, repo) in self.hub.repos:
            return self.json({"error": "You already created this repo"}, 409)
        self.hub.repos[kind, repo] = entry = Repo(asked.get("visibility") == "private")
        entry.commit({".gitattributes": b""})
        self.json({"url": f"{self.hub.url}/{'datasets/' * (kind == 'dataset')}{repo}", "name": repo, "id": "1"})

    def settings(self, kind: str, repo: str) -> None:
        if entry := self.repo(kind, repo, write=True):
            asked = json.loads(self.body)
            entry.private = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
            self.json({"private": entry.private})

    def info(self, kind: str, repo: str, revision: str | None = None) -> None:
        if not (entry := self.repo(kind, repo)):
            return
        if not (sha := entry.at(revision or "main")):
            return self.json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": n} | (describe(f, n) if "blobs" in self.query else {})
                    for n, f in sorted(entry.commits[sha].items())]
        self.json({"id": repo, "modelId": repo, "sha": sha, "private": entry.private, "siblings": siblings, "tags": [],
                   "downloads": 0, "likes": 0})

    def tree(self, kind: str, repo: str, revision: str) -> None:
        if entry := self.repo(kind, repo):
            out = []
            for n, f in sorted(entry.commits[entry.at(revision)].items()):
                d = describe(f, n)
                out.append({"type": "file", "path": n, "size": len(f), "oid": d["blobId"]} | (
                    {"lfs": {"oid": d["lfs"]["sha256"], "size": len(f), "pointerSize": 134}} if "lfs" in d else {}))
            self.json(out)

    # --- uploads ---------------------------------------------------------------------------------------------------------

    def yaml(self) -> None:
        self.json({"errors": [], "warnings": []})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        if self.repo(kind, repo, write=True):
            self.json({"files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                                  "shouldIgnore": False, "oid": None} for f in json.loads(self.body)["files"]]})

    def batch(self, repo: str, kind: str | None = None) -> None:
        if self.repo("dataset" if kind else "model", repo, write=True):
            self.json({"transfer": "basic", "objects": [
                {"oid": o["oid"], "size": o["size"]} | ({} if o["oid"] in self.hub.large else {"actions": {
                    "upload": {"href": f"{self.hub.url}/large/{o['oid']}"}}})
                for o in json.loads(self.body)["objects"]]})

    def put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.large[oid] = self.body
        self.json({})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        if not (entry := self.repo(kind, repo, write=True)):
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, *rest = ((line["key"], line["value"]) for line in lines)
        parent, files = header[1].get("parentCommit"), dict(entry.commits[entry.at("main")])
        if parent and parent != entry.at("main"):
            return self.json({"error": "A commit has happened since"}, 412)
        for key, value in rest:
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = entry.commit(files)
        if self.fault and self.fault.deaf:
            return self.hang_up()
        self.json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    # --- downloads -----------------------------------------------------------------------------------------------------

    def resolve(self, repo: str, revision: str, path: str, kind: str | None = None) -> None:
        if not (entry := self.repo("dataset" if kind else "model", repo)):
            return
        data = entry.commits[entry.at(revision)].get(path)
        if data is None:
            return self.json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        d = describe(data, path)
        start = int(found[1]) if (found := re.match(r"bytes=(\d+)-", self.headers.get("range", ""))) else 0
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", entry.at(revision))
        self.send_header("ETag", f'"{d["lfs"]["sha256"] if "lfs" in d else d["blobId"]}"')
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(data) if not self.fault or self.fault.cut is None else start + self.fault.cut
        try:
            for at in range(start, min(end, len(data)), 2**14):
                if self.fault and self.fault.slow:
                    sleep(self.fault.slow)
                part = data[at:min(at + 2**14, end)]
                self.wfile.write(part)
                self.hub.sent += len(part)
        except OSError:  # the client has seen enough
            self.close_connection = True
            return
        if end < len(data):
            self.hang_up()


def describe(data: bytes, name: str) -> dict:
    out = {"size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if name.endswith(LARGE):
        out["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return out


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.yaml),
    ("PUT", rf"/api/(?P<kind>model|dataset)s/{REPO}/settings", Handler.settings),
    ("GET", rf"/api/(?P<kind>model|dataset)s/{REPO}", Handler.info),
    ("GET", rf"/api/(?P<kind>model|dataset)s/{REPO}/revision/(?P<revision>.+)", Handler.info),
    ("GET", rf"/api/(?P<kind>model|dataset)s/{REPO}/tree/(?P<revision>.+)", Handler.tree),
    ("POST", rf"/api/(?P<kind>model|dataset)s/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"/api/(?P<kind>model|dataset)s/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", rf"/(?P<kind>datasets/)?{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", Handler.put),
    *((m, rf"/(?P<kind>datasets/)?{REPO}/resolve/(?P<revision>[0-9a-f]{{40}}|main|refs/convert/parquet)/(?P<path>.+)",
       Handler.resolve) for m in ("GET", "HEAD")),
]
