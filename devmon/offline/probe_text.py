"""The probe data of a language model: tokens as they are in a file, or made of text by the tokenizer of the series.

.npy, .pt, .safetensors                  tokens (batch, pos), taken as they are
a text file, or a folder of them         cut into pieces, shuffled, made tokens by the tokenizer
a folder of `Dataset.save_to_disk`       its column input_ids as it is, or text by the tokenizer
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from devmon.data import probe_tokens
from devmon.data.text import read_documents
from devmon.errors import DataError, DevmonError
from devmon.files import write_whole

ARRAYS = (".npy", ".pt", ".safetensors")
SEQUENCES, LENGTH = 64, 256  # of tokens made of text, where nothing else is asked
PIECE_CHARACTERS = 16  # characters of a piece of text, for each token of a sequence: about four sequences
SPLITS = ("validation", "test", "train")  # of a dataset, the first there is
Home = tuple[str, str | None]  # of a tokenizer: a folder or a name on the hub, and its revision


@dataclass(frozen=True)
class Probe:
    """`tokens` (batch, pos) int64, the probe batch, and `examples` (n, pos) int64, which an LLC is sampled on."""

    tokens: Tensor
    examples: Tensor

    def save(self, folder: Path) -> Path:
        """Write both into a file of `folder` that is named by their content."""
        from safetensors.torch import save

        content = save({"tokens": self.tokens.clone(), "examples": self.examples.clone()})
        file = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        if not file.exists():
            write_whole(file, content)
        return file


def read_probe(
    where: Path,
    tokenizer: Home | None,
    sequences: int | None = None,
    length: int | None = None,
    examples: int = 0,
) -> Probe:
    """The probe data that `where` holds, or that are made of it: the same for the same text and tokenizer.

    Of an array `sequences` and `length` take the first; its examples are all of it (unless the file brings them). Text
    is cut into pieces, whose order is shuffled by a fixed seed, with the tokenizer's end of text between them; the
    first `sequences` x `length` tokens are the batch and the next `examples` sequences the examples. While there are
    pieces each gives one sequence: sequences of one piece are alike, and standard errors would count them as many.
    Raises DataError where there is nothing to read, no tokenizer, or too little text.
    """
    if where.suffix in ARRAYS:
        held = _arrays(where)
        tokens = held["tokens"][:sequences, :length]
        return Probe(tokens, held.get("examples", held["tokens"]))
    sequences, length = sequences or SEQUENCES, length or LENGTH
    # A sequence of every piece, so that sequences are as independent as the pieces are; short ones are joined, and what
    # is left of long ones serves where there are too few.
    rows: list[int] = []
    short: list[int] = []
    rest: list[int] = []
    needed = (sequences + examples) * length
    for part in _parts(where, tokenizer, length):
        if len(part) < length:
            short += part
            whole = len(short) // length * length
            rows, short = rows + short[:whole], short[whole:]
        else:
            rows += part[:length]
            rest += part[length:]
        if len(rows) >= needed:
            break
    stream = rows + short + rest if len(rows) < needed else rows
    if len(stream) < needed:
        raise DataError(
            f"{where} gives {len(stream)} tokens, {sequences} + {examples} sequences of {length} need {needed}: give "
            "more text, or less of --sequences, --length or --llc examples=N"
        )
    tokens = probe_tokens(torch.tensor(stream[:needed]).reshape(-1, length), f"--tokens {where.name}")
    return Probe(tokens[:sequences].clone(), (tokens[sequences:] if examples else tokens).clone())


def _parts(where: Path, home: Home | None, length: int) -> Iterator[list[int]]:
    """The tokens of pieces of text, or of the rows of a dataset, in an order that is always the same."""
    if any((where / name).is_file() for name in ("state.json", "dataset_dict.json")):
        rows, column = _dataset(where)
        texts: Sequence[Any] = range(len(rows))
        read: Callable[[Any], Any] = lambda index: rows[index][column]  # noqa: E731
    else:
        size = PIECE_CHARACTERS * length
        texts = [text[i : i + size] for text in read_documents(where) for i in range(0, len(text), size)]
        read = str
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    encode: Callable[[str], list[int]] | None = None
    for index in order:
        piece = read(texts[index])
        if isinstance(piece, str):
            encode = encode or _encoder(where, home)
            yield encode(piece[: PIECE_CHARACTERS * length])
        else:
            yield [int(token) for token in piece]


def _encoder(where: Path, home: Home | None) -> Callable[[str], list[int]]:
    """What makes tokens of a piece of text, with an end of text after it where the tokenizer has one."""
    if home is None:
        raise DataError(
            f"{where} is text, and no tokenizer lies with the series: give --tokenizer FOLDER (or owner/name), or "
            "tokens in a .npy, .pt or .safetensors file"
        )
    tokenizer = load_tokenizer(home)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return lambda text: [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end]


def load_tokenizer(home: Home) -> Any:
    """The tokenizer of a folder or a name on the hub. Raises DataError where it cannot be had."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(home[0], revision=home[1] or "main", trust_remote_code=False)
    except Exception as error:  # of files, the network, the hub and transformers
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise DataError(f"the tokenizer {home[0]} cannot be had ({reason}): give --tokenizer") from error


def _dataset(folder: Path) -> tuple[Any, str]:
    """The rows of a dataset on disk, and the column to read."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{folder} is a dataset of Hugging Face: pip install datasets, or give a text file or an array"
        ) from None
    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise DataError(f"the dataset {folder} cannot be read ({reason})") from error
    if isinstance(rows, dict):
        rows = rows[next((split for split in SPLITS if split in rows), next(iter(rows)))]
    for column in ("input_ids", "tokens", "text", "content"):
        if column in rows.column_names:
            return rows, column
    raise DataError(
        f"the dataset {folder} has the columns {', '.join(rows.column_names)}: one must be input_ids or text"
    )


def _arrays(path: Path) -> dict[str, Tensor]:
    """The tokens (batch, pos) int64 that a file holds, with the examples that `Probe.save` put beside them."""
    held: Any
    try:
        if path.suffix == ".npy":
            held = torch.from_numpy(np.load(path, allow_pickle=False))
        elif path.suffix == ".pt":
            held = torch.load(path, map_location="cpu", weights_only=True)
        else:
            from safetensors.torch import load_file

            held = load_file(path)
            held = next(iter(held.values())) if len(held) == 1 else held
    except DevmonError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise DataError(f"the tokens {path} cannot be read ({reason}): give integers (batch, pos)") from None
    named = held if isinstance(held, dict) and held.keys() == {"tokens", "examples"} else {"tokens": held}
    for value in named.values():
        if not isinstance(value, Tensor):
            raise DataError(
                f"the tokens {path} are to be one array (batch, pos) of integers, got {type(value).__name__}"
            )
    return {name: probe_tokens(value, f"--tokens {path.name}") for name, value in named.items()}
