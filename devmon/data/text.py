"""Character-level text: the user's own, or the sources of Python's standard library, which every machine has."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from devmon.errors import DataError

SYMBOLS = 96
SKIPPED = {"site-packages", "test", "tests", "idlelib", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """A text as symbols: the `SYMBOLS - 1` most frequent characters, and one symbol for all others.

    `train` and `held_out` are 1-D int64 tensors of symbols (the last tenth is held out); `alphabet[i]` is the character
    of symbol i; `sha256` is of the text, `source` says where it came from.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    alphabet: tuple[str, ...]
    sha256: str
    source: str

    def windows(self, count: int, length: int, *, generator: torch.Generator, held_out: bool = False) -> torch.Tensor:
        """Random windows of the text, (count, length) int64."""
        part = self.held_out if held_out else self.train
        starts = torch.randint(len(part) - length + 1, (count, 1), generator=generator)
        return part[starts + torch.arange(length)]


def read_text(path: str | os.PathLike[str] | None = None, *, least: int = 20_000) -> Text:
    """Read a text file, or all text files of a folder; without a path, the standard library's own sources.

    Raises `DataError` where the path is missing, holds no text, or has fewer than `least` characters.
    """
    documents = read_documents(path)
    if path is None:
        source = f"Python standard library, {len(documents)} source files"
    else:
        source = f"{len(documents)} files of {Path(path).name}/" if Path(path).is_dir() else Path(path).name
    text = "\n".join(documents)
    if len(text) < least:
        raise DataError(
            f"{path or 'the standard library'} holds {len(text)} characters of UTF-8 text, at least {least} are "
            "needed: give a longer text"
        )
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    counts = np.bincount(points)
    common = np.sort(np.argsort(-counts, kind="stable")[: min(SYMBOLS - 1, np.count_nonzero(counts))])
    alphabet = (*map(chr, common), "\ufffd")
    index = np.full(len(counts), len(common), dtype=np.int64)
    index[common] = np.arange(len(common))
    symbols = torch.from_numpy(index[points])
    cut = len(symbols) * 9 // 10
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Text(symbols[:cut], symbols[cut:], alphabet, digest, source)


def read_documents(path: str | os.PathLike[str] | None = None) -> list[str]:
    """The texts of a file, of all files of a folder, or, without a path, of the standard library's own sources; a file
    that is not UTF-8 is an empty one. Raises `DataError` where the path is missing."""
    if path is None:
        files = _files(Path(sysconfig.get_path("stdlib")), ".py")
    elif not Path(path).exists():
        raise DataError(f"there is no text at {path}: give a text file or a folder of text files")
    else:
        files = _files(Path(path)) if Path(path).is_dir() else [Path(path)]
    return [_read(file) for file in files]


def _files(folder: Path, suffix: str = "") -> list[Path]:
    return sorted(
        p
        for p in folder.rglob(f"*{suffix}")
        if p.is_file() and not (SKIPPED & set(p.relative_to(folder).parts)) and not p.name.startswith(".")
    )


def _read(file: Path) -> str:
    """The file's text; empty for a file that is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8").replace("\t", "    ")
    except UnicodeDecodeError:
        return ""
    except OSError as error:
        raise DataError(f"cannot read {file} ({error.strerror or error}): give a text that can be read") from error
