"""The files of weights of each checkpoint of a series, by the hub's metadata or by digest, without loading any."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from devmon.checkpoints.hub import Revision, line, sha256
from devmon.checkpoints.names import SUFFIXES
from devmon.checkpoints.series import Series

# A quick digest of a local file reads this many pieces of so many bytes, spread over it, and its size: files that
# differ in it differ. Where it is equal, the whole files are compared by their SHA-256. More pieces find a difference
# with fewer whole reads; a checkpoint of 10 GB takes 1 MB.
PIECES, PIECE_BYTES = 16, 65_536
AT_ONCE = 8  # requests to the hub at a time
SHARD = re.compile(r"(?P<start>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})(?P<end>\.\w+)")
NOT_WEIGHTS = re.compile(r"(?:.*/)?(?:optim|scheduler|rng|training_args|trainer_state|random_states|scaler)\w*.*")


@dataclass(frozen=True)
class File:
    """A file of weights: its size in bytes, its digest ("" where nothing tells it), when it was written (seconds)."""

    name: str
    size: int
    digest: str
    date: float | None = None

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Listing:
    """The files of weights of a checkpoint, whether it has an index of shards, or why it cannot be listed."""

    files: tuple[File, ...] = ()
    indexed: bool = False
    error: str = ""

    def of(self, kind: str) -> tuple[File, ...]:
        return tuple(file for file in self.files if file.kind == kind)

    @property
    def kinds(self) -> list[str]:
        """The formats, in the order in which they are read."""
        held = {file.kind for file in self.files}
        return sorted(held, key=lambda kind: (kind != "safetensors", kind != "bin", kind))


def inventory(
    series: Series, steps: Iterable[int], tell: Callable[[int], None] = lambda step: None
) -> dict[int, Listing]:
    """The files at each step, one request to the hub a revision, or a few pieces of every local file.

    Local files with one quick digest are read whole, so that two digests are equal where the files are.
    """
    steps = [*steps]

    def one(step: int) -> Listing:
        place = series.places[step]
        held = _of_revision(place) if isinstance(place, Revision) else _of_folder(place)
        tell(step)
        return held

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(steps, pool.map(one, steps), strict=True))
    return _confirmed(series, found)


def _of_revision(revision: Revision) -> Listing:
    import huggingface_hub
    from huggingface_hub.hf_api import RepoFile

    try:
        tree = huggingface_hub.HfApi().list_repo_tree(
            revision.repository, revision=revision.revision, recursive=True, expand=True
        )
        held = [entry for entry in tree if isinstance(entry, RepoFile)]
    except Exception as error:  # of the network and the hub, each with classes of its own
        return Listing(error=line(error))
    # only large files have a SHA-256 of their own
    files = tuple(
        File(
            file.path,
            file.size,
            "" if file.lfs is None else file.lfs.sha256,
            None if file.last_commit is None else file.last_commit.date.timestamp(),
        )
        for file in held
        if _is_weights(file.path)
    )
    return Listing(files, any(file.path.endswith(".index.json") for file in held))


def _of_folder(place: Path) -> Listing:
    try:
        held = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
        files = []
        for path in held:
            name = path.name if path == place else path.relative_to(place).as_posix()
            if path == place or _is_weights(name):
                about = path.stat()
                files.append(File(name, about.st_size, _quick(path, about.st_size), about.st_mtime))
    except OSError as error:
        return Listing(error=line(error))
    return Listing(tuple(files), any(path.name.endswith(".index.json") for path in held))


def _is_weights(name: str) -> bool:
    return name.endswith((*SUFFIXES, ".distcp")) and NOT_WEIGHTS.fullmatch(name) is None


def _quick(path: Path, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= PIECES * PIECE_BYTES:
            digest.update(file.read())
        else:
            for piece in range(PIECES):
                file.seek(piece * (size - PIECE_BYTES) // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return "quick:" + digest.hexdigest()


def _confirmed(series: Series, found: dict[int, Listing]) -> dict[int, Listing]:
    """The same with the SHA-256 of whole files where several have one quick digest."""
    seen: dict[str, int] = {}
    for listing in found.values():
        for file in listing.files:
            seen[file.digest] = seen.get(file.digest, 0) + 1
    whole = {}
    for step, listing in found.items():
        place = series.places[step]
        files = tuple(
            File(file.name, file.size, sha256(place if place.is_file() else place / file.name), file.date)
            if isinstance(place, Path) and file.digest.startswith("quick:") and seen[file.digest] > 1
            else file
            for file in listing.files
        )
        whole[step] = Listing(files, listing.indexed, listing.error)
    return whole
