"""Series of checkpoints: what is listed, read, and refused, in folders and on a stand-in of the hub."""

from __future__ import annotations

import json
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from devmon import DataError, Trajectory, Watch, every, observe
from devmon.checkpoints import series as module
from devmon.checkpoints.pretrained import causal_lm
from devmon.checkpoints.selection import select
from devmon.checkpoints.series import Checkpoint, Series
from devmon.checkpoints.weights import fitting, read_state
from devmon.instruments import ProbeLoss
from devmon.offline.probe_text import read_probe
from tests.anatomy.test_anatomy_sites import family
from tests.offline.test_measure import measure, rows, same
from tests.offline.test_tokens import text_of, tokenizer
from tests.support.hub import Hub, commit

__all__ = ["tokenizer"]  # a fixture

STATE = {"weight": torch.arange(4.0)[None], "bias": torch.tensor([0.5])}


def save(path: Path, content: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(STATE if content is None else content, path)
    return path


class Ran:
    """A payload that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def error(where: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        Series.open(where, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000100.ckpt", 100),
        ("epoch=3-step=100.ckpt", 100),
        ("epoch=3-step=100-val_loss=0.30.ckpt", 100),
        ("step100.pt", 100),
        ("model_step_7.safetensors", 7),
        ("checkpoint-123", 123),
        ("global_step1000", 1000),
        ("step1000-tokens4B", 1000),
        ("iter_20.pth", 20),
        ("last.ckpt", None),
        ("timestep100.pt", None),
        ("step100.txt", None),
    ],
)
def test_steps_are_found_in_the_usual_names_and_in_no_others(tmp_path: Path, name: str, step: int | None) -> None:
    save(tmp_path / "step-5.pt")
    if "." in name:
        save(tmp_path / name)
    else:
        (tmp_path / name).mkdir()
    assert Series.open(tmp_path).steps == sorted({5, *([] if step is None else [step])})


def test_steps_are_numbers_in_order_and_nothing_is_loaded_to_list_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1000, 0, 20, 3):
        save(tmp_path / "checkpoints" / f"step{step}.pt")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("loaded"))
    assert Series.open(tmp_path).steps == [0, 3, 20, 1000]  # the run's folder
    assert Series.open(tmp_path / "checkpoints").steps == [0, 3, 20, 1000]


def test_a_pattern_says_where_the_step_is(tmp_path: Path) -> None:
    for name in ("stage1-step5-tokens1B.pt", "stage2-step5-tokens1B.pt", "stage1-step9-tokens2B.pt"):
        save(tmp_path / name)
    assert "two checkpoints of step 5, stage1-step5-tokens1B.pt and stage2-step5" in error(tmp_path)
    assert "--pattern" in error(tmp_path)
    series = Series.open(tmp_path, pattern=r"^stage1-step(\d+)")
    assert series.steps == [5, 9]
    assert series.read(9).name == "stage1-step9-tokens2B.pt"
    assert "no regular expression" in error(tmp_path, pattern="(")
    assert "one group" in error(tmp_path, pattern=r"step\d+")


def test_what_is_no_series_is_told(tmp_path: Path) -> None:
    assert "holds a step (it has nothing)" in error(tmp_path)
    save(tmp_path / "a.pt")
    assert "holds a step (it has a.pt)" in error(tmp_path)
    assert "is a file" in error(tmp_path / "a.pt")
    assert "there is no folder" in error(tmp_path / "none")


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


def test_the_next_checkpoint_is_read_ahead_and_no_more_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(6):
        save(tmp_path / f"step{step}.pt")
    (tmp_path / "step3.pt").write_bytes(b"")
    started: list[int] = []
    threads, more = set(), threading.Semaphore(0)
    read = Series.read

    def recorded(self: Series, step: int) -> Checkpoint:
        threads.add(threading.current_thread().name)
        started.append(step)
        more.release()
        return read(self, step)

    monkeypatch.setattr(module.Series, "read", recorded)
    taken = []
    for n, (step, found) in enumerate(Series.open(tmp_path).stream(range(6))):
        for _ in range(2 if n == 0 else n < 5):
            assert more.acquire(timeout=5), f"nothing is read ahead of step {step}"
        taken.append((step, type(found).__name__))
        assert started == list(range(min(n + 2, 6))), f"at {step}"
    assert taken == [(s, "DataError" if s == 3 else "Checkpoint") for s in range(6)]
    assert all(name.startswith("prefetch") for name in threads), threads
    assert list(Series.open(tmp_path).stream([])) == []


# ---- Hugging Face ----


def pretrained(folder: Path, seed: int = 0, **more: Any) -> Any:
    model = family("gpt_neox", seed)
    model.save_pretrained(folder, **more)
    return model


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Hub], Hub]]:
    """Puts a stand-in in the hub's place: what talks to it is huggingface_hub itself."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with ExitStack() as stack:

        def start(hub: Hub) -> Hub:
            url = stack.enter_context(hub.serving())
            monkeypatch.setattr(constants, "ENDPOINT", url)
            monkeypatch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
            )
            return hub

        yield start


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
    assert series.tokenizer() == ("lab/model", "step143000")
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


def test_revisions_of_olmo_are_told_apart(tmp_path: Path, serve: Callable[[Hub], Hub]) -> None:
    names = ["main", "stage1-step1000-tokens5B", "stage1-step150-tokens1B", "stage2-ingredient1-step1000-tokens3B"]
    serve(Hub(tmp_path, names[:2], names[2:]))
    assert "two checkpoints of step 1000" in error("lab/model")
    assert Series.open("lab/model", pattern=r"^stage1-step(\d+)").steps == [150, 1000]
    serve(Hub(tmp_path, ["step1000-tokens4B", "step0-tokens0B"]))
    assert Series.open("lab/model").steps == [0, 1000]


def test_exports_of_sharded_trainings_are_read(tmp_path: Path) -> None:
    """What torch.distributed.checkpoint's and DeepSpeed's own converters write: one file, or shards with an index."""
    from torch.distributed.checkpoint import format_utils, state_dict_saver

    model = torch.nn.Linear(4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = {"model": model.state_dict(), "step": 7}
        state_dict_saver.save(content, checkpoint_id=str(tmp_path / "raw" / "step7"), no_dist=True)
        with pytest.raises(DataError, match="holds the shards of DeepSpeed or FSDP: write whole weights"):
            Series.open(tmp_path / "raw").read(7)
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


# ---- which steps ----

HELD = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 144_000, 1000)]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", HELD),
        ("every:50000", [0, 50_000, 100_000]),
        ("1, 0,512", [0, 1, 512]),
        ("100-1000", [128, 256, 512, 1000]),
        ("142000-", [142_000, 143_000]),
        ("0,64-128,every:143000", [0, 64, 128, 143_000]),
        ("log:2", [0, 1, 143_000]),
        ("log:4", [0, 1, 64, 3000, 143_000]),
    ],
)
def test_steps_are_chosen(text: str, chosen: list[int]) -> None:
    assert select(HELD, text) == chosen


@pytest.mark.parametrize(
    ("text", "retried"),
    [
        ("3", "no checkpoint of step 3"),
        ("some", "expected all, log:40"),
        ("log:0", "expected all"),
        ("129-200", "choose none of 0, 1, 2, 4, 8, 16, 32, 64, … 143000"),
        ("", "cannot be read"),
    ],
)
def test_steps_that_cannot_be_chosen_are_told(text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        select(HELD, text)
