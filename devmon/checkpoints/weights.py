"""Weights in files: read without running code that they hold, and laid over a model that they fit."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from devmon.checkpoints.names import SUFFIXES
from devmon.checkpoints.shards import distributed, read_distributed, refuse_shards
from devmon.errors import DataError

State = dict[str, torch.Tensor]
INSIDE = ("state_dict", "model_state_dict", "model", "module")  # of a training checkpoint: what holds the weights
WHOLE = ("model.safetensors", "pytorch_model.bin")  # of a folder, its shards named in ….index.json
WRAPPED = r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\."
WHOLE_STATES = "mp_rank_00_model_states.pt"  # of DeepSpeed: all weights, where it did not cut them


def read_state(path: Path, allow_pickle: bool = False, kind: str | None = None) -> State:
    """The tensors that a file, or a folder as Hugging Face writes it, holds by name, on the CPU.

    `.safetensors`; `.ckpt`, `.pt`, `.pth`, `.bin` of `torch.save`: a state dict, or one under the key state_dict,
    model, model_state_dict or module. Of a folder the model alone is read: model.safetensors, pytorch_model.bin or
    their shards (`kind` "safetensors" or "bin" says which), or what torch.distributed.checkpoint wrote. `allow_pickle`
    unpickles files that hold more than tensors, which runs code they hold. Raises DataError.
    """
    if path.is_dir():
        parts = files_of(path, kind)
        if (place := distributed(path)) is not None and parts and parts[0].suffix == ".distcp":
            return plain_names(read_distributed(place, INSIDE))
        return {key: value for part in parts for key, value in read_state(part, allow_pickle).items()}
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return plain_names(load_file(path))
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None
    content = load(path, allow_pickle)
    if isinstance(content, nn.Module):
        content = content.state_dict()
    for key in INSIDE:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    entries = content if isinstance(content, dict) else {}
    state = {key: value for key, value in entries.items() if isinstance(value, torch.Tensor)}
    if not state:
        held = _list(content) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path} holds no weights: expected a state dict, or one under {', '.join(INSIDE)}; it holds {held}"
        )
    return plain_names(state)


def plain_names(state: Mapping[str, torch.Tensor]) -> State:
    """The tensors under names without what compiling, FSDP and checkpointed activations put into them."""
    plain = {re.sub(WRAPPED, "", key): value for key, value in state.items()}
    return plain if len(plain) == len(state) else dict(state)


def load(path: Path, allow_pickle: bool = False) -> Any:
    """What `torch.save` wrote. Only tensors and plain values are accepted, unless `allow_pickle`."""
    try:
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):  # torch.load does not look
            raise OSError(f"{part} fails its checksum")
        return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        if (held := re.search(r"GLOBAL (\S+)", str(error))) is None:  # bytes that are no pickle at all
            raise _unreadable(path, error) from None
        raise DataError(
            f"{path} holds more than weights, an object of {held[1]}: read it with --allow-pickle if you trust it, for "
            "that runs code in it; or keep objects out of it (save_hyperparameters(ignore=[...])), or allow their "
            "classes with torch.serialization.add_safe_globals in SOURCE"
        ) from None
    except Exception as error:  # damaged bytes raise whatever they meet
        raise _unreadable(path, error) from None


def fitting(model: nn.Module, stored: State, name: str, prefix: str | None = None) -> State:
    """The tensors of `stored`, which `name` holds, under the names that `model` gives them.

    Each key of the model is a key of the checkpoint after one prefix that is common to all (none, `net.`, `model.`),
    and there are no others after that prefix; of tensors that the model shares under several names one is enough.
    `prefix` says which where several would do. What wrappers put into names (`_orig_mod.`) does not count. Raises
    DataError where names or shapes differ.
    """
    stored, prefix = plain_names(stored), None if prefix is None else re.sub(WRAPPED, "", prefix)
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    shared = _shared(model)
    # the prefix: that after which the checkpoint has the model's keys, all of them and no others
    counts = _prefixes(own, stored)
    tried = [*counts] if prefix is None else [prefix]
    whole = []
    for start in tried:
        there = _under(start, stored)
        there |= {key for key in own if shared.get(key, {key}) & there}
        if there == own.keys():
            whole.append(start)
    if len(whole) > 1:
        raise DataError(f"{name} holds these weights under {_list(whole)}: say which, as in --prefix {whole[0]}")
    if not whole:
        differ = _misfit([*own], [*stored], counts, next(iter(tried), ""))
        raise DataError(f"{name} does not hold the weights of {type(model).__name__}: {differ}")
    # the tensors under the model's names
    state = {}
    for key, value in own.items():
        held = next(whole[0] + k for k in (key, *sorted(shared.get(key, ()))) if whole[0] + k in stored)
        state[key] = stored[held]
        if state[key].shape != value.shape:
            raise DataError(
                f"{held} has shape {tuple(state[key].shape)} in {name}, {tuple(value.shape)} in "
                f"{type(model).__name__}: make the model as it was trained"
            )
    return state


def _shared(model: nn.Module) -> dict[str, set[str]]:
    """Each name of a parameter that has several, with all of them."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def files_of(place: Path, kind: str | None = None) -> list[Path]:
    """The files that hold the model of a folder, or the file itself. `kind` prefers "safetensors" or "bin".

    Raises DataError where there are none, where they are shards of which no whole weights can be read, and for several
    files without an index.
    """
    if not place.is_dir():
        return [place]
    for name in sorted(WHOLE, key=lambda name: kind is not None and not name.endswith(kind)):
        if (place / name).is_file():
            return [place / name]
        index = place / f"{name}.index.json"
        if index.is_file():
            try:
                return sorted({place / part for part in json.loads(index.read_text())["weight_map"].values()})
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise _unreadable(index, error) from None
    if (shards := distributed(place)) is not None:
        return sorted(shards.glob("*.distcp"))
    held = sorted(path for path in place.iterdir() if path.suffix in SUFFIXES)
    states = [path for path in held if path.name == WHOLE_STATES]
    cut = [path for path in held if "model_states" in path.name and path not in states]
    if states and not cut:
        return states
    refuse_shards(place)
    if len(held) != 1:
        files = _list(path.name for path in place.iterdir()) or "nothing"
        raise DataError(f"{place} holds no {' and no '.join(WHOLE)}, nor a single file of weights; it holds {files}")
    return held


def _unreadable(path: Path, error: Exception) -> DataError:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch writes for terminals
    _, _, cause = text.partition("WeightsUnpickler error: ")
    reason = (cause or text).strip().partition("\n")[0] or type(error).__name__
    return DataError(f"{path} cannot be read ({reason}): restore it, or give another step")


def _prefixes(own: Iterable[str], stored: Iterable[str]) -> Counter[str]:
    """Each prefix after which a stored key is one of the model's, with the number of such keys, most first."""
    names, counts = set(own), Counter[str]()
    for key in stored:
        starts = [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")]
        counts.update(key[:start] for start in starts if key[start:] in names)
    return Counter(dict(counts.most_common()))


def _under(prefix: str, stored: Iterable[str]) -> set[str]:
    return {key.removeprefix(prefix) for key in stored if key.startswith(prefix)}


def _misfit(own: list[str], stored: list[str], counts: Counter[str], prefix: str) -> str:
    """What differs under `prefix`, and which other prefixes there are."""
    there = _under(prefix, stored)
    missing = [key for key in own if key not in there]
    unknown = sorted(there.difference(own)) if len(missing) < len(own) else []
    words = [f"under the prefix {prefix!r} {_list(missing)} are missing"] if missing else []
    words += [f"the model lacks {_list(unknown)} of what is under the prefix {prefix!r}"] if unknown else []
    fits = [f"{other!r} ({count} of {len(own)} keys)" for other, count in counts.items()]
    tops = sorted({key.partition(".")[0] + "." for key in stored})
    words.append(f"prefixes that fit: {', '.join(fits)}" if fits else f"its prefixes are {_list(tops)}, none fits")
    return "; ".join(words) + ". Return from SOURCE the model that was trained"


def _list(names: Iterable[str], limit: int = 6) -> str:
    names = [*map(repr, names)]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
