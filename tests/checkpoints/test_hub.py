"""Models on a stand-in of the Hugging Face hub, and checkpoints that bring their own architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from devmon import DataError
from devmon.checkpoints.pretrained import causal_lm
from devmon.checkpoints.series import Series
from devmon.checkpoints.weights import read_state
from tests.anatomy.test_anatomy_sites import family
from tests.support.checkpoints import save
from tests.support.hub import Hub, commit


def error(where: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        Series.open(where, **options)
    return str(caught.value)


def pretrained(folder: Path, seed: int = 0, **more: Any) -> Any:
    model = family("gpt_neox", seed)
    model.save_pretrained(folder, **more)
    return model


def test_revisions_of_the_hub_are_a_series(tmp_path: Path, serve: Callable[[Hub], Hub]) -> None:
    repository = tmp_path / "repository"
    models = {name: pretrained(repository / name, seed) for seed, name in enumerate(["step0", "step512"])}
    (repository / "step9").mkdir()
    torch.save(models["step0"].state_dict(), repository / "step9" / "pytorch_model.bin")
    (repository / "step9" / "config.json").write_text((repository / "step0" / "config.json").read_text())
    hub = serve(Hub(repository, ["main", "step0", "step143000", "step512", "step9"]))
    series = Series.open("lab/model")
    assert series.steps == [0, 9, 512, 143000]
    assert series.pretrained
    assert series.tokenizer() == ("lab/model", commit("step143000"))
    assert not [path for path in hub.requests if "resolve" in path], "downloaded to list the steps"
    read = series.read(512)
    model = causal_lm(read, series.config())
    expected = models["step512"].state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert not model.training
    asked = " ".join(hub.requests)
    assert f"/lab/model/resolve/{commit('step512')}/model.safetensors" in asked
    assert f"{commit('step0')}/model.safetensors" not in asked
    assert causal_lm(series.read(9), series.config()).state_dict().keys() == expected.keys()
    with pytest.raises(DataError, match=r"lab/model@step143000 cannot be downloaded \(\w+: "):
        series.read(143000)
    assert "the hub lists no revisions" in error("lab/none")


def test_a_revision_is_kept_or_forgotten_and_checked(tmp_path: Path, serve: Callable[[Hub], Hub]) -> None:
    model = pretrained(tmp_path / "repository" / "step0")
    serve(Hub(tmp_path / "repository", ["step0"]))
    read = Series.open("lab/model", forget=True).read(0)
    assert read.folder is not None
    assert (read.folder / "config.json").is_file()
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]
    causal_lm(read, Series.open("lab/model").config())
    folder = read.folder
    state = read.state
    del read
    assert not folder.exists()
    assert torch.equal(state["gpt_neox.embed_in.weight"], model.gpt_neox.embed_in.weight)
    Series.open("lab/model").read(0)
    (file,) = (tmp_path / "cache").rglob("model.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.resolve().write_bytes(content)
    with pytest.raises(DataError, match=r"lab/model@step0 is damaged on this disk: model.safetensors"):
        Series.open("lab/model").read(0)


def test_revisions_of_olmo_are_told_apart(tmp_path: Path, serve: Callable[[Hub], Hub]) -> None:
    names = ["main", "stage1-step1000-tokens5B", "stage1-step150-tokens1B", "stage2-ingredient1-step1000-tokens3B"]
    serve(Hub(tmp_path, names[:2], names[2:]))
    series = Series.open("lab/model")
    assert (series.steps, series.axis.offsets) == ([150, 1000], {"stage1": 0})
    assert series.axis.left_out[names[3]] == "of ingredient1: --branch ingredient1"
    series = Series.open("lab/model", branch="ingredient1")
    assert series.steps == [150, 1000, 2000]
    assert series.stage == {150: "stage1", 1000: "stage1", 2000: "stage2"}
    assert series.tokens == {150: 10**9, 1000: 5 * 10**9, 2000: 8 * 10**9}
    assert Series.open("lab/model", pattern=r"^stage1-step(\d+)").steps == [150, 1000]
    serve(Hub(tmp_path, ["step1000-tokens4B", "step0-tokens0B"]))
    assert Series.open("lab/model").steps == [0, 1000]


def test_commits_of_a_branch_and_repositories_of_a_step_each_are_series(
    tmp_path: Path, serve: Callable[[Hub], Hub]
) -> None:
    models = {name: pretrained(tmp_path / "pico" / name, seed) for seed, name in enumerate(["a", "b"])}
    titles = {"Saving Logs -- Step 1000": "b", "Saving HF Model -- Step 1000": "b", "Saving HF Model -- Step 0": "a"}
    repositories = ["pico-lm/pico-decoder-tiny", "pico-lm/other"]
    (tmp_path / "pico").rename(tmp_path / "pico-decoder-tiny")
    serve(Hub(tmp_path, ["main"], repositories=repositories, titles=titles))
    series = Series.open("pico-lm/pico-decoder-tiny@run-1")
    assert series.steps == [0, 1000]
    assert [*series.axis.left_out] == ["Saving Logs -- Step 1000"]
    assert Series.open("pico-lm/pico-decoder-tiny").steps == [0, 1000]
    read = series.read(1000)
    assert read.commit == commit("b")
    assert torch.equal(read.state["gpt_neox.embed_in.weight"], models["b"].gpt_neox.embed_in.weight)

    names = [f"multiberts-seed_{seed}-step_{step}" for seed in (0, 1) for step in ("20k", "1000k")]
    for seed, name in enumerate(names):
        models[name] = pretrained(tmp_path / "bert" / name / "main", seed)
    serve(Hub(tmp_path / "bert", ["main"], repositories=[f"google/{name}" for name in names]))
    series = Series.open("google/multiberts-seed_0-step_*")
    assert series.steps == [20_000, 1_000_000]
    read = series.read(1_000_000)
    assert read.name == f"google/{names[1]}@main"
    assert torch.equal(read.state["gpt_neox.embed_in.weight"], models[names[1]].gpt_neox.embed_in.weight)
    assert "several branches or seeds" in error("google/multiberts-*")
    assert Series.open("google/multiberts-*", branch="seed_1").steps == [20_000, 1_000_000]
    assert "no repository google/nothing-*" in error("google/nothing-*")
    assert "lists no commits of lab/none@main" in error("lab/none@main")


def test_a_checkpoint_that_is_not_whole_or_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pretrained(tmp_path / "step1")
    pretrained(tmp_path / "step2", 1)
    pretrained(tmp_path / "step3", 2)
    state = read_state(tmp_path / "step2")
    lost, cut = sorted(state)[2:4]
    save_file({key: value for key, value in state.items() if key != lost}, tmp_path / "step2" / "model.safetensors")
    save_file(state | {cut: torch.zeros(3)}, tmp_path / "step3" / "model.safetensors")
    other = family("gpt_neox")
    other.config.num_attention_heads *= 2
    other.save_pretrained(tmp_path / "step4")
    pretrained(tmp_path / "step5")
    (tmp_path / "step5" / "config.json").write_text('{"model_type": "nothing-that-is-known"}')
    pretrained(tmp_path / "step6")
    (tmp_path / "step6" / "config.json").unlink()
    save(tmp_path / "step7.pt")
    series = Series.open(tmp_path)
    assert series.pretrained
    before = torch.get_rng_state()
    causal_lm(series.read(1), series.config())
    assert torch.equal(before, torch.get_rng_state())
    for step, said in {
        2: "step2 lacks weights",
        3: rf"step3 holds weights of other shapes.*: {cut} \(3,\) for \(",
        4: "step4 is of another model.*num_attention_heads: there",
        5: "step5 brings no architecture",
        6: r"step6 brings no architecture that transformers knows \(FileNotFoundError",
        7: "step7.pt brings no architecture.*single file",
    }.items():
        with pytest.raises(DataError, match=said):
            causal_lm(series.read(step), series.config())
