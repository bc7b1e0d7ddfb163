"""A stand-in of the Hugging Face hub on this machine: the requests of huggingface_hub, answered from folders."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest


class Hub:
    """One repository, `lab/model`: a folder a revision; `branches` and `tags` are listed, with a folder or without.

    As the hub does it, a weights file is named by its SHA-256 in its ETag. `requests` are the paths asked for.
    """

    def __init__(self, folder: Path, branches: Sequence[str], tags: Sequence[str] = ()) -> None:
        self.folder, self.branches, self.tags = folder, branches, tags
        self.requests: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(path)
        parts = path.partition("?")[0].strip("/").split("/")
        match parts:
            case ["api", "models", "lab", "model", "refs"]:
                told: dict[str, Any] = {
                    kind: [{"name": name, "ref": f"refs/{name}", "targetCommit": commit(name)} for name in names]
                    for kind, names in (("branches", self.branches), ("tags", self.tags))
                }
                return 200, {}, json.dumps({"converts": [], **told}).encode()
            case ["api", "models", "lab", "model", "revision", name] if name := self._name(name):
                files = [{"rfilename": file.name} for file in sorted((self.folder / name).iterdir())]
                return 200, {}, json.dumps({"id": "lab/model", "sha": commit(name), "siblings": files}).encode()
            case ["api", "models", "lab", "model", "tree", name, *_] if name := self._name(name):
                tree = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": commit(file.name)}
                    for file in sorted((self.folder / name).iterdir())
                ]
                return 200, {}, json.dumps(tree).encode()
            case ["lab", "model", "resolve", name, file] if (name := self._name(name)) and (
                self.folder / name / file
            ).is_file():
                content = (self.folder / name / file).read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                etag = digest if file.endswith((".safetensors", ".bin")) else digest[:40]
                return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit(name)}, content
        missing = "RepoNotFound" if parts[-3:-2] != ["resolve"] else "EntryNotFound"
        return 404, {"X-Error-Code": missing}, b"{}"

    def _name(self, name: str) -> str:
        """The revision that a name or a commit stands for, if it has a folder."""
        held = [path.name for path in self.folder.iterdir() if path.is_dir()]
        return next((other for other in held if name in (other, commit(other))), "")

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

            def log_message(self, *_: Any) -> None: ...

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()


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
            monkeypatch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
            )
            return hub

        yield start
