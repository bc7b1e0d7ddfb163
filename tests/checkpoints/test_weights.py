"""Weights in files: the same from every kind, nothing run, damage and misfits refused by name."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from devmon import DataError
from devmon.checkpoints.series import Series
from devmon.checkpoints.weights import fitting, read_state
from devmon.offline.source import with_weights
from tests.support.checkpoints import STATE, save
from tests.support.synthetic import Run


class Ran:
    """A payload that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_each_kind_of_file_gives_the_same_weights(tmp_path: Path) -> None:
    save(tmp_path / "a.pt")
    save(tmp_path / "b.ckpt", {"state_dict": STATE, "epoch": 3, "optimizer_states": [{"x": torch.ones(3)}]})
    save(tmp_path / "c.pth", {"model_state_dict": STATE, "step": 7})
    save_file(STATE, tmp_path / "d.safetensors")
    save(tmp_path / "e" / "pytorch_model.bin")
    save(tmp_path / "e" / "optimizer.pt", {"weight": torch.zeros(1, 4)})
    (tmp_path / "f").mkdir()
    for n, key in enumerate(STATE):
        save_file({key: STATE[key]}, tmp_path / "f" / f"model-{n}.safetensors")
    index = {"weight_map": {key: f"model-{n}.safetensors" for n, key in enumerate(STATE)}}
    (tmp_path / "f" / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("a.pt", "b.ckpt", "c.pth", "d.safetensors", "e", "f"):
        found = read_state(tmp_path / name)
        assert found.keys() == STATE.keys(), name
        assert all(torch.equal(found[key], STATE[key]) for key in STATE), name


def test_code_in_a_checkpoint_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    save(tmp_path / "step1.pt", {"state_dict": STATE, "extra": Ran(tmp_path / "ran")})
    (tmp_path / "step2.pt").write_bytes(pickle.dumps({"state_dict": {}, "extra": Ran(tmp_path / "ran")}, protocol=2))
    for step in (1, 2):
        with pytest.raises(DataError, match="holds more than weights|cannot be read"):
            Series.open(tmp_path).read(step)
        assert not (tmp_path / "ran").exists()
    assert torch.equal(Series.open(tmp_path, allow_pickle=True).read(1).state["weight"], STATE["weight"])
    assert (tmp_path / "ran").exists()


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.pt", {"weight": torch.randn(100, 100)}).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10  # among the numbers: only the checksum tells
    save_file(STATE, tmp_path / "whole.safetensors")
    damaged = {
        "half.pt": whole[: len(whole) // 2],
        "flipped.pt": bytes(flipped),
        "empty.pt": b"",
        "text.pt": b"no weights here",
        "half.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:-3],
        "empty.safetensors": b"",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="cannot be read") as caught:
            read_state(tmp_path / name)
        assert name in str(caught.value)
    for content, said in {"a list": [1, 2], "no tensor": {"epoch": 3}}.items():
        save(tmp_path / "foreign.pt", said)
        with pytest.raises(DataError, match="holds no weights"):
            read_state(tmp_path / "foreign.pt")
        assert content
    (tmp_path / "shards" / "global_step5").mkdir(parents=True)
    save(tmp_path / "shards" / "global_step5" / "mp_rank_00_model_states.pt")
    with pytest.raises(DataError, match="zero_to_fp32"):
        read_state(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(DataError, match=r"gone.safetensors cannot be read"):
        read_state(tmp_path / "shards")


def test_shards_of_a_distributed_checkpoint_are_joined_and_run_nothing(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, dtype=torch.bfloat16))
    state = model.state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    for name, content in {
        "step1": state,
        "step2": {"model": state, "optim": optimizer, "step": 2, "seen": torch.tensor(5)},
        "step3": {"app": {"model": state, "optim": optimizer}},
    }.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(content, checkpoint_id=str(tmp_path / name / ("model" if name == "step1" else "")), no_dist=True)
        read = read_state(tmp_path / name)
        assert read.keys() == state.keys(), name
        assert all(torch.equal(value, state[key]) and value.dtype == state[key].dtype for key, value in read.items())
    metadata = tmp_path / "step2" / ".metadata"
    for content in (pickle.dumps(Ran(tmp_path / "ran")), b"", pickle.dumps({"state_dict_metadata": 3})):
        metadata.write_bytes(content)
        with pytest.raises(DataError, match="metadata|cannot be read"):
            read_state(tmp_path / "step2")
    assert not (tmp_path / "ran").exists()
    metadata.unlink()
    with pytest.raises(DataError, match=r"shards of FSDP.*format_utils, where the .metadata"):
        read_state(tmp_path / "step2")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["mp_rank_00/model_optim_rng.pt"], "Megatron.*tools/checkpoint/convert.py"),
        (["layer_00-model_00-model_states.pt", "mp_rank_00_model_states.pt"], "GPT-NeoX.*convert_neox_to_hf"),
        (["zero_pp_rank_0_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"], "DeepSpeed.*zero_to_fp32.py"),
        (["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"], "DeepSpeed.*zero_to_fp32.py"),
        (["checkpoint_metadata.json", "model/a.safetensors"], "nanotron.*convert_nanotron_to_hf"),
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], ""),  # ZeRO 1, 2: weights whole
    ],
)
def test_shards_that_nothing_reads_name_their_converter(tmp_path: Path, files: list[str], said: str) -> None:
    for file in files:
        save(tmp_path / file, {"module": {"weight": torch.ones(2)}, "epoch": 3})
    if said:
        with pytest.raises(DataError, match=said):
            read_state(tmp_path)
    else:
        assert read_state(tmp_path)["weight"].tolist() == [1.0, 1.0]


def test_one_of_shared_names_is_enough_and_another_name_is_not() -> None:
    tied = torch.nn.Module()
    tied.one = torch.nn.Linear(2, 2, bias=False)
    tied.two = torch.nn.Linear(2, 2, bias=False)
    stored = {"net.one.weight": torch.ones(2, 2)}
    with pytest.raises(DataError, match=r"'two.weight' are missing"):
        fitting(tied, stored, "c")
    tied.two.weight = tied.one.weight
    found = fitting(tied, stored, "c")
    assert torch.equal(found["two.weight"], torch.ones(2, 2))
    assert torch.equal(found["one.weight"], torch.ones(2, 2))


def test_exports_of_sharded_trainings_are_read(tmp_path: Path) -> None:
    """What torch.distributed.checkpoint's and DeepSpeed's own converters write: one file, or shards with an index."""
    from torch.distributed.checkpoint import format_utils, state_dict_saver

    model = torch.nn.Linear(4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = {"model": model.state_dict(), "step": 7}
        state_dict_saver.save(content, checkpoint_id=str(tmp_path / "raw" / "step7"), no_dist=True)
        found = Series.open(tmp_path / "raw").read(7)
        assert all(torch.equal(found.state[key], value) for key, value in model.state_dict().items())
        assert [*found.files] == ["__0_0.distcp"]
        format_utils.dcp_to_torch_save(tmp_path / "raw" / "step7", tmp_path / "step7.pt")
    folder = tmp_path / "step8"  # zero_to_fp32.py global_step8 step8 --max_shard_size
    for n, (key, value) in enumerate(model.state_dict().items(), 1):
        save(folder / f"pytorch_model-0000{n}-of-00002.bin", {f"module.{key}": value})
    index = {f"module.{key}": f"pytorch_model-0000{n}-of-00002.bin" for n, key in enumerate(model.state_dict(), 1)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for step in (7, 8):
        found = fitting(model, Series.open(tmp_path).read(step).state, "c")
        assert {key: value.tolist() for key, value in found.items()} == {
            key: value.tolist() for key, value in model.state_dict().items()
        }
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(DataError, match="pytorch_model-00002-of-00002.bin cannot be read"):
        Series.open(tmp_path).read(8)


SAVE: dict[str, tuple[Callable[[], Any], str]] = {
    "two copies": (lambda: {f"{p}.weight": torch.zeros(1, 4) for p in ("net", "ema.net")}, "--prefix net."),
    "another layer": (lambda: {"net.weight": torch.zeros(1, 4), "net.bias": torch.zeros(1)}, "the model lacks 'bias'"),
    "other names": (
        lambda: {"a.w": torch.zeros(1, 4), "b.w": torch.zeros(2)},
        "its prefixes are 'a.', 'b.', none fits",
    ),
}


@pytest.mark.parametrize("case", SAVE)
def test_keys_fit_after_one_prefix_or_not_at_all(case: str, tmp_path: Path) -> None:
    make, said = SAVE[case]
    torch.save({"state_dict": make()}, tmp_path / "c.ckpt")
    with pytest.raises(DataError) as caught:
        with_weights(torch.nn.Linear(4, 1, bias=False), tmp_path / "c.ckpt")
    assert said in str(caught.value), str(caught.value)


def test_a_part_of_the_keys_says_which_are_missing_under_which_prefix(tmp_path: Path) -> None:
    state = {"net.weight": torch.zeros(1, 4), "net.bias": torch.zeros(1), "old.weight": torch.zeros(1, 4)}
    torch.save({"state_dict": {key: state[key] for key in ("net.weight", "old.weight")}}, tmp_path / "c.ckpt")
    with pytest.raises(DataError, match=r"'net.' 'bias' are missing.*'net.' \(1 of 2 keys\), 'old.' \(1 of 2 keys\)"):
        with_weights(torch.nn.Linear(4, 1), tmp_path / "c.ckpt")
    torch.save(
        {"state_dict": state | {"ema.net.weight": torch.ones(1, 4), "ema.net.bias": torch.ones(1)}}, tmp_path / "d.ckpt"
    )
    model = with_weights(torch.nn.Linear(4, 1), tmp_path / "d.ckpt", "ema.net.")
    assert model.weight.tolist() == [[1.0] * 4]
    with pytest.raises(DataError, match="under the prefix 'net' "):
        with_weights(torch.nn.Linear(4, 1), tmp_path / "d.ckpt", "net")


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    model, path = torch.nn.Linear(4, 1), tmp_path / "c.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": Run({})}, path)
    with pytest.raises(DataError, match="add_safe_globals"):
        with_weights(model, path)
    torch.save(model.state_dict(), path)
    with pytest.raises(DataError, match="no 'state_dict'"):
        with_weights(model, path)
    for content in (b"", b"PK\x03\x04 half a file"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            with_weights(model, path)
