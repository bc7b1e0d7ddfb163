"""`devmon measure` on language models: presets on folders of Hugging Face, and a suite of the hub by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from devmon import IdentityError, Trajectory, Watch, every, observe
from devmon.checkpoints.series import Series
from devmon.instruments import ProbeLoss
from devmon.offline.plan import Plan
from devmon.offline.probe_text import read_probe
from devmon.offline.study import Study
from tests.anatomy.test_anatomy_sites import family
from tests.support.hub import Hub
from tests.support.offline_toys import (
    measure,
    rows,
    same,
    text_of,
)


def test_a_preset_measures_hugging_face_folders_by_themselves(language: Path, tmp_path: Path) -> None:
    config = tmp_path / "study.toml"
    config.write_text(f"""
series = {str(language / "hf")!r}
into = {str(tmp_path / "run.zarr")!r}
preset = "economy"
tokens = {str(language / "tokens.pt")!r}
watch = ["loss", "induction"]
steps = "all"
seed = 5
""")
    result = measure("--config", config, "--steps", "100-")
    assert result.exit_code == 0, result.output
    trajectory = Trajectory(tmp_path / "run.zarr", "r")
    assert {name: trajectory.steps(name) for name in trajectory} == {"induction": [100, 1000], "loss": [100, 1000]}
    (kept,) = trajectory.attrs["measured"]
    assert kept["steps"] == "100-"
    assert kept["watch"] == ["loss", "induction"]
    assert kept["dtype"] == "float32"
    assert kept["threads"] == torch.get_num_threads()
    assert "sha256:" in kept["tokens_held"]
    assert not {"workers", "shard", "into", "bos"} & kept.keys()
    for steps in ("100", "100-"):  # a plan stays when another is carried out after it, once however often it is
        assert measure("--config", config, "--steps", steps, "--workers", 1).exit_code == 0
    assert [plan["steps"] for plan in Trajectory(tmp_path / "run.zarr", "r").attrs["measured"]] == ["100", "100-"]
    assert trajectory.seed == 5
    for seed, step in enumerate([100, 1000], 1):
        alone = Trajectory(tmp_path / f"{step}.zarr", seed=5)
        plan = Plan.read(config, {"into": str(tmp_path / f"{step}.zarr")})
        observe(step, family("gpt_neox", seed), Study(plan).watches, alone)
        same({name: dataset.sel(step=[step]) for name, dataset in rows(tmp_path / "run.zarr").items()},
             {name: dataset.reindex_like(alone[name]) for name, dataset in rows(alone.path).items()})  # fmt: skip


def test_another_plan_for_the_same_run_is_refused_before_anything_is_loaded(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (language / "hf", "--into", tmp_path / "run.zarr", "--preset", "economy", "--watch", "loss")
    assert measure(*command, "--tokens", language / "tokens.pt", "--steps", "0").exit_code == 0
    other = torch.load(language / "tokens.pt", weights_only=True).flip(0)
    torch.save(other, tmp_path / "other.pt")
    monkeypatch.setattr(Series, "read", lambda *_: pytest.fail("loaded"))
    with pytest.raises(IdentityError, match="tokens: stored"):
        raise measure(*command, "--tokens", tmp_path / "other.pt").exception  # type: ignore[misc]


def pretrained(folder: Path, seed: int = 0, **more: Any) -> Any:
    model = family("gpt_neox", seed)
    model.save_pretrained(folder, **more)
    return model


@pytest.mark.parametrize("forget", [[], ["--forget"]], ids=str)
def test_a_suite_of_the_hub_is_measured_by_its_name(
    tmp_path: Path, serve: Callable[[Hub], Hub], tokenizer: str, forget: list[str]
) -> None:
    """As EleutherAI/pythia-70m is: a tokenizer in each revision, and one of them damaged."""
    repository, names = tmp_path / "repository", ["step0", "step1", "step1000"]
    for seed, name in enumerate(names):
        pretrained(repository / name, seed)
        for file in Path(tokenizer).iterdir():
            (repository / name / file.name).write_bytes(file.read_bytes())
    whole = (repository / "step1" / "model.safetensors").read_bytes()
    (repository / "step1" / "model.safetensors").write_bytes(whole[:-9])
    serve(Hub(repository, ["main", *names]))
    (tmp_path / "text.txt").write_text(text_of(range(400)))
    run = tmp_path / "run.zarr"
    result = measure("lab/model", "--into", run, "--preset", "economy", "--tokens", tmp_path / "text.txt",
                     "--sequences", 4, "--length", 12, "--watch", "loss", *forget)  # fmt: skip
    assert result.exit_code == 1
    assert "step 1 skipped (" in result.output, result.output
    assert "2 rows measured, 1 checkpoints skipped" in result.output
    assert bool([*(tmp_path / "cache").rglob("model.safetensors")]) == (not forget)
    alone = Trajectory(tmp_path / "alone.zarr")
    probe = read_probe(tmp_path / "text.txt", (tokenizer, None), 4, 12)
    for seed, step in ((0, 0), (2, 1000)):
        observe(step, family("gpt_neox", seed), [Watch("loss", ProbeLoss(probe.tokens), every(1))], alone)
    same(rows(run), rows(alone.path))
