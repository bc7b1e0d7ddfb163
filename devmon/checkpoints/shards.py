"""Checkpoints in shards, as they were trained: torch.distributed.checkpoint's are read, others name their converter."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from devmon.errors import DataError

# What lies in a folder -> who wrote it, and what writes whole weights of it.
CONVERTERS = {
    "**/layer_*-model_*-model_states.pt": ("GPT-NeoX", "GPT-NeoX's tools/ckpts/convert_neox_to_hf.py"),
    "**/mp_rank_*/model_optim_rng.pt": ("Megatron", "Megatron-LM's tools/checkpoint/convert.py"),
    "**/*zero_pp_rank_*": ("DeepSpeed", "zero_to_fp32.py, which DeepSpeed puts beside them"),
    "**/mp_rank_*_model_states.pt": ("DeepSpeed", "zero_to_fp32.py, which DeepSpeed puts beside them"),
    "checkpoint_metadata.json": ("nanotron", "nanotron's examples/llama/convert_nanotron_to_hf.py"),
    "**/*.distcp": ("FSDP", "torch.distributed.checkpoint.format_utils, where the .metadata of the save is"),
}
SAFE = {  # classes that the .metadata of torch.distributed.checkpoint is made of
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath"},
    "collections": {"OrderedDict", "defaultdict"},
}  # fmt: skip


def distributed(folder: Path) -> Path | None:
    """Where in a checkpoint's folder torch.distributed.checkpoint wrote; None where it did not."""
    held = [folder, *(folder / name for name in ("model", "pytorch_model_fsdp_0", "weights"))]
    return next((place for place in held if (place / ".metadata").is_file()), None)


def read_distributed(folder: Path, inside: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors that torch.distributed.checkpoint (FSDP, torchtitan, `dcp.save`) wrote, joined, by name.

    Where the saved dict has one of the keys `inside`, what is under it; the optimizer's are never read. Of the metadata
    only its own classes are unpickled, and no other pickled object. Raises DataError.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return _metadata(folder)

    try:
        metadata = _metadata(folder)
        # the path of each tensor in the dict that was saved
        paths = {
            key: tuple(map(str, (metadata.planner_data or {}).get(key, (key,))))
            for key, held in metadata.state_dict_metadata.items()
            if isinstance(held, TensorStorageMetadata)
        }
        paths = {key: path for key, path in paths.items() if not any(part.startswith("optim") for part in path)}
        names = {key: ".".join(path) for key, path in paths.items()}
        for word in inside:
            under = {key: path for key, path in paths.items() if word in path[:-1]}
            if under:
                names = {key: ".".join(path[path.index(word) + 1 :]) for key, path in under.items()}
                break
        held = metadata.state_dict_metadata
        state = {key: torch.empty(held[key].size, dtype=held[key].properties.dtype) for key in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, storage_reader=Reader(folder), no_dist=True)
    except DataError:
        raise
    except Exception as error:  # of files, pickles and the planner, each with classes of its own
        raise DataError(
            f"{folder} cannot be read by torch.distributed.checkpoint ({type(error).__name__}: {error}): restore it, "
            "or give another step"
        ) from error
    if not state:
        raise DataError(f"{folder} holds no tensors besides the optimizer's")
    return {names[key]: value for key, value in state.items()}


def refuse_shards(folder: Path) -> None:
    """Raises DataError for a folder of shards that nothing here reads, with what writes whole weights of it."""
    for pattern, (writer, converter) in CONVERTERS.items():
        if any(folder.glob(pattern)):
            raise DataError(
                f"{folder} holds the shards of {writer} as they were trained: write whole weights first ({converter}), "
                "and measure those"
            )


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module == "torch" or name in SAFE.get(module, ()) else None
        if found is not None and (name in SAFE.get(module, ()) or isinstance(found, torch.dtype)):
            return found
        raise DataError(
            f"the .metadata of a distributed checkpoint holds an object of {module}.{name}, which running code could "
            "hide in: write whole weights first (torch.distributed.checkpoint.format_utils), if you trust it"
        )


def _metadata(folder: Path) -> Any:
    with (folder / ".metadata").open("rb") as file:
        metadata = _Unpickler(file).load()
    if getattr(metadata, "storage_meta", None) is None:
        from torch.distributed.checkpoint.metadata import StorageMeta

        metadata.storage_meta = StorageMeta()
    return metadata
