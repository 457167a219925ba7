"""A small Hub on loopback, so that tests push and load with the real clients and nothing leaves the machine.

    python tests/hub_stand_in.py --root DIR [--port 0]      prints its URL and the token that may write

One user, `tester`, may write to `tester/...` and `org/...`. Under `root`, `objects/` holds every file's content by its
sha256 and `repos/` one JSON a repo, with its refs and commits, each commit a full listing of its files. No pagination,
pull requests or Xet: clients need the variables that it prints (`CLIENT_SETTINGS`) before they import huggingface_hub.
"""

import argparse
import base64
import hashlib
import json
import re
import threading
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_stand_in"
USER, ORGANIZATIONS = "tester", ("org",)
LFS_SUFFIXES = (".parquet", ".arrow", ".safetensors", ".bin", ".pt", ".mp4", ".npy", ".zip", ".gz")
LFS_MIN_BYTES = 10_000_000  # larger files are LFS whatever their name, as on the Hub
POINTER_BYTES = 134
CLIENT_SETTINGS = {"HF_HUB_DISABLE_XET": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


class HubError(Exception):
    """An answer other than 2xx; `code` becomes the `X-Error-Code` header that the clients go by."""

    def __init__(self, status, message, code=None, headers=None, body=None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}
        self.body = {"error": message, **(body or {})}


class Reply(NamedTuple):
    """An answer: `body` is JSON-encoded unless it is the `Path` of a file to send."""

    body: object
    status: int = 200
    headers: dict | None = None


def _git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _now():
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Storage:
    """Repos and file contents under `root`. Not thread-safe: the server holds one lock around every call."""

    def __init__(self, root):
        self.objects, self.repos = Path(root) / "objects", Path(root) / "repos"
        self.objects.mkdir(parents=True, exist_ok=True)
        self.repos.mkdir(parents=True, exist_ok=True)

    def file(self, kind, repo_id):
        return self.repos / kind / f"{repo_id.replace('/', '--')}.json"

    def read(self, kind, repo_id):
        """The repo, `None` if there is none."""
        file = self.file(kind, repo_id)
        return json.loads(file.read_text()) if file.is_file() else None

    def write(self, repo):
        file = self.file(repo["kind"], repo["id"])
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(repo))

    def put(self, content):
        """Store bytes; returns the file's entry: git blob id, size and sha256."""
        sha256 = hashlib.sha256(content).hexdigest()
        (self.objects / sha256).write_bytes(content)
        return {"oid": _git_oid(content), "size": len(content), "sha256": sha256, "lfs": False}

    def lfs_entry(self, sha256):
        """Entry of an uploaded LFS object; its git blob is the pointer file."""
        if not (self.objects / sha256).is_file():
            raise HubError(400, f"LFS object {sha256} was never uploaded")
        size = (self.objects / sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return {"oid": _git_oid(pointer), "size": size, "sha256": sha256, "lfs": True}

    def commit(self, repo, branch, title, message, files):
        """Append a commit of `files` (`{path: entry}`) to a branch; returns its id."""
        parent = repo["branches"].get(branch)
        content = [repo["kind"], repo["id"], parent, title, len(repo["commits"]), files]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        repo["commits"][sha] = {"title": title, "message": message, "date": _now(), "parent": parent, "files": files}
        repo["branches"][branch] = sha
        self.write(repo)
        return sha


def _entry_json(path, entry):
    """A file as `tree` and `paths-info` state it."""
    stated = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]}
    if entry["lfs"]:
        stated["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": POINTER_BYTES}
    return stated


def _folder_json(path):
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


def _folders(files):
    return {str(parent) for path in files for parent in Path(path).parents if str(parent) != "."}


class Hub:
    """What the Hub answers: one method a route, called with the request and the named groups of its pattern."""

    def __init__(self, root):
        self.storage = Storage(root)

    # Lookups

    def _repo(self, kind, id, request):
        repo = self.storage.read(kind, id)
        if repo is None:
            raise HubError(404, f"No {kind[:-1]} is called {id}", "RepoNotFound")
        if repo["private"] and not request.authorized:
            raise HubError(401, f"{id} is private: a token is needed", "RepoNotFound")
        return repo

    def _commit(self, repo, rev):
        name = unquote(rev).removeprefix("refs/heads/").removeprefix("refs/tags/")
        sha = repo["branches"].get(name) or repo["tags"].get(name) or name
        if sha not in repo["commits"]:
            raise HubError(404, f"{repo['id']} has no revision {name}", "RevisionNotFound")
        return sha, repo["commits"][sha]

    # Account and repos

    def whoami(self, request):
        orgs, auth = [{"name": name} for name in ORGANIZATIONS], {"accessToken": {"role": "write"}}
        return {"type": "user", "name": USER, "orgs": orgs, "auth": auth}

    def _asked_repo(self, request):
        asked = request.json()
        return asked, asked.get("type", "model") + "s", f"{asked.get('organization') or USER}/{asked['name']}"

    def create_repo(self, request):
        asked, kind, id = self._asked_repo(request)
        url = f"{request.server.url}/{'' if kind == 'models' else kind + '/'}{id}"
        if id.split("/")[0] not in (USER, *ORGANIZATIONS):
            raise HubError(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {id}")
        if self.storage.read(kind, id) is not None:
            raise HubError(409, f"You already created this {kind[:-1]} repo", body={"url": url})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = {"kind": kind, "id": id, "private": private, "sdk": asked.get("sdk"), "createdAt": _now()}
        repo |= {"branches": {}, "tags": {}, "commits": {}}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.storage.commit(
            repo, "main", "initial commit", "", {".gitattributes": self.storage.put(attributes.encode())}
        )
        return {"url": url, "name": id}

    def delete_repo(self, request):
        _, kind, id = self._asked_repo(request)
        self._repo(kind, id, request)
        self.storage.file(kind, id).unlink()
        return {}

    def repo_info(self, request, kind, id, rev="main"):
        repo = self._repo(kind, id, request)
        sha, commit = self._commit(repo, rev)
        siblings = []
        for path, entry in sorted(commit["files"].items()):
            sibling = {"rfilename": path}
            if "blobs" in request.query:
                lfs = {"sha256": entry["sha256"], "size": entry["size"], "pointerSize": POINTER_BYTES}
                sibling |= {"size": entry["size"], "blobId": entry["oid"]} | ({"lfs": lfs} if entry["lfs"] else {})
            siblings.append(sibling)
        info = {"_id": hashlib.sha1(id.encode()).hexdigest()[:24], "id": id, "author": id.split("/")[0], "sha": sha}
        info |= {"private": repo["private"], "gated": False, "disabled": False, "tags": [], "siblings": siblings}
        info |= {"createdAt": repo["createdAt"], "lastModified": commit["date"], "downloads": 0, "likes": 0}
        return info | ({"sdk": repo["sdk"]} if kind == "spaces" else {})

    # Uploads

    def validate_yaml(self, request):
        """Front matter must be YAML, and a Space's needs its `sdk`. The Hub checks more."""
        asked = request.json()
        matter = re.match(r"---\r?\n(.*?)\r?\n---", asked["content"], re.DOTALL)
        if matter is None:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            metadata, problem = yaml.safe_load(matter[1]), None
        except yaml.YAMLError as error:
            metadata, problem = None, " ".join(str(error).split())
        if problem is None and asked.get("repoType") == "space" and "sdk" not in metadata:
            problem = '"sdk" is required'
        if problem:
            raise HubError(400, problem, body={"errors": [{"message": problem}], "warnings": []})
        return {"errors": [], "warnings": []}

    def preupload(self, request, kind, id, rev):
        repo = self._repo(kind, id, request)
        files, modes = self._commit(repo, rev)[1]["files"], []
        for file in request.json()["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] >= LFS_MIN_BYTES
            mode = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in files:
                known = files[file["path"]]
                mode["oid"] = known["sha256"] if known["lfs"] else known["oid"]
            modes.append(mode)
        return {"files": modes}

    def lfs_batch(self, request, id, kind="models"):
        self._repo(kind, id, request)
        objects = []
        for item in request.json()["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not (self.storage.objects / item["oid"]).is_file():
                href = f"{request.server.url}/objects/{item['oid']}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, f"the content's sha256 is not {oid}")
        self.storage.put(request.body)
        return {}

    def commit(self, request, kind, id, rev):
        repo, branch = self._repo(kind, id, request), unquote(rev)
        parent, parent_commit = self._commit(repo, rev)
        if branch not in repo["branches"]:
            raise HubError(400, f"{branch} is no branch")
        files, header = dict(parent_commit["files"]), {"summary": "", "description": ""}
        for line in request.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
                if not parent.startswith(value.get("parentCommit") or parent):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = self.storage.put(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = self.storage.lfs_entry(value["oid"])
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            elif key == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: entry for path, entry in files.items() if not path.startswith(folder)}
            else:
                raise HubError(400, f"unknown operation {key}")
        sha = self.storage.commit(repo, branch, header["summary"], header.get("description", ""), files)
        prefix = "" if kind == "models" else f"{kind}/"
        return {"success": True, "commitOid": sha, "commitUrl": f"{request.server.url}/{prefix}{id}/commit/{sha}"}

    # Reading

    def tree(self, request, kind, id, rev, path=""):
        repo = self._repo(kind, id, request)
        sha, commit = self._commit(repo, rev)
        path = unquote(path).strip("/")
        inside = f"{path}/" if path else ""
        files = {name: entry for name, entry in commit["files"].items() if name.startswith(inside)}
        if path and not files:
            raise HubError(404, f"{id} has no {path}", "EntryNotFound", {"X-Repo-Commit": sha})
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        listed = [_folder_json(name) for name in _folders(files) if name.startswith(inside)]
        listed += [_entry_json(name, entry) for name, entry in files.items()]
        listed = [item for item in listed if recursive or "/" not in item["path"].removeprefix(inside)]
        last = {"id": sha, "title": commit["title"], "date": commit["date"]}
        return [item | {"lastCommit": last} for item in sorted(listed, key=lambda item: item["path"])]

    def paths_info(self, request, kind, id, rev):
        files = self._commit(self._repo(kind, id, request), rev)[1]["files"]
        asked = parse_qs(request.body.decode())["paths"]
        folders = _folders(files)
        known = [_entry_json(path, files[path]) for path in asked if path in files]
        return known + [_folder_json(path) for path in asked if path in folders]

    def refs(self, request, kind, id):
        repo = self._repo(kind, id, request)

        def listed(refs, kind):
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]

        branches, tags = listed(repo["branches"], "heads"), listed(repo["tags"], "tags")
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def commits(self, request, kind, id, rev):
        repo = self._repo(kind, id, request)
        sha, listed = self._commit(repo, rev)[0], []
        while sha is not None:
            commit = repo["commits"][sha]
            stated = {name: commit[name] for name in ("title", "message", "date")}
            listed.append({"id": sha, "authors": [{"user": USER}], **stated})
            sha = commit["parent"]
        return listed

    def create_ref(self, request, kind, id, ref, rev):
        """POST branch/<name> {startingPoint} or tag/<revision> {tag}."""
        repo, asked = self._repo(kind, id, request), request.json() or {}
        name, start = (unquote(rev), asked.get("startingPoint", "main")) if ref == "branch" else (asked["tag"], rev)
        refs = repo["branches" if ref == "branch" else "tags"]
        if name in refs:
            raise HubError(409, f"Reference {name} already exists")
        refs[name] = self._commit(repo, start)[0]
        self.storage.write(repo)
        return {}

    def delete_ref(self, request, kind, id, ref, rev):
        repo = self._repo(kind, id, request)
        if repo["branches" if ref == "branch" else "tags"].pop(unquote(rev), None) is None:
            raise HubError(404, f"{id} has no {ref} {unquote(rev)}", "RevisionNotFound")
        self.storage.write(repo)
        return {}

    def resolve(self, request, id, rev, path, kind="models"):
        repo = self._repo(kind, id, request)
        sha, commit = self._commit(repo, rev)
        path = unquote(path)
        if path not in commit["files"]:
            raise HubError(404, f"{id} has no {path}", "EntryNotFound", {"X-Repo-Commit": sha})
        entry = commit["files"][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["sha256" if entry["lfs"] else "oid"]}"'}
        if entry["lfs"]:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(entry["size"])}
        return Reply(self.storage.objects / entry["sha256"], headers=headers)


class Route(NamedTuple):
    """`pattern` matches the whole raw path; a `write` route needs the token."""

    method: str
    pattern: str
    answer: str
    write: bool = False


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+(?:/[^/]+)??)"
_PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+(?:/[^/]+)??)"
_REV = r"(?P<rev>[^/]+)"

ROUTES = [
    Route("GET", r"/api/whoami-v2", "whoami", write=True),
    Route("POST", r"/api/repos/create", "create_repo", write=True),
    Route("DELETE", r"/api/repos/delete", "delete_repo", write=True),
    Route("POST", r"/api/validate-yaml", "validate_yaml"),
    Route("POST", rf"{_API}/preupload/{_REV}", "preupload", write=True),
    Route("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", "lfs_batch", write=True),
    Route("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    Route("POST", rf"{_API}/commit/{_REV}", "commit", write=True),
    Route("GET", rf"{_API}/tree/{_REV}(?:/(?P<path>.*))?", "tree"),
    Route("POST", rf"{_API}/paths-info/{_REV}", "paths_info"),
    Route("GET", rf"{_API}/refs", "refs"),
    Route("GET", rf"{_API}/commits/{_REV}", "commits"),
    Route("POST", rf"{_API}/(?P<ref>branch|tag)/{_REV}", "create_ref", write=True),
    Route("DELETE", rf"{_API}/(?P<ref>branch|tag)/{_REV}", "delete_ref", write=True),
    Route("GET", rf"{_API}/revision/{_REV}", "repo_info"),
    Route("GET", _API, "repo_info"),
    Route("GET", rf"{_PAGE}/resolve/{_REV}/(?P<path>.+)", "resolve"),
]


class _Request(BaseHTTPRequestHandler):
    """HTTP around `Hub`: reads the body, finds the route, checks the token, writes the answer."""

    protocol_version = "HTTP/1.1"

    def json(self):
        return json.loads(self.body or b"{}")

    def _read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            continue
        return b"".join(chunks)

    def _answer(self):
        """Find the route and call it; `HEAD` is answered as `GET`."""
        sent = self.headers.get("Authorization")
        self.authorized = sent == f"Bearer {TOKEN}"
        if sent is not None and not self.authorized:
            raise HubError(401, "Invalid credentials in Authorization header")
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query, keep_blank_values=True)
        method = "GET" if self.command == "HEAD" else self.command
        for route in ROUTES:
            match = re.fullmatch(route.pattern, parts.path) if route.method == method else None
            if match is None:
                continue
            if route.write and not self.authorized:
                raise HubError(401, "Invalid username or password.")
            with self.server.lock:
                groups = {name: text for name, text in match.groupdict().items() if text is not None}
                reply = getattr(self.server.hub, route.answer)(self, **groups)
            return reply if isinstance(reply, Reply) else Reply(reply)
        raise HubError(404, f"the stand-in has no route {method} {parts.path}")

    def _serve(self):
        self.body = self._read_body()  # always drained, or the next request of this connection reads its rest
        try:
            reply = self._answer()
        except HubError as error:
            headers = error.headers | ({"X-Error-Code": error.code} if error.code else {})
            reply = Reply(error.body, error.status, {"X-Error-Message": str(error), **headers})
        except Exception as error:  # a fault of the stand-in itself: 501, since the clients retry a 500
            reply = Reply({"error": f"stand-in fault: {type(error).__name__}: {error}"}, 501)
        self.server.log.append((self.command, self.path, reply.status))
        self._send(reply)

    def _send(self, reply):
        status, headers = reply.status, dict(reply.headers or {})
        if isinstance(reply.body, Path):
            body = reply.body.read_bytes()
            headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked:
                size, first = len(body), int(asked[1])
                body = body[first : int(asked[2] or size) + 1]
                status, headers["Content-Range"] = 206, f"bytes {first}-{first + len(body) - 1}/{size}"
        else:
            body = json.dumps(reply.body).encode()
            headers.setdefault("Content-Type", "application/json; charset=utf-8")
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, format, *args):
        """Silent: `HubStandIn.log` keeps what was asked."""


class HubStandIn(ThreadingHTTPServer):
    """The running server. `with HubStandIn(root) as hub:` serves from a thread until the block ends.

    Args:
        root (`str` or `Path`): folder of its storage; what it holds from an earlier run is served again.
        port (`int`): 0 picks a free one.

    Attributes:
        url (`str`): value of `HF_ENDPOINT`.
        log (`list`): `(method, raw path, status)` of every request so far.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root, port=0):
        super().__init__(("127.0.0.1", port), _Request)
        self.hub, self.lock, self.log = Hub(root), threading.Lock(), []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self._thread.join()
        self.server_close()


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="folder of its storage")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    arguments = parser.parse_args(words)
    hub = HubStandIn(arguments.root, arguments.port)
    settings = " ".join(f"{name}={value}" for name, value in CLIENT_SETTINGS.items())
    print(f"HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} {settings}", flush=True)
    try:
        hub.serve_forever()
    except KeyboardInterrupt:
        hub.server_close()


if __name__ == "__main__":
    main()
