"""A Hub on the loopback interface, for tests that drive the real huggingface_hub client.

    with HubServer() as hub:
        commit = hub.commit("me/model", {"config.json": b"{}"})
        hub.connect(monkeypatch, tmp_path)

A new process is connected by its environment: see `HubServer.environment`. Requests are answered
by functions that `route` registers; another module can register more.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
LFS_ENDINGS = (".safetensors", ".bin", ".gguf", ".pth")

ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = []


def route(method: str, pattern: str):
    """Register a function to answer a method on paths that match the whole pattern.

    It is called with the request and the pattern's named groups, percent signs decoded.
    """

    def register(answer):
        ROUTES.append((method, re.compile(pattern), answer))
        return answer

    return register


def lead_client(monkeypatch: pytest.MonkeyPatch, url: str, home: Path) -> None:
    """Lead this process's client to a `HubServer`."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    replacements = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / "harnesses.json"),
    }
    for name, value in replacements.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)


@dataclass
class Model:
    """One repository: its commits, and the branches and tags that point to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False


class HubServer:
    """A server with models, open from `with` to its end.

    Attributes:
        url: What HF_ENDPOINT must be.
        models: The repositories by id.
        readers: Tokens that may read private and gated repositories.
        status: A status to refuse every request with, if it is set.
        cut: Files by name with a number of bytes: no answer gets past that byte of the file,
            the connection is dropped there.
        on_download: Called with the name of each file whose content is asked for, before it is
            sent; not where a closed range of it is.
        on_range: Called with the name of each file of which a closed range is asked for, before
            that is sent.
        redirects: Whether closed ranges are answered at another address.
        knows_ranges: Whether a closed range is answered with that range, not with the whole file.
        requests: Every request so far, as (method, path); a closed range follows a question mark.
    """

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.readers: set[str] = set()
        self.status: int | None = None
        self.cut: dict[str, int] = {}
        self.on_download: Callable[[str], None] = lambda _name: None
        self.on_range: Callable[[str], None] = lambda _name: None
        self.redirects = False
        self.knows_ranges = True
        self.requests: list[tuple[str, str]] = []
        self._server = _Server(("127.0.0.1", 0), Request)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The variables that lead a new process's client here."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def connect(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Lead this process's client here; it has read its environment long ago."""
        lead_client(monkeypatch, self.url, home)

    def commit(
        self, repo_id: str, files: Mapping[str, bytes], *, branch: str = "main", **flags: bool
    ) -> str:
        """Put files on a branch, in place of those it had; return the commit's hash."""
        model = self.models.setdefault(repo_id, Model(**flags))
        content = json.dumps([repo_id, len(model.commits), sorted(files)])
        commit = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
        model.commits[commit] = dict(files)
        model.refs[branch] = commit
        return commit

    def downloads(self) -> list[str]:
        """The files whose content was asked for, in the order of their names."""
        return sorted(self.downloads_in_order())

    def downloads_in_order(self) -> list[str]:
        """The files whose content was asked for, first to last; closed ranges do not count."""
        paths = (path for method, path in self.requests if method == "GET")
        found = (re.fullmatch(r".*/resolve/[^/]+/([^?]*)", path) for path in paths)
        return [unquote(match[1]) for match in found if match]

    def looked_into(self) -> list[str]:
        """The files of which a closed range was asked for, in the order of their names."""
        found = (re.search(r"/resolve/[^/]+/(.*)[?]bytes=", path) for _, path in self.requests)
        return sorted({unquote(match[1]) for match in found if match})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: HubServer

    def handle_error(self, request, client_address) -> None:
        """Clients may go away in the middle of an answer; that is no failure of the server."""


class Request(BaseHTTPRequestHandler):
    """One request, which answers itself."""

    server: _Server

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    @property
    def closed_range(self) -> tuple[int, int] | None:
        """The first byte that is asked for, and the one behind the last."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return (int(match[1]), int(match[2]) + 1) if match else None

    def dispatch(self) -> None:
        path = urlsplit(self.path).path
        closed = f"?{self.headers['Range']}" if self.closed_range else ""
        self.hub.requests.append((self.command, path + closed))
        if self.hub.status:
            self.refuse(self.hub.status, None, "as told")
            return
        for method, pattern, answer in ROUTES:
            match = pattern.fullmatch(path)
            if match and method == self.command:
                groups = {key: unquote(text) for key, text in match.groupdict().items() if text}
                answer(self, **groups)
                return
        self.refuse(404, None, "not found")

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def log_message(self, format, *args) -> None:  # noqa: A002
        """Stay silent."""

    def reply(
        self,
        body: bytes,
        *,
        status: int = 200,
        headers: Mapping[str, str] = {},
        drop_at: int | None = None,
    ) -> None:
        """Answer, and drop the connection after ``drop_at`` bytes of the body if it is given."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:drop_at])

    def reply_json(self, content: object, *, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.reply(body, status=status, headers={"Content-Type": "application/json"})

    def refuse(self, status: int, code: str | None, message: str) -> None:
        """Answer with an error as the Hub does: the reason is in headers."""
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply(json.dumps({"error": message}).encode(), status=status, headers=headers)

    def find(self, repo: str, revision: str) -> tuple[Model, str] | None:
        """The model and the commit; None after a refusal, if there are none for this client."""
        model = self.hub.models.get(repo)
        if model is None or (model.private and self.token not in self.hub.readers):
            self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
            return None
        commit = model.refs.get(revision, revision)
        if commit not in model.commits:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return model, commit


@route("GET", f"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?")
def model_info(request: Request, repo: str, revision: str = "main") -> None:
    if found := request.find(repo, revision):
        model, commit = found
        siblings = [{"rfilename": path} for path in model.commits[commit]]
        info = {"id": repo, "sha": commit, "private": model.private, "siblings": siblings}
        request.reply_json(info)


@route("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)")
def tree(request: Request, repo: str, revision: str) -> None:
    if found := request.find(repo, revision):
        model, commit = found
        request.reply_json([_tree_entry(*file) for file in model.commits[commit].items()])


def _tree_entry(path: str, content: bytes) -> dict[str, object]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if path.endswith(LFS_ENDINGS):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return entry


@route("GET", f"/elsewhere/{REPO}/(?P<revision>[^/]+)/(?P<path>.+)")
def elsewhere(request: Request, repo: str, revision: str, path: str) -> None:
    resolve(request, repo, revision, path, sent_on=True)


@route("HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
@route("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(
    request: Request, repo: str, revision: str, path: str, *, sent_on: bool = False
) -> None:
    found = request.find(repo, revision)
    if found is None:
        return
    model, commit = found
    if model.gated and request.token not in request.hub.readers:
        request.refuse(403 if request.token else 401, "GatedRepo", f"Access to {repo} is gated")
        return
    if request.hub.redirects and request.closed_range and not sent_on:
        request.reply(b"", status=302, headers={"Location": f"/elsewhere/{repo}/{revision}/{path}"})
        return
    if request.command == "GET":
        (request.hub.on_range if request.closed_range else request.hub.on_download)(path)
    content = model.commits[commit].get(path)
    if content is None:
        request.refuse(404, "EntryNotFound", "Entry not found")
        return
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    if path.endswith(LFS_ENDINGS):
        headers |= {"ETag": f'"{sha256(content)}"', "X-Linked-Etag": f'"{sha256(content)}"'}
        headers |= {"X-Linked-Size": str(len(content))}
    else:
        headers |= {"ETag": f'"{blob_id(content)}"'}
    start, stop, status = 0, len(content), 200
    if match := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
        start, status = int(match[1]), 206
    elif request.closed_range and request.hub.knows_ranges:
        (start, end), status = request.closed_range, 206
        stop = min(end, stop)
    if status == 206:
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
    cut = request.hub.cut.get(path)
    drop_at = None if cut is None else max(cut - start, 0)
    request.reply(content[start:stop], status=status, headers=headers, drop_at=drop_at)


def sha256(content: bytes) -> str:
    """What names a file in LFS."""
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    """What names a file in git."""
    head = b"blob %d\0" % len(content)
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()
