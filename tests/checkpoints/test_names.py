"""The step in a name: units, stages, seeds and counts; read whole or refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from devmon import DataError
from devmon.checkpoints.axis import axis
from devmon.checkpoints.names import number
from devmon.checkpoints.weights import fitting, read_state
from tests.support.checkpoints import save


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["multiberts-seed_0-step_20k", "multiberts-seed_0-step_1000k"], [20_000, 1_000_000]),
        (["Llama-1.1B-intermediate-step-50K-105b", "Llama-1.1B-intermediate-step-1431k-3T"], [50_000, 1_431_000]),
        (["step1M", "step2.5M.safetensors"], [1_000_000, 2_500_000]),
        (["step_1_000.pt", "step_20_000.pt"], [1000, 20_000]),
        (["step1e3.pt", "step2e4_ema.pt"], [1000, 20_000]),
        (["checkpoint-750step", "checkpoint-1500step"], [750, 1500]),
        (["stage1-step1000-tokens3B", "stage1-step2000-tokens5B"], [1000, 2000]),
        (["step-125000", "step-001000-2BT"], [1000, 125_000]),
        (["epoch=3-step=100-val_loss=0.30.ckpt", "step=200.v2.ckpt", "model_step_7.pt"], [7, 100, 200]),
    ],
)
def test_names_are_read_whole(names: list[str], steps: list[int]) -> None:
    assert [*axis(names, "here").names] == steps


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["stage1-step5", "stage2-step9"], "stage2 in here begins at step 9, past step 5.*--stage stage2"),
        (["step5", "warmup-step3"], r"several stages or runs.*warmup \(warmup-step3\).*--stage warmup"),
        (["good-step5", "bad-step10"], "several stages or runs.*--stage bad"),
        (["step69369-seed-default", "step70000-seed-2"], "several branches or seeds.*--branch seed-2"),
        (["seed1/step5", "seed2/step10"], "several branches or seeds"),
        (["checkpoint_1_000.pt"], r"holds '1_000'.*'checkpoint_\\d\+_\(\\d\+\)'"),  # thousand, or epoch 1 and step 0
        (["checkpoint-1_100"], "where its step should be"),
        (
            ["ckpt_500.pt", "checkpoint_2500.pth"],
            "ckpt_500.pt beside checkpoints.*two kinds in one place.*'.checkpoint_",
        ),
        (["1000", "step5"], "1000 beside checkpoints"),
        (["step12abc.pt"], "holds '12abc'"),
        (["step1.5.pt"], "where its step should be"),
        (["step20kk.pt"], "where its step should be"),
        (["step1k.pt", "step1000.pt"], "two checkpoints of step 1000"),
    ],
)
def test_what_is_no_number_or_no_single_series_is_refused(names: list[str], said: str) -> None:
    with pytest.raises(DataError) as caught:
        axis(names, "here")
    assert re.search(said, str(caught.value)), caught.value


def test_the_pattern_of_a_refusal_chooses_one_kind() -> None:
    names = ["ckpt_500.pt", "ckpt_700.pt", "checkpoint_2500.pth", "checkpoint_3000.pth"]
    with pytest.raises(DataError) as caught:
        axis(names, "here")
    pattern = re.search(r"--pattern '(.*?)'", str(caught.value))
    assert pattern is not None
    read = axis(names, "here", pattern=pattern[1])
    assert {step: name.text for step, name in read.names.items()} == {2500: names[2], 3000: names[3]}
    assert read.left_out == dict.fromkeys(sorted(names[:2]), "not of the pattern")


def test_a_pattern_may_tell_stage_branch_and_tokens() -> None:
    names = ["a1_warm_s5_2B", "a1_warm_s9_4B", "a1_main_s3_1B", "a2_main_s3_1B"]
    pattern = r"^(?P<branch>a\d)_(?P<stage>warm|main)_s(?P<step>\d+)_(?P<tokens>\d+B)"
    with pytest.raises(DataError, match="several branches or seeds"):
        axis(names, "here", pattern=pattern)
    read = axis(names, "here", pattern=pattern, branch="a1", stage="warm")
    assert {step: (name.text, read.tokens[step]) for step, name in read.names.items()} == {
        5: ("a1_warm_s5_2B", 2 * 10**9),
        9: ("a1_warm_s9_4B", 4 * 10**9),
    }


@pytest.mark.parametrize(
    ("name", "pattern", "step"),
    [
        ("chck_10M", r"chck_(\w+)", 10_000_000),
        ("chck_10M", r"chck_(\d+)", 10_000_000),  # never its first digits
        ("train_00220B", r"train_(\d+)B", 220),  # the pattern says that the unit is none of the step's
        ("ep0-ba1000-rank0.pt", r"ba(\d+)", 1000),
        ("model_abc.pt", r"model_(\w+)", None),
        ("model_.pt", r"model_(\d*)", None),
        ("model.pt", r"model(\d+)?", None),
    ],
)
def test_a_pattern_finds_a_number_or_is_refused(name: str, pattern: str, step: int | None) -> None:
    if step is not None:
        assert [*axis([name], "here", pattern=pattern).names] == [step]
        return
    with pytest.raises(DataError, match=f"{name} in here holds .* where its step should be"):
        axis([name], "here", pattern=pattern)


def test_units_are_exact() -> None:
    assert [number(text) for text in ("2.5T", "0.1k", "1.0005k", "1e0", "00")] == [2_500_000_000_000, 100, None, 1, 0]


# -- what files hold -------------------------------------------------------------------------------------------------


class Extra:
    pass


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (np.float64(3.0), "numpy._core.multiarray.scalar"),
        (np.arange(3), "numpy._core.multiarray._reconstruct"),
        (Path("a"), "pathlib.PosixPath"),
        (Extra(), f"{__name__}.Extra"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_more_than_weights_is_refused_in_one_plain_line(tmp_path: Path, content: object, named: str) -> None:
    save(tmp_path / "a.ckpt", {"state_dict": {"w": torch.zeros(1)}, "extra": content})
    with pytest.raises(DataError) as caught:
        read_state(tmp_path / "a.ckpt")
    said = str(caught.value)
    assert f"an object of {named}: read it with --allow-pickle" in said
    assert "\x1b" not in said
    assert "\n" not in said
    assert read_state(tmp_path / "a.ckpt", allow_pickle=True)["w"].tolist() == [0.0]


@pytest.mark.parametrize("infix", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
def test_what_wrappers_put_into_names_does_not_count(tmp_path: Path, infix: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    state = model.state_dict()
    for rename in (
        lambda key: f"{infix}.{key}",
        lambda key: key.replace(".", f".{infix}.", 1),
        lambda key: f"module.{infix}." + key.replace(".", f".{infix}.", 1),
    ):
        save(tmp_path / "a.pt", {rename(key): value for key, value in state.items()})
        for prefix in (None, "module." if rename("0.x").startswith("module") else ""):
            found = fitting(model, read_state(tmp_path / "a.pt"), "a", prefix)
            assert all(torch.equal(found[key], value) for key, value in state.items())
    assert list(fitting(model, {f"{infix}.{key}": value for key, value in state.items()}, "a")) == list(state)
