"""`Plan`: what `devmon measure` measures and how, as plain values: its options and the keys of its --config file."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devmon.errors import DataError

PRESETS = ("economy", "standard", "full")
ENGINES = {
    "processes": "devmon.offline.engines.processes",
    "ray": "devmon.offline.engines.ray",
    "slurm": "devmon.offline.engines.slurm",
}
DTYPES = ("float32", "float64", "bfloat16", "float16")
HOW = ("into", "workers", "shard", "device", "engine", "options", "forget")  # how it is done, not what is measured


@dataclass(frozen=True)
class Plan:
    """What is measured on which checkpoints, as plain values: the options of `devmon measure`, and its --config file.

    `source` names the model, the watches or both (`devmon.offline.source.load_study`), `preset` watches for a language model with
    the probe batch that `tokens` holds or is made of (`devmon.offline.probe_text`), and with an LLC where `llc` has its settings
    (NAME=VALUE). Watches of a source keep their own steps, those of a preset are made at all that `steps` chooses. `dtype`
    and no model are for checkpoints that bring their architecture. `options` (NAME=VALUE) are the engine's own. Raises
    DataError for values that do not go together.
    """

    series: str
    into: str
    source: str | None = None
    preset: str | None = None
    tokens: str | None = None
    tokenizer: str | None = None
    sequences: int | None = None
    length: int | None = None
    vocab_size: int | None = None
    bos: int | None = None
    llc: tuple[str, ...] = ()
    watch: tuple[str, ...] = ()
    steps: str = "all"
    pattern: str | None = None
    prefix: str | None = None
    dtype: str = "float32"
    seed: int | None = None
    allow_pickle: bool = False
    forget: bool = False
    workers: int = 1
    threads: int | None = None
    engine: str = "processes"
    options: tuple[str, ...] = ()
    shard: str = "1/1"
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("watch", "llc", "options"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.preset is not None and self.preset not in PRESETS:
            raise DataError(f"there is no preset {self.preset!r}: those are {', '.join(PRESETS)}")
        if (self.preset is None) != (self.tokens is None):
            raise DataError("--preset and --tokens go together: the preset's probe batch is read from the tokens' file")
        if self.preset is None and self.source is None:
            raise DataError("nothing to measure: give --source script.py:name, or --preset standard with --tokens FILE")
        if self.llc and self.preset is None:
            raise DataError(
                "--llc has the settings of a preset's LLC: add --preset, or put the LLC among the source's watches"
            )
        for name in ("workers", "threads", "sequences", "length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.engine not in ENGINES:
            raise DataError(f"there is no engine {self.engine!r}: those are {', '.join(ENGINES)}")
        if self.options and self.engine == "processes":
            raise DataError("--option is of the engines ray and slurm: add --engine, or leave it out")
        pairs(self.llc, "llc"), pairs(self.options, "option")
        if self.dtype not in DTYPES:
            raise DataError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        part = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if not part or not 1 <= int(part[1]) <= int(part[2]):
            raise DataError(f"shard must be i/n with i from 1 to n, such as 1/4, got {self.shard!r}")

    @classmethod
    def read(cls, path: Path | None, given: Mapping[str, Any]) -> Plan:
        """The plan of a TOML file, with what is `given` (not None) in place of the file's values."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        if path is not None:
            try:
                values = tomllib.loads(path.read_text())
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
                raise DataError(f"{path} cannot be read as TOML ({error})") from None
        for key, value in values.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                raise DataError(f"{path} has an unknown key {key!r}" + (f", perhaps {near[0]!r}" if near else "")
                                + f": the keys are {', '.join(known)}")  # fmt: skip
            wanted = str(known[key].type).partition("[")[0]  # of a tuple, not of what is in it
            kinds = tuple(kind for kind in (str, bool, int, tuple) if kind.__name__ in wanted)
            if not isinstance(tuple(value) if isinstance(value, list) else value, kinds) or (
                isinstance(value, bool) and bool not in kinds
            ):
                raise DataError(f"{path}: {key} must be {known[key].type}, got {value!r}")
        values |= {key: value for key, value in given.items() if value is not None}
        if lacking := [key for key in ("series", "into") if key not in values]:
            raise DataError(f"no {' and no '.join(lacking)}: devmon measure SERIES --into RUN, or the keys of --config")
        return cls(**values)

    def record(self) -> dict[str, Any]:
        """The configuration to keep in the run: what is not None, without how the work is divided."""
        return {
            key: value for key, value in dataclasses.asdict(self).items() if key not in HOW and value not in (None, ())
        }

    def absolute(self) -> Plan:
        """The plan with whole paths, for processes that start in another folder."""
        found: dict[str, Any] = {}
        for name in ("series", "into", "tokens", "tokenizer", "source"):
            value = getattr(self, name)
            place, colon, rest = (value or "").partition(".py:") if name == "source" else (value or "", "", "")
            if value is not None and "://" not in value and (name == "into" or Path(place + colon[:3]).exists()):
                found[name] = str(Path(place + colon[:3]).resolve()) + colon[3:] + rest
        return dataclasses.replace(self, **found)


def pairs(texts: Sequence[str], what: str) -> dict[str, Any]:
    """NAME=VALUE by name; a value is a Python literal, or else the text itself.

    >>> pairs(["lr=3e-5", "partition=gpu"], "option")
    {'lr': 3e-05, 'partition': 'gpu'}
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier() or name in found:
            raise DataError(f"{what} takes NAME=VALUE, each name once, got {text!r}")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found
