"""A stand-in of the Hugging Face hub on this machine: the requests of huggingface_hub, answered from folders."""

from __future__ import annotations

import datetime
import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

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
