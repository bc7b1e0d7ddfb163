"""Runs as datasets of the Hugging Face hub: a compact copy goes up beside its card, and comes down again."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from devmon.errors import StoreError
from devmon.files import aside, refuse_existing
from devmon.store.compact import compact
from devmon.store.trajectory import Trajectory

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
STORE = "trajectory.zarr"  # where the run lies in the dataset, as in a folder of devmon's


def push(run: Trajectory, repository: str, files: Mapping[str, str], *, private: bool = False) -> str:
    """Put a run into the dataset `repository` (owner/name) in one commit, with `files` beside it; return its address.

    The dataset is made where there is none (`private` or not); an earlier copy of the run in it is replaced, other
    files stay. What goes up is what `devmon compact -o` writes: plain Zarr, that xarray opens. Raises StoreError.
    """
    import huggingface_hub

    if not REPOSITORY.fullmatch(repository):
        raise StoreError(f"a dataset of the hub is named owner/name, got {repository!r}")
    api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory() as folder:
        try:
            api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
            compact(run, Path(folder, STORE))
            for name, content in files.items():
                Path(folder, name).write_text(content, encoding="utf-8")
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                repo_type="dataset",
                commit_message=f"devmon run {run.attrs.get('run_id', '')}".strip(),
                delete_patterns=f"{STORE}/**",
            )
        except StoreError:
            raise
        except Exception as error:  # of the network and the hub, each with classes of its own
            raise StoreError(
                f"{repository} cannot be written ({_line(error)}): log in with `hf auth login`, by a token that may "
                "write there, and push again"
            ) from error
    return f"{huggingface_hub.constants.ENDPOINT}/datasets/{repository}"


def pull(repository: str, out: Path, *, revision: str | None = None) -> Path:
    """Bring the run of a dataset of the hub into the new folder `out`, whole or not at all, and return its store.

    `revision` is a branch, tag or commit, by default the newest. Raises StoreError where there is no such dataset, or
    no run in it, and where `out` exists.
    """
    import huggingface_hub

    if not REPOSITORY.fullmatch(repository):
        raise StoreError(f"a dataset of the hub is named owner/name, got {repository!r}")
    refuse_existing(out)
    try:
        where = huggingface_hub.snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=f"{STORE}/**"
        )
    except Exception as error:
        raise StoreError(
            f"{repository} cannot be read ({_line(error)}): give the owner/name of a dataset, and log in with "
            "`hf auth login` where it is private"
        ) from error
    if not Path(where, STORE, "zarr.json").is_file():
        raise StoreError(f"the dataset {repository} holds no run: there is no {STORE} in it, which devmon push writes")
    with aside(out) as path:
        shutil.copytree(Path(where, STORE), Path(path, STORE))
    return out / STORE


def _line(error: Exception) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
