"""`Plan`: what `devmon measure` measures and how, as plain values: its options and the keys of its --config file."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from devmon.errors import DataError

PRESETS = ("economy", "standard", "full", "features")
ENGINES = ("processes", "ray", "slurm")  # the modules of devmon.offline.engines
DTYPES = ("float32", "float64", "bfloat16", "float16")
NO_LLC = ("none",)  # --llc none
HOW = ("into", "workers", "shard", "device", "engine", "options", "forget")  # how it is done, not what is measured


def option(help: str, default: Any = MISSING, *, among: Sequence[str] = (), **more: Any) -> Any:
    """A field of a plan with what the command line says of it: `help`, its `flag` and what it is `also` called, `min`,
    `metavar`, `show_default`.

    `among` are the values that it may have.
    """
    return field(default=default, metadata={"help": help, "among": among, **more})


@dataclass(frozen=True)
class Plan:
    """What is measured on which checkpoints, as plain values: the options of `devmon measure`, and its --config file.

    `source` names the model, the watches or both (`devmon.offline.source.load_study`), `preset` watches for a language
    model with the probe batch that `tokens` holds or is made of (`devmon.offline.probe_text`), and with an LLC where
    `llc` has its settings (NAME=VALUE). Watches are measured at all checkpoints that `steps` chooses; with `schedule`
    those of a source are at their own steps of them, as in training. `stage` and `branch` choose among the checkpoints
    (`Series`). `dtype` and no model are for checkpoints that bring their architecture. `options` (NAME=VALUE) are the
    engine's own. Raises DataError for values that do not go together.
    """

    series: str = option("A folder of checkpoints, or owner/name on the Hugging Face hub.", metavar="SERIES")
    into: str = option("The run to write into, made where there is none.", metavar="RUN")
    source: str | None = option(
        "path/to/script.py:name or package.module:name: the model, the watches, or (model, watches).", None
    )
    preset: str | None = option(
        "economy, standard, full or features: the usual watches for a language model.", None, among=PRESETS,
        show_default="standard, where there are tokens",
    )  # fmt: skip
    tokens: str | None = option(
        "The preset's probe batch: tokens (batch, pos) in a .npy, .pt or .safetensors file; or text to make it of: a "
        "file, a folder, a dataset on disk.", None, metavar="PATH", also="--data",
    )  # fmt: skip
    tokenizer: str | None = option(
        "What makes tokens of text: a folder, or owner/name on the hub.", None, show_default="the series'"
    )
    sequences: int | None = option("Sequences of the probe batch.", None, min=1, show_default="64 of text")
    length: int | None = option("Tokens of a sequence.", None, min=2, show_default="256 of text")
    vocab_size: int | None = option("Of the preset's random tokens.", None, min=2, show_default="the model's")
    bos: int | None = option("The token that stands first, for the preset.", None, min=0)
    llc: tuple[str, ...] = option(
        "Add an LLC with this setting (repeatable), as in nbeta=30; examples=N is the number of its sequences.",
        (), metavar="NAME=VALUE", show_default="those published for the model of the suite; none leaves it out",
    )  # fmt: skip
    watch: tuple[str, ...] = option("Only this watch (repeatable).", ())
    steps: str = option("all, log:40, every:100, 0,10,20, 100-500, or several with commas.", "all")
    schedule: bool = option("Measure the source's watches at their own steps alone, as in training.", False)
    pattern: str | None = option("A regular expression with one group: the step in the checkpoints' names.", None)
    stage: str | None = option("One stage of the training, by its own count.", None, show_default="all")
    branch: str | None = option("An ingredient or a seed, by name.", None)
    allow_twins: bool = option("Measure steps whose files are the same, and mark them in the run.", False)
    prefix: str | None = option("What the checkpoints' keys start with (net.), where several would do.", None)
    dtype: str = option("Of models that the checkpoints bring themselves.", "float32", among=DTYPES)
    seed: int | None = option("The run's seed.", None, show_default="the run's, or 0")
    allow_pickle: bool = option("Read checkpoints that hold more than weights, which runs code they hold.", False)
    forget: bool = option("Keep no revision of the hub on disk once it is measured.", False)
    workers: int = option("Processes, tasks or jobs at once: one thread each, or one GPU each.", 1, min=1)
    threads: int | None = option(
        "CPU threads of each.", None, min=1, show_default="torch's of a single process, else 1"
    )
    engine: str = option("processes of this machine, ray or slurm.", "processes", among=ENGINES)
    options: tuple[str, ...] = option(
        "Of the engine (repeatable), as in num_gpus=1 (ray) or slurm_partition=gpu (slurm).",
        (), flag="--option", metavar="NAME=VALUE",
    )  # fmt: skip
    shard: str = option("Do this part of N, for any scheduler of jobs.", "1/1", metavar="I/N")
    device: str | None = option("Where the model is put.", None, show_default="cuda where there is one")

    def __post_init__(self) -> None:
        for name in ("watch", "llc", "options"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        # each value by itself, as its field says
        for entry in dataclasses.fields(self):
            value, among, least = getattr(self, entry.name), entry.metadata["among"], entry.metadata.get("min")
            if among and value is not None and value not in among:
                raise DataError(f"there is no {entry.name} {value!r}: those are {', '.join(among)}")
            if least is not None and value is not None and value < least:
                raise DataError(f"{entry.name} must be at least {least}, got {value}")
        part = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if not part or not 1 <= int(part[1]) <= int(part[2]):
            raise DataError(f"shard must be i/n with i from 1 to n, such as 1/4, got {self.shard!r}")
        pairs(() if self.llc == NO_LLC else self.llc, "llc"), pairs(self.options, "option")
        # and those that need one another
        if self.preset is None and self.source is None and self.tokens is not None:
            object.__setattr__(self, "preset", "standard")
        if (self.preset is None) != (self.tokens is None):
            raise DataError("--preset and --tokens go together: the preset's probe batch is read from the tokens' file")
        if self.preset is None and self.source is None:
            raise DataError("nothing to measure: give --source script.py:name, or --tokens FILE for the usual watches")
        if self.llc and self.preset is None:
            raise DataError(
                "--llc has the settings of a preset's LLC: add --preset, or put the LLC among the source's watches"
            )
        if self.options and self.engine == "processes":
            raise DataError("--option is of the engines ray and slurm: add --engine, or leave it out")

    @classmethod
    def read(cls, path: Path | None, given: Mapping[str, Any]) -> Plan:
        """The plan of a TOML file, with what is `given` (not None, not an empty list) in place of the file's values."""
        values = {} if path is None else _from_file(path)
        values |= {key: value for key, value in given.items() if value not in (None, [])}
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
        whole: dict[str, Any] = {}
        for name in ("series", "into", "tokens", "tokenizer", "source"):
            value = getattr(self, name) or ""
            path, colon, rest = value.partition(".py:") if name == "source" else (value, "", "")
            path += colon[:3]  # the .py is the script's, the colon is not
            if value and "://" not in value and (name == "into" or Path(path).exists()):
                whole[name] = str(Path(path).resolve()) + colon[3:] + rest
        return dataclasses.replace(self, **whole)


FIELD_TYPES = get_type_hints(
    Plan
)  # name to type of its fields: str, int, bool, tuple[str, ...], and str or int with None
WORDS = {str: "a string", int: "an integer", bool: "true or false", tuple[str, ...]: "a list of strings"}


def kind_of(name: str) -> Any:
    """The type of a field's values, None left out of it.

    >>> kind_of("seed"), kind_of("watch")
    (<class 'int'>, tuple[str, ...])
    """
    kind = FIELD_TYPES[name]
    return (
        next(kept for kept in get_args(kind) if kept is not type(None)) if isinstance(kind, types.UnionType) else kind
    )


def _from_file(path: Path) -> dict[str, Any]:
    """The values of a TOML file, each a field's name and of its type."""
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path} cannot be read as TOML ({error})") from None
    for key, value in values.items():
        if key not in FIELD_TYPES:
            near = difflib.get_close_matches(key, FIELD_TYPES, 1)
            hint = f", perhaps {near[0]!r}" if near else ""
            raise DataError(f"{path} has an unknown key {key!r}{hint}: the keys are {', '.join(FIELD_TYPES)}")
        kind = kind_of(key)
        strings = isinstance(value, list) and all(isinstance(part, str) for part in value)
        if not (strings if kind == tuple[str, ...] else type(value) is kind):  # so that true is no integer
            raise DataError(f"{path}: {key} must be {WORDS[kind]}, got {value!r}")
    return values


def pairs(texts: Sequence[str], what: str) -> dict[str, Any]:
    """NAME=VALUE by name; a value is a Python literal, or else the text itself.

    >>> pairs(["lr=3e-5", "partition=gpu"], "option")
    {'lr': 3e-05, 'partition': 'gpu'}
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier() or name in values:
            raise DataError(f"{what} takes NAME=VALUE, each name once, got {text!r}")
        try:
            values[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[name] = value
    return values
