"""The side of the loopback Hub that is written to.

    with UploadHub() as hub:
        hub.users["hf_me"] = User("me")
        hub.connect(monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", "hf_me")

Files go through git LFS: hf_xet has to be disabled, as `HubServer.connect` does. What is committed
is read through the routes of hub_server.
"""

import base64
import json
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from urllib.parse import parse_qs, urlsplit

import yaml
from support.hub_server import LFS_ENDINGS, REPO, HubServer, Model, Request, blob_id, route, sha256

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class User:
    """Whose token it is, what it allows, and what else it owns."""

    name: str
    role: str = "write"
    organizations: tuple[str, ...] = ()

    def may_write(self, repo: str) -> bool:
        return self.role == "write" and repo.split("/")[0] in (self.name, *self.organizations)


class UploadHub(HubServer):
    """A Hub that takes uploads.

    Attributes:
        users: Who is known, by token.
        stored: Files of LFS by their sha256.
        sent: Bytes of each upload to LFS so far, as (sha256, bytes), those that broke off too.
        cut_uploads: Files by their sha256 with a number of bytes: the connection is dropped there.
        refusals: Statuses to refuse with, by a part of the path.
        messages: The message of each commit so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[str, User] = {}
        self.stored: dict[str, bytes] = {}
        self.sent: list[tuple[str, int]] = []
        self.cut_uploads: dict[str, int] = {}
        self.refusals: dict[str, int] = {}
        self.messages: list[str] = []

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What is in a repository, without the file that the Hub itself puts there."""
        model = self.models[repo]
        content = model.commits[model.refs[revision]]
        return {path: data for path, data in content.items() if path != ".gitattributes"}

    def sent_bytes(self) -> dict[str, int]:
        """Bytes sent so far of each file of LFS, by its sha256."""
        totals: dict[str, int] = {}
        for oid, nbytes in self.sent:
            totals[oid] = totals.get(oid, 0) + nbytes
        return totals


def writes(method: str, pattern: str):
    """`route` for a request with a body, ``request.body``, of a known user, ``request.user``."""

    def register(answer: Callable[..., None]):
        @route(method, pattern)
        @wraps(answer)
        def checked(request: Request, **groups: str) -> None:
            hub = request.hub
            request.body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
            statuses = [status for part, status in hub.refusals.items() if part in request.path]
            if statuses:
                request.refuse(statuses[0], None, "refused as told")
            elif request.token not in hub.users:
                request.refuse(401, None, "Invalid credentials in Authorization header")
            else:
                request.user = hub.users[request.token]
                answer(request, **groups)

        return checked

    return register


def may_change(request: Request, repo: str) -> Model | None:
    """The repository, if it is there and the user may write to it or makes a pull request."""
    model = request.hub.models.get(repo)
    if model is None or (model.private and request.token not in request.hub.readers):
        request.refuse(404, "RepoNotFound", "Repository not found")
        return None
    if not request.user.may_write(repo) and not wants_pr(request):
        request.refuse(403, None, "You have read access but not the required permissions")
        return None
    return model


def wants_pr(request: Request) -> bool:
    return parse_qs(urlsplit(request.path).query).get("create_pr") == ["1"]


@writes("POST", "/api/repos/create")
def create(request: Request) -> None:
    wanted = json.loads(request.body)
    repo = f"{wanted.get('organization') or request.user.name}/{wanted['name']}"
    if not request.user.may_write(repo):
        request.refuse(403, None, "You don't have the rights to create a model here")
        return
    url = {"url": f"{request.hub.url}/{repo}"}
    if repo in request.hub.models:
        request.reply_json(url, status=409)
        return
    private = wanted.get("visibility") == "private"
    request.hub.commit(repo, {".gitattributes": GITATTRIBUTES}, private=private)
    request.reply_json(url)


@writes("POST", "/api/validate-yaml")
def validate(request: Request) -> None:
    block = re.match(r"---\n(.*?)\n---\n", json.loads(request.body)["content"], re.DOTALL)
    errors = [{"message": "no metadata"}] if block is None else metadata_errors(block[1])
    request.reply_json({"errors": errors, "warnings": []}, status=400 if errors else 200)


def metadata_errors(block: str) -> list[dict[str, str]]:
    try:
        fields = yaml.load(block, yaml.BaseLoader)  # noqa: S506 (all values are strings to it)
    except yaml.YAMLError:
        return [{"message": "not YAML"}]
    if fields.get("language") in ("true", "false"):
        return [{"message": '"language" must be a string'}]
    return []


@writes("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
def preupload(request: Request, repo: str, revision: str) -> None:
    model = may_change(request, repo)
    found = model and request.find(repo, revision)
    if not found:
        return
    present = model.commits[found[1]]
    answers = []
    for file in json.loads(request.body)["files"]:
        path, lfs = file["path"], file["path"].endswith(LFS_ENDINGS)
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if path in present:
            answer["oid"] = (sha256 if lfs else blob_id)(present[path])
        answers.append(answer)
    request.reply_json({"files": answers})


@writes("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def batch(request: Request, repo: str) -> None:
    asked = json.loads(request.body)
    # for a pull request the client leaves out the branch, and needs no right to write
    if "ref" in asked and may_change(request, repo) is None:
        return
    objects = []
    for wanted in asked["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in request.hub.stored:
            base = f"{request.hub.url}/lfs/{wanted['oid']}"
            links = {"upload": {"href": base}, "verify": {"href": f"{base}/verify"}}
            answer["actions"] = links
        objects.append(answer)
    request.reply_json({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def take(request: Request, oid: str) -> None:
    hub = request.hub
    length = int(request.headers["Content-Length"])
    data = request.rfile.read(min(length, hub.cut_uploads.get(oid, length)))
    hub.sent.append((oid, len(data)))
    if oid in hub.cut_uploads:
        request.connection.shutdown(socket.SHUT_RDWR)
        return
    assert sha256(data) == oid
    hub.stored[oid] = data
    request.reply(b"")


@writes("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify")
def verify(request: Request, oid: str) -> None:
    known = request.hub.stored.get(oid)
    whole = known is not None and len(known) == json.loads(request.body)["size"]
    request.reply_json({}, status=200 if whole else 404)


@writes("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)")
def commit(request: Request, repo: str, revision: str) -> None:
    model = may_change(request, repo)
    found = model and request.find(repo, revision)
    if not found:
        return
    files = dict(model.commits[found[1]])
    for line in request.body.splitlines():
        match json.loads(line):
            case {"key": "header", "value": value}:
                request.hub.messages.append(value["summary"])
            case {"key": "file", "value": value}:
                files[value["path"]] = base64.b64decode(value["content"])
            case {"key": "lfsFile", "value": value}:
                files[value["path"]] = request.hub.stored[value["oid"]]
            case {"key": "deletedFile", "value": value}:
                del files[value["path"]]
            case other:
                raise AssertionError(other)
    number = 1 + sum(ref.startswith("refs/pr/") for ref in model.refs)
    branch = f"refs/pr/{number}" if wants_pr(request) else revision
    oid = request.hub.commit(repo, files, branch=branch)
    page = f"{request.hub.url}/{repo}"
    pull = {"pullRequestUrl": f"{page}/discussions/{number}"} if wants_pr(request) else {}
    request.reply_json({"commitOid": oid, "commitUrl": f"{page}/commit/{oid}"} | pull)


@writes("GET", f"/api/models/{REPO}/refs")
def refs(request: Request, repo: str) -> None:
    model = request.hub.models[repo]
    kinds: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
    for name, oid in model.refs.items():
        if not name.startswith("refs/"):
            kind = "tags" if name.startswith("tag-") else "branches"
            kinds[kind].append({"name": name, "ref": name, "targetCommit": oid})
    request.reply_json(kinds)


@writes("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)")
def make_branch(request: Request, repo: str, branch: str) -> None:
    model = may_change(request, repo)
    if model is None:
        return
    if branch in model.refs:
        request.refuse(409, None, "Reference already exists")
        return
    model.refs[branch] = model.refs["main"]
    request.reply_json({})
