"""Models on the Hugging Face hub: which revisions a repository has, and the files of one, checked."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from devmon.errors import DataError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
OF_BRANCH = re.compile(r"([\w.-]+/[\w.-]+)@([\w./-]+)")  # owner/name@branch: the commits of a branch
MANY = re.compile(r"([\w.-]+)/([\w.-]*\*[\w.*-]*)")  # owner/name-step_*: a repository a step
KINDS = ("safetensors", "bin")  # formats of weights, the first that a revision has


@dataclass(frozen=True)
class Revision:
    """One revision of a model on the Hugging Face hub, by its `commit` where that is known.

    `folder` downloads what is not in the hub's cache. `name` is that of the branch or tag, or the title of the commit.
    """

    repository: str
    name: str
    commit: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}@{self.name}"

    @property
    def revision(self) -> str:
        return self.commit or self.name

    def folder(self, cache: str | None = None, kind: str | None = None) -> tuple[Path, dict[str, str]]:
        """Where the model lies, and the SHA-256 of its files of weights.

        `kind` is "safetensors" or "bin"; without it, safetensors where the revision has them, else what `torch.save`
        wrote. `cache` is a folder to download into, in place of the hub's cache. Files that the hub names by their
        SHA-256 are checked: safetensors have no checksum of their own. Raises DataError.
        """
        try:
            folder, files = self._downloaded(cache, KINDS if kind is None else (kind,))
        except Exception as error:  # of the network, the hub and the cache, each with classes of its own
            raise DataError(f"{self} cannot be downloaded ({line(error)}): try again, or leave the step out") from error
        if not files:
            raise DataError(f"{self} holds no weights: neither *.safetensors nor *.bin")
        digests = {}
        for file in files:
            blob, digests[file.name] = file.resolve(), sha256(file)
            if re.fullmatch("[0-9a-f]{64}", blob.name) and digests[file.name] != blob.name:
                raise DataError(
                    f"{self} is damaged on this disk: {file.name} is not of the SHA-256 that the hub tells; delete "
                    f"{blob} to have it downloaded again"
                )
        return folder, digests

    def _downloaded(self, cache: str | None, kinds: tuple[str, ...]) -> tuple[Path, list[Path]]:
        """The folder, and its files of weights: of the first kind that it has."""
        import huggingface_hub

        for kind in kinds:
            patterns = ["*.json", f"*.{kind}"]
            where = huggingface_hub.snapshot_download(
                self.repository, revision=self.revision, allow_patterns=patterns, cache_dir=cache
            )
            folder = Path(where)
            if files := sorted(folder.glob(f"*.{kind}")):
                break
        return folder, files

    def config(self) -> str:
        """The text of its config.json. Raises DataError."""
        import huggingface_hub

        try:
            return Path(
                huggingface_hub.hf_hub_download(self.repository, "config.json", revision=self.revision)
            ).read_text()
        except Exception as error:
            raise DataError(f"{self} gives no config.json ({line(error)})") from error


def revisions(repository: str) -> dict[str, Revision]:
    """The branches and tags by name. Raises DataError where the hub has no such model."""
    import huggingface_hub

    try:
        refs = huggingface_hub.HfApi().list_repo_refs(repository)
    except Exception as error:
        raise DataError(
            f"there is no folder {repository}, and the hub lists no revisions of a model of that name "
            f"({line(error)}): give a folder of checkpoints, or owner/name of a model"
        ) from error
    held = [*refs.branches, *refs.tags]
    return {ref.name: Revision(repository, ref.name, ref.target_commit) for ref in reversed(held)}


def commits(repository: str, branch: str) -> dict[str, Revision]:
    """The commits of a branch by title, the last of each title. Raises DataError."""
    import huggingface_hub

    try:
        held = huggingface_hub.HfApi().list_repo_commits(repository, revision=branch)
    except Exception as error:
        raise DataError(f"the hub lists no commits of {repository}@{branch} ({line(error)})") from error
    found: dict[str, Revision] = {}
    for commit in held:  # the last comes first
        found.setdefault(commit.title, Revision(repository, commit.title, commit.commit_id))
    return found


def repositories(pattern: str) -> dict[str, Revision]:
    """The repositories owner/name of a name pattern, by name, each at `main`. Raises DataError where there are none."""
    import huggingface_hub

    owner, _, name = pattern.partition("/")
    longest = max(name.split("*"), key=len)
    try:
        held = huggingface_hub.HfApi().list_models(author=owner, search=longest.strip("-_.") or None)
        found = sorted(model.id for model in held if fnmatch.fnmatchcase(model.id, pattern))
    except Exception as error:
        raise DataError(f"the hub lists no repositories of {owner} ({line(error)})") from error
    if not found:
        raise DataError(f"the hub has no repository {pattern}: give the owner and a name pattern with *")
    return {repository.partition("/")[2]: Revision(repository, "main") for repository in found}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
