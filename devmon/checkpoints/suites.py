"""The public suites of checkpoints and the local forms of names: how a name tells stage, step, tokens and branch.

A table, to be added to: `SUITES`. What a name says without a row of its own is in `names.read_plain`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

MEGATRON = "Megatron's tools/checkpoint/convert.py"


@dataclass(frozen=True)
class Suite:
    """A family of names.

    - `repository`: a regular expression of owner/name on the hub; "" for names that lie in folders only.
    - `form`: a regular expression of a whole name, its groups `step`, `stage`, `branch`, `tokens`; "" for what
      `read_plain` reads. A name without its group `step` belongs to the suite and has none.
    - `example`: names, as they are written there.
    - `unit`: what the number counts.
    - `stages`: stages in the order of training; a name without one is of the first. `goes_on` are those whose counter
      goes on from the stage before, `anew` says that all others begin at 0; without it the numbers tell.
    - `apart`: a branch begins elsewhere than at the end of the stage before, and is counted by itself.
    - `distinct`: nobody else is known to write such names, so that a folder of them is read by this row where words
      leave something open.
    - `steps`: those that each of its models has.
    - `each`: a name pattern of repositories that hold a step each; `commits`: commits of a branch are the checkpoints.
    - `refused`: why none of it can be read.
    - `llc`: settings of λ̂ by the size in the name, "" for all sizes; `source` is where they are published.
    """

    name: str
    repository: str
    example: str
    form: str = ""
    unit: str = "steps"
    stages: tuple[str, ...] = ()
    goes_on: tuple[str, ...] = ()
    anew: bool = False
    apart: bool = False
    distinct: bool = False
    steps: tuple[int, ...] = ()
    each: str = ""
    commits: bool = False
    refused: str = ""
    note: str = ""
    llc: tuple[tuple[str, dict[str, Any]], ...] = ()
    source: str = ""

    def settings(self, repository: str) -> dict[str, Any]:
        """The published settings of λ̂ for a repository's size; empty where there are none."""
        size = re.search(r"(?i)[-_](\d+(?:\.\d+)?[mb])(?=$|[-_])", repository)
        held = dict(self.llc)
        if not held or size is None:
            return {}
        return held.get("", {}) | held.get(size[1].lower(), {})


# λ̂ of Pythia, Urdshals et al. 2025 (2510.12077): one nbeta, gamma and number of draws, from the weights on, and a step
# size for each size, of which those below are known here. Of other sizes the LLC chooses lr and gamma itself.
_PYTHIA: dict[str, Any] = {"nbeta": 30, "batch_size": 32, "chains": 4, "draws": 100}
_PYTHIA_LR = {"14m": 1e-3, "1b": 3e-5, "1.4b": 3e-5, "2.8b": 1e-5, "6.9b": 3e-6}
PYTHIA_LLC = (
    ("", _PYTHIA),
    *((size, {"gamma": 300, "lr": lr, "burn_in": 0}) for size, lr in _PYTHIA_LR.items()),
)

SUITES = (
    Suite(
        "Pythia", r"EleutherAI/pythia-.*", "step0 step512 step143000", llc=PYTHIA_LLC,
        steps=(0, *(2**n for n in range(10)), *range(1000, 144_000, 1000)),
        source="Urdshals et al. 2025, 2510.12077",
        note="several sizes serve one model.safetensors on many branches: devmon audit",
    ),
    Suite("OLMo, OLMoE", r"allenai/OLMo(?:E|-1B|-7B).*", "step1000-tokens2B"),
    Suite("OLMo 2 early", r"allenai/OLMo-2-.*-early-training", "stage1-step1000-tokens3B"),
    Suite(
        "OLMo 2", r"allenai/OLMo-2-.*",
        "stage1-step1000-tokens3B stage2-ingredient2-step1000-tokens3B step150-tokens1B",
        r"(?:(?P<stage>stage\d+)-)?(?:(?P<branch>ingredient\d+)-)?step(?P<step>\d+)-tokens(?P<tokens>\d+[BT])",
        stages=("stage1", "stage2"), anew=True, distinct=True,
    ),
    Suite(
        "Olmo 3", r"allenai/Olmo-3-.*", "stage1-step1413814 stage2-step47684 stage3-step11921",
        r"(?P<stage>stage\d+)-step(?P<step>\d+)(?:-tokens(?P<tokens>\d+[BT]))?(?:-(?P<branch>[a-z][\w-]*))?",
        stages=("stage1", "stage2", "stage3"), anew=True, apart=True,
        note="mixes of stage2 begin at 2T tokens of stage1: each is counted by itself",
    ),
    Suite(
        "DataDecide", r"allenai/DataDecide-.*", "step69369-seed-default",
        r"step(?P<step>\d+)-(?P<branch>seed-[\w-]+)",
    ),
    Suite(
        "SmolLM3", r"HuggingFaceTB/SmolLM3-3B-checkpoints", "stage1-step-40000 lc-4k-to-32k-step-4000",
        r"(?P<stage>stage\d+|lc-\w+-to-\w+)-step-(?P<step>\d+)",
        stages=("stage1", "stage2", "stage3", "lc-4k-to-32k", "lc-32k-to-64k"), goes_on=("stage2", "stage3"),
        anew=True, distinct=True,
    ),
    Suite("SmolLM2", r"HuggingFaceTB/SmolLM2-.*-intermediate-checkpoints", "step-125000"),
    Suite("FineWeb ablations", r"HuggingFaceFW/ablation-model-.*", "step-001000-2BT"),
    Suite(
        "Apertus", r"swiss-ai/Apertus-.*", "step50000-tokens210B longctx-step125",
        r"(?:(?P<stage>longctx)-)?step(?P<step>\d+)(?:-tokens(?P<tokens>\d+[BT]))?",
        stages=("", "longctx"), anew=True, distinct=True,
    ),
    Suite(
        "Lucie", r"OpenLLM-France/Lucie-7B.*", "step0753851 extension_step0000250",
        r"(?:(?P<stage>extension)_)?step(?P<step>\d+)", stages=("", "extension"), anew=True, distinct=True,
    ),
    Suite(
        "CrystalCoder", r"LLM360/Crystal.*", "phase1_checkpoint_055500 phase2_checkpoint_214387",
        r"(?:CrystalCoder_)?(?P<stage>phase\d)_checkpoint_(?P<step>\d+)",
        stages=("phase1", "phase2", "phase3"), anew=True, distinct=True,
    ),
    Suite("Comma", r"common-pile/comma-v0\.1-.*", "stage1-step010000-tokens21B stage2-step002000-tokens4B"),
    Suite(
        "Ettin", r"jhu-clsp/ettin-.*", "step599525 ext1000 decay100",
        r"(?:step|(?P<stage>ext|decay))(?P<step>\d+)", stages=("", "ext", "decay"), anew=True, distinct=True,
    ),
    Suite("Mistral", r"stanford-crfm/.*gpt2.*", "checkpoint-1000"),
    Suite("BLOOM", r"bigscience/bloom-.*-intermediate", "global_step1000"),
    Suite("Amber, K2", r"LLM360/(?:Amber|K2).*", "ckpt_356", r"ckpt_(?P<step>\d+)", unit="checkpoints"),
    Suite("B-GPT", r"catherinearnett/B-GPT.*", "128000", r"(?P<step>\d[\d_]*)"),
    Suite("BabyLM", r"(?i:.*babylm.*)", "chck_10M", r"chck_(?P<step>\d+[kmb]?)", unit="words"),
    Suite(
        "Baichuan 2", r"baichuan-inc/Baichuan2-.*-Intermediate-Checkpoints", "train_00220B",
        r"train_(?P<step>\d+[BT])", unit="tokens",
    ),
    Suite(
        "MultiBERTs", r"google/multiberts-seed_\d+", "multiberts-seed_0-step_20k",
        r"multiberts-(?P<branch>seed_\d+)-step_(?P<step>\d+k?)", each="google/multiberts-seed_0-step_*",
    ),
    Suite(
        "TinyLlama", r"TinyLlama/TinyLlama-1\.1B", "TinyLlama-1.1B-intermediate-step-240k-503b",
        r"TinyLlama-1\.1B-(?:intermediate-)?step-(?P<step>\d+k)-(?:token-)?(?P<tokens>[\d.]+[bt])",
        each="TinyLlama/TinyLlama-1.1B-*step-*",
    ),
    Suite(
        "Pico", r"pico-lm/.*", "Saving HF Model -- Step 1000", r"Saving HF Model -- Step (?P<step>\d+)", commits=True,
        note="the commits of a branch: pico-lm/pico-decoder-tiny@BRANCH",
    ),
    Suite(
        "Marin", r"marin-community/.*", "phoenix",
        refused="its revisions have the names of phases (phoenix) and tell no step",
    ),
    Suite(
        "MAP-Neo", r"m-a-p/neo.*", "Megatron shards",
        refused=f"its intermediate checkpoints are shards of Megatron: write whole weights first ({MEGATRON})",
    ),
    # -- what trainers write into folders
    Suite("Lightning, NeMo", "", "epoch=3-step=100.ckpt"),
    Suite("Trainer, Megatron, torchtitan", "", "checkpoint-750 checkpoint-1500step iter_0002000 step-3000"),
    Suite(
        "fairseq", "", "checkpoint_1_1000.pt", r"checkpoint_\d+_(?P<step>0|[1-9]\d*)|checkpoint\d+",
        distinct=True, note="epoch and step; checkpoint1.pt is an epoch, without a step",
    ),
    Suite("Composer", "", "ep0-ba1000", r"ep\d+-ba(?P<step>\d+)(?:-rank0)?"),
    Suite("nanochat", "", "model_001000.pt", r"model_(?P<step>\d{6})|(?:optim|meta)_\d{6}.*"),
    Suite("nanotron", "", "1000", r"(?P<step>\d[\d_]*)"),
    Suite(
        "numbered checkpoints", "", "ckpt_500.pt checkpoint3.pt",
        r"(?:ckpt[-_=]?|checkpoint)(?P<step>\d\w*)", unit="checkpoints",
        note="a number, which may count steps, saves or epochs",
    ),
)  # fmt: skip


def suite_of(repository: str) -> Suite | None:
    """The suite that a repository of the hub belongs to.

    >>> suite_of("allenai/OLMo-2-1124-7B").name, suite_of("gpt2/none")
    ('OLMo 2', None)
    """
    return next((suite for suite in SUITES if suite.repository and re.fullmatch(suite.repository, repository)), None)
