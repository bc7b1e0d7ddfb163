"""A stand-in of the hub that takes datasets: repositories are made, files are committed, and come down again."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub

from tests.support.hub import Hub, commit


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
