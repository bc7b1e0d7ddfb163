"""Models on the Hugging Face hub: which revisions a repository has, and the files of one, checked."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from devmon.errors import DataError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Revision:
    """One revision of a model on the Hugging Face hub. `folder` downloads what is not in the hub's cache."""

    repository: str
    name: str

    def __str__(self) -> str:
        return f"{self.repository}@{self.name}"

    def folder(self, cache: str | None = None) -> Path:
        """Where the model lies: safetensors where the revision has them, else what `torch.save` wrote.

        `cache` is a folder to download into, in place of the hub's cache. Files that the hub names by their SHA-256 are
        checked: safetensors have no checksum of their own. Raises DataError.
        """
        try:
            folder, files = self._downloaded(cache)
        except Exception as error:  # of the network, the hub and the cache, each with classes of its own
            raise DataError(
                f"{self} cannot be downloaded ({_line(error)}): try again, or leave the step out"
            ) from error
        if not files:
            raise DataError(f"{self} holds no weights: neither *.safetensors nor *.bin")
        for file in files:
            blob = file.resolve()
            if re.fullmatch("[0-9a-f]{64}", blob.name) and _sha256(blob) != blob.name:
                raise DataError(
                    f"{self} is damaged on this disk: {file.name} is not of the SHA-256 that the hub tells; delete "
                    f"{blob} to have it downloaded again"
                )
        return folder

    def _downloaded(self, cache: str | None) -> tuple[Path, list[Path]]:
        """The folder, and its files of weights: safetensors alone where there are any, else .bin."""
        import huggingface_hub

        for kind in ("safetensors", "bin"):
            patterns = ["*.json", f"*.{kind}"]
            where = huggingface_hub.snapshot_download(
                self.repository, revision=self.name, allow_patterns=patterns, cache_dir=cache
            )
            folder = Path(where)
            if files := sorted(folder.glob(f"*.{kind}")):
                break
        return folder, files

    def config(self) -> str:
        """The text of its config.json. Raises DataError."""
        import huggingface_hub

        try:
            return Path(huggingface_hub.hf_hub_download(self.repository, "config.json", revision=self.name)).read_text()
        except Exception as error:
            raise DataError(f"{self} gives no config.json ({_line(error)})") from error


def revisions(repository: str) -> list[str]:
    """The names of the branches and tags. Raises DataError where the hub has no such model."""
    import huggingface_hub

    try:
        refs = huggingface_hub.HfApi().list_repo_refs(repository)
    except Exception as error:
        raise DataError(
            f"there is no folder {repository}, and the hub lists no revisions of a model of that name "
            f"({_line(error)}): give a folder of checkpoints, or owner/name of a model"
        ) from error
    return list(dict.fromkeys(ref.name for ref in (*refs.branches, *refs.tags)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
