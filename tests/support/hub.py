"""A stand-in of the Hugging Face hub on this machine: the requests of huggingface_hub, answered from folders; and one
that takes datasets."""

from __future__ import annotations

import base64
import datetime
import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub.constants
import pytest

DATE = "2024-01-01T00:00:00.000Z"


class Hub:
    """Repositories, `lab/model` alone by default: a folder a revision; `branches` and `tags` are listed, with a folder
    or without. Of several repositories each has a folder of its own in `folder`. `titles` are the commits of a branch,
    the last first, with the folder that each of them is.

    As the hub does it, a weights file is named by its SHA-256 in its ETag and in the tree. `requests` are the paths
    asked for.
    """

    def __init__(
        self,
        folder: Path,
        branches: Sequence[str],
        tags: Sequence[str] = (),
        *,
        repositories: Sequence[str] = ("lab/model",),
        titles: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.branches, self.tags = folder, branches, tags
        self.repositories, self.titles = repositories, titles or {}
        self.requests: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(path)
        parts = path.partition("?")[0].strip("/").split("/")
        at = 2 if parts[:2] == ["api", "models"] else 0
        asked = "/".join(parts[at : at + 2])
        folder = self.folder / parts[at + 1] if len(self.repositories) > 1 and len(parts) > at + 1 else self.folder
        if asked in self.repositories:
            parts = [*parts[:at], *parts[at + 2 :]]
        match parts:
            case ["api", "models"] if "author=" in path:
                return 200, {}, json.dumps([{"id": name, "modelId": name} for name in self.repositories]).encode()
            case ["api", "models", "commits", _]:
                told = [
                    {"id": commit(name), "authors": [], "date": DATE, "title": title, "message": ""}
                    for title, name in self.titles.items()
                ]
                return 200, {}, json.dumps(told).encode()
            case ["api", "models", "refs"]:
                refs: dict[str, Any] = {
                    kind: [{"name": name, "ref": f"refs/{name}", "targetCommit": commit(name)} for name in names]
                    for kind, names in (("branches", self.branches), ("tags", self.tags))
                }
                return 200, {}, json.dumps({"converts": [], **refs}).encode()
            case ["api", "models", "revision", name] if name := revision(folder, name):
                files = [{"rfilename": file.name} for file in sorted((folder / name).iterdir())]
                return 200, {}, json.dumps({"id": "lab/model", "sha": commit(name), "siblings": files}).encode()
            case ["api", "models", "tree", name, *_] if name := revision(folder, name):
                return 200, {}, json.dumps([*map(entry, sorted((folder / name).iterdir()))]).encode()
            case ["resolve", name, file] if (name := revision(folder, name)) and (folder / name / file).is_file():
                content = (folder / name / file).read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                etag = digest if file.endswith((".safetensors", ".bin")) else digest[:40]
                return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit(name)}, content
        missing = "RepoNotFound" if parts[-3:-2] != ["resolve"] else "EntryNotFound"
        return 404, {"X-Error-Code": missing}, b"{}"

    def posted(self, path: str, body: bytes) -> tuple[int, bytes]:
        """This one takes nothing."""
        return 403, b"{}"

    @contextmanager
    def serving(self) -> Iterator[str]:
        """The address at which it answers."""
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, content = hub.answer(self.path)
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            do_HEAD = do_GET

            def do_POST(self) -> None:
                status, content = hub.posted(self.path, self.rfile.read(int(self.headers.get("Content-Length", 0))))
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None: ...

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()


class DatasetHub(Hub):
    """Datasets by name, each a dictionary of the files of its newest commit; `commits` are their titles, `made` what
    was asked for when they were made. Of `allowed` owners alone."""

    def __init__(self, allowed: tuple[str, ...] = ("lab",)) -> None:
        super().__init__(Path(), [])
        self.allowed = allowed
        self.datasets: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.made: dict[str, dict[str, Any]] = {}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(path)
        parts = [unquote(part) for part in path.partition("?")[0].strip("/").split("/")]
        at = 2 if parts[:1] == ["api"] else 1
        files = self.datasets.get("/".join(parts[at : at + 2]))
        if files is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "no such dataset"}'
        name, sha = "/".join(parts[at : at + 2]), commit(str(len(self.commits)))
        match parts[at + 2 :]:
            case ["revision", _] | []:
                listed = [{"rfilename": file} for file in sorted(files)]
                return 200, {}, json.dumps({"id": name, "sha": sha, "siblings": listed}).encode()
            case ["tree", _, *_]:
                tree = [{"type": "file", "path": file, "size": len(held), "oid": commit(file)}
                        for file, held in sorted(files.items())]  # fmt: skip
                return 200, {}, json.dumps(tree).encode()
            case ["resolve", _, *file] if "/".join(file) in files:
                held = files["/".join(file)]
                return 200, {"ETag": f'"{commit(str(held))}"', "X-Repo-Commit": sha}, held
        return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"

    def posted(self, path: str, body: bytes) -> tuple[int, bytes]:
        parts = path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            return 200, b'{"errors": [], "warnings": []}'
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        name, what = "/".join(parts[2:4]), parts[4]
        if what == "preupload":
            asked = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return 200, json.dumps({"files": asked}).encode()
        if what == "commit":
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        return 404, b"{}"

    def _create(self, asked: dict[str, Any]) -> tuple[int, bytes]:
        owner = asked.get("organization") or "lab"
        name = f"{owner}/{asked['name']}"
        if owner not in self.allowed:
            return 403, b'{"error": "You do not have the rights to create a dataset under this namespace"}'
        assert asked["type"] == "dataset"
        if name in self.datasets:
            return 409, json.dumps({"url": address(name)}).encode()
        self.datasets[name], self.made[name] = {}, asked
        return 200, json.dumps({"url": address(name), "name": name}).encode()

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, bytes]:
        for line in lines:
            match line["key"], line["value"]:
                case "header", value:
                    self.commits.append(value["summary"])
                case "file", value:
                    self.datasets[name][value["path"]] = base64.b64decode(value["content"])
                case "deletedFile", value:
                    del self.datasets[name][value["path"]]
        sha = commit(str(len(self.commits)))
        told = {"success": True, "commitOid": sha, "commitUrl": f"{address(name)}/commit/{sha}"}
        return 200, json.dumps(told).encode()


def address(name: str) -> str:
    return f"{huggingface_hub.constants.ENDPOINT}/datasets/{name}"


def entry(file: Path) -> dict[str, Any]:
    """A file as the tree of a revision lists it: weights by their SHA-256, with the date of the last commit."""
    about = file.stat()
    told: dict[str, Any] = {"type": "file", "path": file.name, "size": about.st_size, "oid": commit(file.name)}
    if file.suffix in (".safetensors", ".bin"):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        told["lfs"] = {"oid": digest, "size": about.st_size, "pointerSize": 130}
    date = datetime.datetime.fromtimestamp(about.st_mtime, datetime.UTC).isoformat(timespec="milliseconds")
    return told | {"lastCommit": {"id": commit(file.name), "title": "upload", "date": date.replace("+00:00", "Z")}}


def revision(folder: Path, name: str) -> str:
    """The revision that a name or a commit stands for, if it has a folder."""
    held = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return next((other for other in held if name in (other, commit(other))), "")


def commit(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Hub], Hub]]:
    """Puts a stand-in in the hub's place: what talks to it is huggingface_hub itself."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with ExitStack() as stack:

        def start(hub: Hub) -> Hub:
            url = stack.enter_context(hub.serving())
            monkeypatch.setattr(constants, "ENDPOINT", url)
            monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made for the first address that it meets
            monkeypatch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
            )
            return hub

        yield start
