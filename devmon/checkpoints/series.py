"""`Series`: the checkpoints of a training by their steps, listed without loading, each read while the last is used."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devmon.checkpoints.hub import REPOSITORY, Revision, revisions
from devmon.checkpoints.names import steps_in
from devmon.checkpoints.weights import SUFFIXES, State, read_state
from devmon.errors import DataError


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one step on the CPU. `folder` is where its config.json lies, None for a single file."""

    step: int
    name: str
    state: State = field(repr=False)
    folder: Path | None


class Series:
    """Checkpoints by step: `Series.open("runs/mine/checkpoints")`, `Series.open("EleutherAI/pythia-70m")`.

    - `where`: a folder of files (Lightning's, state dicts, safetensors), a folder of Hugging Face folders
      (`step123/`, `checkpoint-123/`), the run's folder in which `checkpoints/` lies, or owner/name on the hub, whose
      revisions are the checkpoints.
    - `pattern`: a regular expression that finds the step in the names as its one group (`r"model_(\\d+)"`); by default
      what follows step, checkpoint, global_step or iter, with units (20k). Names without a step are left out, and names
      of several phases or seeds are refused (`devmon.checkpoints.names`).
    - `allow_pickle`: read files that hold more than tensors, which runs code they hold.
    - `forget`: download revisions of the hub into a folder of their own (in TMPDIR) that goes with the checkpoint, so
      that at most two lie on the disk.

    Raises DataError where there are no checkpoints, and where two are of one step.
    """

    def __init__(
        self,
        name: str,
        places: Mapping[int, Path | Revision],
        *,
        allow_pickle: bool = False,
        forget: bool = False,
    ) -> None:
        self.name = name
        self.forget = forget
        self.places = dict(sorted(places.items()))
        self.allow_pickle = allow_pickle

    @classmethod
    def open(
        cls,
        where: str | os.PathLike[str],
        *,
        pattern: str | None = None,
        allow_pickle: bool = False,
        forget: bool = False,
    ) -> Series:
        # the names that may hold a step: of files and folders, or of revisions on the hub
        folder = Path(where)
        names: dict[str, Path | Revision]
        if folder.is_dir():
            names = _members(folder)
            if not steps_in(names, str(where), pattern) and (folder / "checkpoints").is_dir():
                names = _members(folder / "checkpoints")
        elif folder.exists():
            raise DataError(f"{where} is a file: give the folder in which the checkpoints lie")
        elif REPOSITORY.fullmatch(str(where)):
            names = {name: Revision(str(where), name) for name in revisions(str(where))}
        else:
            raise DataError(f"there is no folder {where}: give a folder of checkpoints, or owner/name on the hub")
        places = {step: names[name] for step, name in steps_in(names, str(where), pattern).items()}
        if not places:
            held = ", ".join(sorted(names)[:6]) or "nothing"
            raise DataError(
                f"no name in {where} holds a step (it has {held}): give checkpoints such as step-100.ckpt, "
                "step100.safetensors, checkpoint-100/, or --pattern 'model_(\\d+)'"
            )
        return cls(str(where), places, allow_pickle=allow_pickle, forget=forget)

    @property
    def steps(self) -> list[int]:
        return list(self.places)

    @property
    def pretrained(self) -> bool:
        """Whether checkpoints bring their own architecture, a config.json (one that lacks it is damaged)."""
        return any(isinstance(place, Revision) or (place / "config.json").is_file() for place in self.places.values())

    def config(self) -> dict[str, Any]:
        """The config.json of the first checkpoint that has a readable one; empty where none has."""
        for place in self.places.values():
            try:
                text = place.config() if isinstance(place, Revision) else (place / "config.json").read_text()
                config = json.loads(text)
            except (OSError, ValueError, DataError):
                continue
            if isinstance(config, dict):
                return config
        return {}

    def tokenizer(self) -> tuple[str, str | None] | None:
        """Where the tokenizer of the series lies: beside its checkpoints, in one of them, or in the last revision."""
        for place in (Path(self.name), *reversed(self.places.values())):
            if isinstance(place, Revision):
                return place.repository, place.name
            if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
                return str(place), None
        return None

    def read(self, step: int) -> Checkpoint:
        """Raises DataError where the checkpoint cannot be had or read."""
        place = self.places[step]
        if not isinstance(place, Revision):
            return Checkpoint(step, place.name, read_state(place, self.allow_pickle), place if place.is_dir() else None)
        scratch = tempfile.mkdtemp(prefix="devmon-") if self.forget else None
        try:
            path = place.folder(scratch)
            checkpoint = Checkpoint(step, str(place), read_state(path, self.allow_pickle), path)
        except BaseException:
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        if scratch is not None:
            weakref.finalize(checkpoint, shutil.rmtree, scratch, ignore_errors=True)
        return checkpoint

    def stream(self, steps: Iterable[int]) -> Iterator[tuple[int, Checkpoint | DataError]]:
        """Each step with its checkpoint, or with why there is none; the next is read meanwhile, in a thread.

        A step is taken from `steps` when the step before it has been read. Two checkpoints are in memory at most, where
        the caller lets go of each before it takes the next.
        """
        wanted, ahead = iter(steps), []
        with ThreadPoolExecutor(1, "prefetch") as pool:
            for step in wanted:
                ahead.append((step, pool.submit(self._try, step)))
                break
            while ahead:
                step, coming = ahead.pop()
                held = [coming.result()]
                del coming
                for following in wanted:
                    ahead.append((following, pool.submit(self._try, following)))
                    break
                yield step, held.pop()  # no reference stays here

    def _try(self, step: int) -> Checkpoint | DataError:
        try:
            return self.read(step)
        except DataError as error:
            return error

    def __repr__(self) -> str:
        return f"Series({self.name!r}: {len(self.places)} steps)"


def _members(folder: Path) -> dict[str, Path | Revision]:
    return {path.name: path for path in folder.iterdir() if path.is_dir() or path.suffix in SUFFIXES}
