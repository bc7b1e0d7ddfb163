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

from devmon.checkpoints.axis import Axis, axis
from devmon.checkpoints.hub import MANY, OF_BRANCH, REPOSITORY, Revision, commits, repositories, revisions, sha256
from devmon.checkpoints.names import SUFFIXES
from devmon.checkpoints.suites import suite_of
from devmon.checkpoints.weights import State, files_of, read_state
from devmon.errors import DataError


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one step on the CPU. `folder` is where its config.json lies, None for a single file.

    `commit` is that of a revision of the hub, `files` its files of weights with their SHA-256.
    """

    step: int
    name: str
    state: State = field(repr=False)
    folder: Path | None
    commit: str | None = None
    files: Mapping[str, str] = field(default_factory=dict, repr=False)


class Series:
    """Checkpoints by step: `Series.open("runs/mine/checkpoints")`, `Series.open("EleutherAI/pythia-70m")`.

    - `where`: a folder of files (Lightning's, state dicts, safetensors), a folder of folders (Hugging Face's,
      `step123/`, `checkpoint-123/`, torch.distributed.checkpoint's), the run's folder in which `checkpoints/` lies; or
      on the hub, owner/name, whose revisions are the checkpoints, owner/name@branch, whose commits are, or a name
      pattern of repositories that hold a step each, google/multiberts-seed_0-step_*.
    - `pattern`: a regular expression that finds the step in the names as its one group (`r"model_(\\d+)"`); by default
      the suite's (`devmon.checkpoints.suites`), or what follows step, checkpoint, global_step or iter, with units.
    - `stage` takes one stage, by its own count; by default stages follow one another. `branch` is an ingredient or a
      seed.
    - `allow_pickle`: read files that hold more than tensors, which runs code they hold.
    - `forget`: download revisions of the hub into a folder of their own (in TMPDIR) that goes with the checkpoint, so
      that at most two lie on the disk.

    `axis` says what was read of the names: coordinates `stage` and `tokens`, `offsets` of stages, what is `left_out`.
    `kinds` is the format to read at a step that has several ("bin" where its safetensors are stale:
    `devmon.checkpoints.audit`). Raises DataError where there are no checkpoints, and where two are of one step.
    """

    def __init__(
        self,
        name: str,
        places: Mapping[int, Path | Revision],
        *,
        allow_pickle: bool = False,
        forget: bool = False,
        axis: Axis | None = None,
    ) -> None:
        self.name = name
        self.forget = forget
        self.places = dict(sorted(places.items()))
        self.allow_pickle = allow_pickle
        self.axis = Axis({}) if axis is None else axis
        self.kinds: dict[int, str] = {}

    @classmethod
    def open(
        cls,
        where: str | os.PathLike[str],
        *,
        pattern: str | None = None,
        stage: str | None = None,
        branch: str | None = None,
        allow_pickle: bool = False,
        forget: bool = False,
    ) -> Series:
        # the names that may hold a step: of files and folders, of revisions or commits, of repositories
        folder, text = Path(where), str(where)
        suite = None if folder.exists() else suite_of(text.partition("@")[0])
        if suite is not None and suite.refused:
            raise DataError(f"{text} is of {suite.name}, which cannot be measured as a series: {suite.refused}")
        if suite is not None and suite.each and "*" not in text:
            raise DataError(f"{suite.name} has a repository for each step: give a name pattern, as in {suite.each!r}")
        names: dict[str, Path | Revision]
        if folder.is_dir():
            names = _members(folder)
            if not _tells(names, pattern) and (folder / "checkpoints").is_dir():
                names = _members(folder / "checkpoints")
        elif folder.exists():
            raise DataError(f"{where} is a file: give the folder in which the checkpoints lie")
        elif MANY.fullmatch(text):
            names = {**repositories(text)}
        elif (match := OF_BRANCH.fullmatch(text)) is not None:
            names = {**commits(match[1], match[2])}
        elif REPOSITORY.fullmatch(text):
            names = {**(commits(text, "main") if suite is not None and suite.commits else revisions(text))}
        else:
            raise DataError(f"there is no folder {where}: give a folder of checkpoints, or owner/name on the hub")

        # their steps, and what is left out
        read = axis(names, text, pattern=pattern, suite=suite, stage=stage, branch=branch)
        if not read.names:
            held = ", ".join(sorted(names)[:6]) or "nothing"
            raise DataError(
                f"no name in {where} holds a step (it has {held}): give checkpoints such as step-100.ckpt, "
                "step100.safetensors, checkpoint-100/, or --pattern 'model_(\\d+)'; commits of a branch of the hub are "
                "owner/name@main"
            )
        places = {step: names[name.text] for step, name in read.names.items()}
        return cls(text, places, allow_pickle=allow_pickle, forget=forget, axis=read)

    @property
    def steps(self) -> list[int]:
        return list(self.places)

    @property
    def stage(self) -> dict[int, str]:
        """Of each step the stage that its name tells, "" for none."""
        return {step: self.axis.names[step].stage if step in self.axis.names else "" for step in self.places}

    @property
    def tokens(self) -> dict[int, int | None]:
        """Of each step the tokens that its name tells, those of the stages before included; None for none."""
        return {step: self.axis.tokens.get(step) for step in self.places}

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
                return place.repository, place.revision
            if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
                return str(place), None
        return None

    def read(self, step: int) -> Checkpoint:
        """Raises DataError where the checkpoint cannot be had or read."""
        place, kind = self.places[step], self.kinds.get(step)
        if not isinstance(place, Revision):
            state = read_state(place, self.allow_pickle, kind)
            files = {file.name: sha256(file) for file in files_of(place, kind)}
            return Checkpoint(step, place.name, state, place if place.is_dir() else None, None, files)
        scratch = tempfile.mkdtemp(prefix="devmon-") if self.forget else None
        try:
            path, files = place.folder(scratch, kind)
            state = read_state(path, self.allow_pickle, kind)
            checkpoint = Checkpoint(step, str(place), state, path, place.commit, files)
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


def _tells(names: Iterable[str], pattern: str | None) -> bool:
    """Whether any of the names holds a step."""
    try:
        return bool(axis(names, "", pattern=pattern).names)
    except DataError:
        return True  # what cannot be read is for the caller to say


def _members(folder: Path) -> dict[str, Path | Revision]:
    return {path.name: path for path in folder.iterdir() if path.is_dir() or path.suffix in SUFFIXES}
