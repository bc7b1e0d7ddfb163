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
        checked: safetensors have no checksum of their own.
        """
        import huggingface_hub

        try:
            for kind in ("safetensors", "bin"):
                folder = Path(huggingface_hub.snapshot_download(
                    self.repository, revision=self.name, allow_patterns=["*.json", f"*.{kind}"], cache_dir=cache
                ))  # fmt: skip
                if held := sorted(folder.glob(f"*.{kind}")):
                    break
            else:
                raise DataError(f"{self} holds no weights: neither *.safetensors nor *.bin")
        except DataError:
            raise
        except Exception as error:  # of the network, the hub and the cache, each with classes of its own
            raise DataError(
                f"{self} cannot be downloaded ({_line(error)}): try again, or leave the step out"
            ) from error
        for file in held:
            blob = file.resolve()
            if re.fullmatch("[0-9a-f]{64}", blob.name) and _sha256(blob) != blob.name:
                raise DataError(f"{self} is damaged on this disk: {file.name} is not of the SHA-256 that the hub tells; "
                                f"delete {blob} to have it downloaded again")  # fmt: skip
        return folder

    def config(self) -> str:
        import huggingface_hub

        try:
            return Path(huggingface_hub.hf_hub_download(self.repository, "config.json", revision=self.name)).read_text()
        except Exception as error:
            raise DataError(f"{self} gives no config.json ({_line(error)})") from error


def revisions(repository: str) -> list[str]:
    import huggingface_hub

    try:
        refs = huggingface_hub.HfApi().list_repo_refs(repository)
    except Exception as error:
        raise DataError(f"there is no folder {repository}, and the hub lists no revisions of a model of that name "
                        f"({_line(error)})") from error  # fmt: skip
    return list(dict.fromkeys(ref.name for ref in (*refs.branches, *refs.tags)))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
