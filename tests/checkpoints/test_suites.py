"""The names of public suites, each right on the hub and in a folder, or refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from devmon import DataError
from devmon.checkpoints.axis import axis
from devmon.checkpoints.series import Series
from devmon.checkpoints.suites import PYTHIA_LLC, SUITES, suite_of

B = 10**9
# repository: names -> step, stage, tokens in billions; what else lies there is left out
RIGHT: dict[str, dict[str, tuple[int, str, float | None]]] = {
    "EleutherAI/pythia-160m-data-seed2": {"step0": (0, "", None), "step512": (512, "", None)},
    "EleutherAI/pythia-70m": {"step1": (1, "", None), "step143000": (143_000, "", None)},
    "allenai/OLMo-1B-0724-hf": {"step1000-tokens2B": (1000, "", 2), "step1454000-tokens3048B": (1_454_000, "", 3048)},
    "allenai/OLMoE-1B-7B-0924": {"step5000-tokens20B": (5000, "", 20), "step10000-tokens41B": (10_000, "", 41)},
    "allenai/OLMo-2-0425-1B-early-training": {
        "stage1-step0-tokens0B": (0, "stage1", 0), "stage1-step1000-tokens3B": (1000, "stage1", 3),
    },
    "allenai/OLMo-2-1124-7B": {  # a name without its stage is of the first
        "step150-tokens1B": (150, "stage1", 1), "stage1-step928646-tokens3896B": (928_646, "stage1", 3896),
    },
    "allenai/Olmo-3-1025-7B": {
        "stage1-step1413814": (1_413_814, "stage1", None), "stage2-step47684": (1_461_498, "stage2", None),
        "stage3-step11921": (1_473_419, "stage3", None),
    },
    "HuggingFaceTB/SmolLM3-3B-checkpoints": {  # stages 1 to 3 have one counter, those of the context their own
        "stage1-step-40000": (40_000, "stage1", None), "stage2-step-3480000": (3_480_000, "stage2", None),
        "stage3-step-4720000": (4_720_000, "stage3", None),
        "lc-4k-to-32k-step-4000": (4_724_000, "lc-4k-to-32k", None),
        "lc-32k-to-64k-step-20000": (4_744_000, "lc-32k-to-64k", None),
    },
    "HuggingFaceTB/SmolLM2-1.7B-intermediate-checkpoints": {"step-125000": (125_000, "", None)},
    "HuggingFaceFW/ablation-model-fineweb-v1": {"step-001000-2BT": (1000, "", 2), "step-002000-4BT": (2000, "", 4)},
    "swiss-ai/Apertus-8B-2509": {
        "step50000-tokens210B": (50_000, "", 210), "step2627139-tokens15T": (2_627_139, "", 15_000),
        "longctx-step125": (2_627_264, "longctx", None),
    },
    "OpenLLM-France/Lucie-7B": {
        "step0753851": (753_851, "", None), "extension_step0000250": (754_101, "extension", None),
    },
    "LLM360/CrystalCoder": {
        "phase1_checkpoint_055500": (55_500, "phase1", None), "phase2_checkpoint_214387": (269_887, "phase2", None),
        "phase3_checkpoint_027728": (297_615, "phase3", None),
    },
    "common-pile/comma-v0.1-1t": {
        "stage1-step010000-tokens21B": (10_000, "stage1", 21), "stage1-step460000-tokens965B": (460_000, "stage1", 965),
        "stage2-step002000-tokens4B": (462_000, "stage2", 969),
    },
    "LLM360/Amber": {"ckpt_000": (0, "", None), "ckpt_356": (356, "", None)},
    "catherinearnett/B-GPT_en_nl": {"0": (0, "", None), "128000": (128_000, "", None)},
    "BabyLM-community/babylm-baseline-100m-gpt2": {"chck_1M": (10**6, "", None), "chck_10M": (10**7, "", None)},
    "baichuan-inc/Baichuan2-7B-Intermediate-Checkpoints": {
        "train_00220B": (220 * B, "", 220), "train_02420B": (2420 * B, "", 2420),
    },
    "stanford-crfm/alias-gpt2-small-x21": {"checkpoint-1000": (1000, "", None)},
    "bigscience/bloom-560m-intermediate": {"global_step1000": (1000, "", None)},
    "jhu-clsp/ettin-decoder-400m": {
        "step599525": (599_525, "", None), "ext1000": (600_525, "ext", None), "decay100": (600_625, "decay", None),
    },
    # folders only, of repositories that hold a step each and of trainers
    "multiberts": {
        "multiberts-seed_0-step_20k": (20_000, "", None), "multiberts-seed_0-step_1000k": (1_000_000, "", None),
    },
    "tinyllama": {
        "TinyLlama-1.1B-step-50K-105b": (50_000, "", 105),
        "TinyLlama-1.1B-intermediate-step-480k-1T": (480_000, "", 1000),
        "TinyLlama-1.1B-intermediate-step-955k-token-2T": (955_000, "", 2000),
        "TinyLlama-1.1B-intermediate-step-1195k-token-2.5T": (1_195_000, "", 2500),
    },
    "olmo-folder": {
        "olmo-2-1124-7b-stage1-step300000-tokens1259b": (300_000, "stage1", 1259),
        "olmo-2-1124-7b-stage2-step1000-tokens5b": (301_000, "stage2", 1264),
    },
    "lightning": {"epoch=3-step=100-val_loss=0.30": (100, "", None), "epoch=4-step=200-val_loss=0.2": (200, "", None)},
    "nemo": {
        "megatron_gpt--val_loss=2.1-step=1000-consumed_samples=256000.0": (1000, "", None),
        "megatron_gpt--val_loss=2.0-step=2000-consumed_samples=512000.0": (2000, "", None),
    },
    "megatron": {"iter_0001000": (1000, "", None), "iter_0002000": (2000, "", None)},
    "trainer": {"checkpoint-750step": (750, "", None), "checkpoint-1500step": (1500, "", None)},
    "fairseq": {"checkpoint_1_1000": (1000, "", None), "checkpoint_2_2500": (2500, "", None)},
    "composer": {"ep0-ba1000": (1000, "", None), "ep1-ba2000": (2000, "", None)},
    "composer-files": {"ep0-ba1000-rank0": (1000, "", None), "ep1-ba2000-rank0": (2000, "", None)},
    "nanochat": {"model_000500": (500, "", None), "model_021400": (21_400, "", None)},
    "nanotron": {"1000": (1000, "", None), "12000": (12_000, "", None)},
    "ckpts": {"ckpt_500": (500, "", None), "ckpt_1000": (1000, "", None)},
}  # fmt: skip
UNITS = {"LLM360/Amber": "checkpoints", "BabyLM-community/babylm-baseline-100m-gpt2": "words", "ckpts": "checkpoints"}
UNITS["baichuan-inc/Baichuan2-7B-Intermediate-Checkpoints"] = "tokens"
BESIDE = {"HuggingFaceTB/SmolLM3-3B-checkpoints": ["it-SFT"], "fairseq": ["checkpoint_last", "checkpoint1"]}
BESIDE["nanochat"] = ["optim_000500_rank0"]
BESIDE["allenai/OLMo-2-1124-7B"] = ["stage2-ingredient1-step1000-tokens5B", "stage2-ingredient2-step1000-tokens5B"]
BESIDE["allenai/Olmo-3-1025-7B"] = ["stage2-step47684-mix-round5-from-2T-ckpt", "stage3-step0"]


@pytest.mark.parametrize("repository", RIGHT)
@pytest.mark.parametrize("hub", [True, False])
def test_names_are_right_and_what_is_left_out_is_named(repository: str, hub: bool) -> None:
    right, beside = RIGHT[repository], ["main", *BESIDE.get(repository, [])]
    suite = suite_of(repository) if hub else None
    assert (suite is not None) == (hub and "/" in repository)
    read = axis([*right, *beside], repository, suite=suite)
    told = {n.text: (s, n.stage, None if (t := read.tokens[s]) is None else t / B) for s, n in read.names.items()}
    assert told == right
    assert [*read.names] == sorted(read.names)
    assert sorted(read.left_out) == sorted(beside)
    assert read.unit == UNITS.get(repository, "steps")
    said = " ".join(read.said())
    assert all(name in said for name in beside)
    assert (f"the names count {read.unit}" in said) == (read.unit != "steps")
    assert all(f"begin at {offset}" in said for offset in read.offsets.values() if offset)


def test_an_ingredient_goes_on_from_the_stage_before_it_and_a_mix_does_not() -> None:
    names = [*RIGHT["allenai/OLMo-2-1124-7B"], *BESIDE["allenai/OLMo-2-1124-7B"]]
    for suite in (suite_of("allenai/OLMo-2-1124-7B"), None):
        read = axis(names, "x", suite=suite, branch="ingredient2")
        assert [(s, n.branch) for s, n in read.names.items()] == [(150, ""), (928_646, ""), (929_646, "ingredient2")]
        assert read.tokens[929_646] == 3901 * B
        assert [*read.left_out] == [BESIDE["allenai/OLMo-2-1124-7B"][0]]
    names = [*RIGHT["allenai/Olmo-3-1025-7B"], *BESIDE["allenai/Olmo-3-1025-7B"]]
    for suite in (suite_of("allenai/Olmo-3-1025-7B"), None):
        assert [*axis(names, "x", suite=suite, branch="mix-round5-from-2T-ckpt").names] == [47_684]
    with pytest.raises(DataError, match=r"no branch 'ingredient9': those are mix-round5.* \(1\)"):
        axis(names, "x", branch="ingredient9")


def test_seeds_are_chosen_by_name() -> None:
    names = ["step0-seed-default", "step1250-seed-default", "step1250-seed-small-aux-2", "step5-seed-large-aux-3"]
    for suite in (suite_of("allenai/DataDecide-c4-150M"), None):
        with pytest.raises(DataError, match=r"seed-default \(2\), seed-large-aux-3 \(1\), seed-small-aux-2 \(1\)"):
            axis(names, "x", suite=suite)
        assert [*axis(names, "x", suite=suite, branch="seed-default").names] == [0, 1250]
        assert [*axis(names, "x", suite=suite, branch="seed-small-aux-2").names] == [1250]
        assert [*axis(names[:2], "x", suite=suite).names] == [0, 1250]


def test_a_stage_is_chosen_by_its_own_count() -> None:
    names = [*RIGHT["allenai/Olmo-3-1025-7B"]]
    read = axis(names, "x", suite=suite_of("allenai/Olmo-3-1025-7B"), stage="stage2")
    assert ([*read.names], read.offsets) == ([47_684], {"stage2": 0})
    assert read.left_out == {"stage1-step1413814": "of stage1", "stage3-step11921": "of stage3"}
    assert [*axis(["step9", "warmup-step5"], "x", stage="main").names] == [9]
    with pytest.raises(DataError, match=r"no stage 'stage9': those are stage1 \(stage1-step1413814\)"):
        axis(names, "x", stage="stage9")


def test_counters_are_told_by_the_numbers_or_refused() -> None:
    assert [*axis(["stage1-step5", "stage1-step9", "stage2-step3"], "x").names] == [5, 9, 12]
    assert [*axis(["phase2_checkpoint_214387", "phase3_checkpoint_027728"], "x").names] == [214_387, 242_115]
    said = axis(["stage2-step5", "stage3-step3"], "x").said()
    assert "steps count from the start of stage2" in said
    with pytest.raises(DataError, match="goes on or counts anew"):
        axis(["stage1-step5", "stage2-step9"], "x")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("marin-community/marin-8b-base", "names of phases"),
        ("m-a-p/neo_7b", "Megatron.*convert.py"),
        ("google/multiberts-seed_0", r"a repository for each step.*google/multiberts-seed_0-step_\*"),
        ("TinyLlama/TinyLlama-1.1B", "a repository for each step"),
    ],
)
def test_suites_that_are_no_series_are_refused_with_the_reason(where: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        Series.open(where)
    assert re.search(said, str(caught.value)), caught.value


def test_a_folder_of_two_kinds_is_refused(tmp_path: Path) -> None:
    for name in ("ckpt_500.pt", "checkpoint_2500.pth"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="ckpt_500.pt beside checkpoints that name their step"):
        Series.open(tmp_path)


def test_rows_of_the_table_read_their_own_examples() -> None:
    for suite in SUITES:
        if suite.refused:
            continue
        names = [suite.example] if suite.commits else suite.example.split()
        read = axis(names, suite.name, suite=suite)
        assert {name.text for name in read.names.values()} | set(read.left_out) == set(names), suite.name
        assert read.names, suite.name
        assert suite.stages or not suite.goes_on, suite.name


def test_published_settings_are_those_of_the_size() -> None:
    pythia = suite_of("EleutherAI/pythia-1.4b-deduped")
    assert pythia is not None
    assert pythia.settings("EleutherAI/pythia-1.4b-deduped") == {
        "nbeta": 30, "batch_size": 32, "chains": 4, "draws": 100, "gamma": 300, "lr": 3e-5, "burn_in": 0,
    }  # fmt: skip
    assert pythia.settings("EleutherAI/pythia-14m-seed3")["lr"] == 1e-3
    assert "lr" not in pythia.settings("EleutherAI/pythia-70m")  # none known: it is chosen
    assert "gamma" not in dict(PYTHIA_LLC)[""]
    assert suite_of("EleutherAI/gpt-neo-125m") is None
