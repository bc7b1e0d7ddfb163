"""`devmon measure`: the numbers of training from its checkpoints, what is skipped and said, and several processes."""

from __future__ import annotations

import multiprocessing.forkserver
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

from devmon import (
    DataError,
    DevmonError,
    IdentityError,
    InstrumentError,
    Snapshot,
    Trajectory,
    Watch,
    every,
    observe,
)
from devmon.callbacks import CheckpointSeries, Monitor
from devmon.checkpoints.series import Series
from devmon.cli.root import app
from devmon.instruments import LLC, ProbeLoss
from devmon.monitoring.fingerprint import identity
from devmon.offline import forecast
from devmon.offline.engines import forkserver
from devmon.offline.engines import processes as workers
from devmon.offline.in_parts import in_parts
from devmon.offline.plan import Plan
from devmon.offline.source import load_study
from devmon.offline.study import Progress, Study
from devmon.sampling import regression_loss
from tests.anatomy.test_anatomy_sites import VOCAB, family
from tests.support.lightning_toys import Net, Norm, train

SCRIPT = """
import torch

from devmon import Watch, every
from devmon.instruments import LLC
from devmon.callbacks import Monitor
from tests.support.lightning_toys import Net, Norm

def loss(model, batch):
    x, y = batch
    return torch.nn.functional.cross_entropy(model(x), y, reduction="none")

def watches():
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    llc = LLC((x, (x[:, 0] > 0).long()), loss, nbeta=20, gamma=10, lr=1e-3, chains=2, draws=5, burn_in=2, batch_size=8)
    return [Watch("norm", Norm(), every(1)), Watch("llc", llc, every(3))]

def study():
    return Net(), watches()

def model():
    return Net()

def monitored():
    return Net(), Monitor("unused", watches(), model="net")

def nothing():
    return 3
"""


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of training, its monitor's trajectory and its checkpoints at even steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "script.py").write_text(SCRIPT)
    names: dict[str, Any] = {}
    exec(SCRIPT, names)
    names["loss"].__module__ = "_source_script"  # as the script's own
    torch.set_num_threads(1)
    monitor = Monitor(folder / "online.zarr", names["watches"]())
    train([monitor, CheckpointSeries(folder / "saved", every(2))])
    return folder


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*", "ignore:.*dataloader.*")


def measure(*args: object) -> Result:
    return CliRunner().invoke(app, ["measure", *map(str, args)])


def rows(run: Path | str) -> dict[str, xr.Dataset]:
    trajectory = Trajectory(run, "r")
    found = {name: trajectory[name].drop_vars("seconds") for name in trajectory}
    for dataset in found.values():
        dataset.attrs.pop("failures", None)  # of folded rows only
    return found


def same(one: dict[str, xr.Dataset], two: dict[str, xr.Dataset]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        xr.testing.assert_identical(one[name], two[name])


def test_checkpoints_give_the_rows_of_training_and_again_gives_nothing_more(trained: Path, tmp_path: Path) -> None:
    command = (trained / "saved", "--into", tmp_path / "run.zarr", "--source", f"{trained / 'script.py'}:study")
    result = measure(*command)
    assert result.exit_code == 0, result.output
    assert "10 rows measured" in result.output
    online, offline = rows(trained / "online.zarr"), rows(tmp_path / "run.zarr")
    assert offline["norm"]["step"].values.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert offline["llc"]["step"].values.tolist() == [0, 6, 12]
    same({name: online[name].sel(step=dataset["step"]) for name, dataset in offline.items()}, offline)
    again = measure(*command)
    assert again.exit_code == 0
    assert "7 of 7 checkpoints chosen; 0 to measure" in again.output
    same(offline, rows(tmp_path / "run.zarr"))


def test_the_run_of_training_is_filled_up_and_only_what_is_missing_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {}
    exec(SCRIPT, names)
    series, run = Series.open(trained / "saved"), tmp_path / "run.zarr"
    plan = Plan(str(trained / "saved"), str(run), f"{trained / 'script.py'}:monitored", watch=("norm",))
    Study(replace(plan, steps="0,4,10-")).measure()
    loaded: list[int] = []
    read = Series.read
    monkeypatch.setattr(Series, "read", lambda self, step: (loaded.append(step), read(self, step))[1])
    events: list[Progress] = []
    Study(plan).measure(tell=events.append)
    assert loaded == [2, 6, 8]
    assert events == [Progress("measured", step, "norm") for step in (2, 6, 8)]
    assert Trajectory(run, "r").steps("norm") == series.steps


def test_while_one_is_measured_only_the_next_is_in_memory(
    trained: Path, language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the model, whose weights the one that is measured has become."""
    alive: list[weakref.ref[Any]] = []
    counted: list[int] = []
    read, observed = Series.read, Study._observe

    def reading(self: Series, step: int) -> Any:
        found = read(self, step)
        alive.append(weakref.ref(found))
        return found

    def counting(self: Study, step: int, *args: Any) -> None:
        until = time.monotonic() + 5
        while len(alive) < min(self.steps.index(step) + 2, len(self.steps)) and time.monotonic() < until:
            time.sleep(0.001)
        counted.append(sum(one() is not None for one in alive))
        observed(self, step, *args)

    monkeypatch.setattr(Series, "read", reading)
    monkeypatch.setattr(Study, "_observe", counting)
    Study(Plan(str(trained / "saved"), str(tmp_path / "a.zarr"), f"{trained / 'script.py'}:study")).measure()
    assert counted == [1, 1, 1, 1, 1, 1, 0]
    alive.clear()
    pretrained = Plan(
        str(language / "hf"), str(tmp_path / "b.zarr"), preset="economy", tokens=str(language / "tokens.pt")
    )
    Study(pretrained).measure()
    assert counted[7:] == [1, 1, 0]


def test_the_part_that_a_monitor_measures_is_measured(trained: Path) -> None:
    model, watches = load_study(f"{trained / 'script.py'}:monitored")
    assert isinstance(model, torch.nn.Sequential)
    assert watches is not None
    assert [watch.name for watch in watches] == ["norm", "llc"]


def test_a_dry_run_prints_steps_watches_and_cost_and_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    command = (trained / "saved", "--into", tmp_path / "run.zarr", "--source", f"{trained / 'script.py'}:study")
    result = measure(*command, "--steps", "0,6-10", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "steps: 0, 6, 8, 10" in result.output
    lines = {line.split()[0]: line.split() for line in result.output.splitlines() if line.strip()}
    assert lines["norm"][1] == "Norm"
    assert lines["norm"][-3:] == ["4", "not", "told"]
    assert lines["llc"][1] == "LLC"
    assert "2" in lines["llc"]
    assert not (tmp_path / "run.zarr").exists()
    assert measure(*command, "--steps", "0-4").exit_code == 0
    kept = sorted(path for path in (tmp_path / "run.zarr").rglob("*"))
    assert "steps: 6, 8, 10, 12" in measure(*command, "--dry-run").output
    assert kept == sorted(path for path in (tmp_path / "run.zarr").rglob("*"))


def test_a_dry_run_tells_memory_and_time(
    language: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (language / "hf", "--into", tmp_path / "run.zarr", "--preset", "economy", "--tokens", language / "tokens.pt",
               "--llc", "nbeta=30", "--llc", "chains=2", "--llc", "draws=3", "--llc", "burn_in=0", "--llc", "batch_size=4")  # fmt: skip
    numbers = sum(p.numel() for p in family("gpt_neox").parameters())
    told = measure(*command, "--dry-run", "--workers", 2).output
    assert f"a copy of the weights is {numbers * 4 / 1e6:.3g} MB ({numbers:,} parameters, float32)" in told, told
    assert f"{numbers * 2 * 3 * 4 / 1e6:.3g} MB for 2 chains" in told, told
    assert "time: about " in told
    assert " with 2 at once, checkpoints' reading apart, from a forward pass on this machine's cpu (" in told
    half = measure(*command, "--dry-run", "--dtype", "bfloat16").output
    assert f"a copy of the weights is {numbers * 2 / 1e6:.3g} MB ({numbers:,} parameters, bfloat16)" in half
    assert not (tmp_path / "run.zarr").exists()
    assert measure(*command, "--steps", "0,100").exit_code == 0
    run = Trajectory(tmp_path / "run.zarr")
    taken = {name: float(run[name]["seconds"].mean()) for name in run}
    work = Study(Plan.read(None, {"series": str(language / "hf"), "into": str(tmp_path / "run.zarr"), "preset": "economy",
                                  "tokens": str(language / "tokens.pt"), "watch": ["loss", "weights"]}))  # fmt: skip
    monkeypatch.setattr(forecast, "_time", lambda seconds: f"{seconds:.9g} seconds")
    line = forecast.seconds(work, work.missing(), [])
    assert line == f"time: about {taken['loss'] + taken['weights']:.9g} seconds, checkpoints' reading apart, from the 4 rows that the run holds"  # fmt: skip
    other = measure(
        trained / "saved", "--into", tmp_path / "o.zarr", "--source", f"{trained / 'script.py'}:study", "--dry-run"
    )
    assert "time: not told before a checkpoint is measured: --steps 12 first" in other.output


def damaged(trained: Path, folder: Path) -> Path:
    """The checkpoints of `trained`, and between them some that cannot be measured."""
    saved = folder / "saved"
    saved.mkdir()
    for path in (trained / "saved").iterdir():
        if path.suffix == ".ckpt":
            (saved / path.name).write_bytes(path.read_bytes())
    whole = (saved / "step-00000002.ckpt").read_bytes()
    (saved / "step-00000002.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": torch.nn.Linear(5, 3).state_dict()}, saved / "step-00000004.ckpt")
    state = Net().state_dict() | {"net.0.weight": torch.zeros(16, 6)}
    torch.save({"state_dict": state}, saved / "step-00000006.ckpt")
    return saved


def test_checkpoints_that_cannot_be_measured_are_named_and_the_rest_is(trained: Path, tmp_path: Path) -> None:
    saved, run = damaged(trained, tmp_path), tmp_path / "run.zarr"
    command = (saved, "--into", run, "--source", f"{trained / 'script.py'}:study")
    result = measure(*command)
    assert result.exit_code == 1
    for said in (
        "step 2 skipped", "step-00000002.ckpt cannot be read",
        "step 4 skipped (step-00000004.ckpt does not hold the weights of",
        "step 6 skipped (net.0.weight has shape (16, 6) in step-00000006.ckpt, (16, 5)",
        "6 rows measured, 3 checkpoints skipped",
    ):  # fmt: skip
        assert said in result.output, result.output
    trajectory = Trajectory(run, "r")
    assert trajectory.steps("norm") == [0, 8, 10, 12]
    assert list(trajectory.failures("norm")) == [2, 4, 6]
    assert list(trajectory.failures("llc")) == [6]
    assert "checkpoint skipped: " in trajectory.failures("norm")[2]
    for path in (trained / "saved").iterdir():  # restored: the next call measures them
        (saved / path.name).write_bytes(path.read_bytes())
    result = measure(*command)
    assert result.exit_code == 0, result.output
    same(rows(run), {k: v.sel(step=rows(run)[k]["step"]) for k, v in rows(trained / "online.zarr").items()})
    assert Trajectory(run, "r").steps("norm") == [0, 2, 4, 6, 8, 10, 12]
    assert Trajectory(run, "r").failures("norm") == {}


@dataclass(frozen=True)
class FailsAt:
    step: int

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        if snapshot.step == self.step and not Path(snapshot.model.again).exists():  # type: ignore[arg-type]
            raise RuntimeError("no luck")
        return Norm()(snapshot)


def with_watches(monkeypatch: pytest.MonkeyPatch, model: Any, watches: list[Watch]) -> None:
    monkeypatch.setattr("devmon.offline.study.load_study", lambda source: (model, tuple(watches)))


def test_an_instrument_that_fails_is_recorded_and_tried_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    model.again = str(tmp_path / "again")
    with_watches(monkeypatch, model, [Watch("fails", FailsAt(4), every(1)), Watch("norm", Norm(), every(1))])
    command = (trained / "saved", "--into", tmp_path / "run.zarr", "--source", "x.py:y")
    result = measure(*command)
    assert result.exit_code == 1
    assert "step 4 fails: failed (RuntimeError: no luck)" in result.output
    assert "13 rows measured, 1 measurements failed" in result.output
    assert Trajectory(tmp_path / "run.zarr", "r").failures("fails") == {4: "RuntimeError: no luck"}
    (tmp_path / "again").touch()
    result = measure(*command)
    assert (result.exit_code, "1 rows measured:" in result.output) == (0, True), result.output
    assert Trajectory(tmp_path / "run.zarr", "r").steps("fails") == [0, 2, 4, 6, 8, 10, 12]


# ---- memory ----


class Full:
    """A model's hook that cannot hold more than `limit` examples at once."""

    def __init__(self, limit: int) -> None:
        self.limit, self.seen = limit, []  # type: ignore[var-annotated]

    def __call__(self, model: Any, args: Any, kwargs: Any) -> None:
        batch = (args or (kwargs["input_ids"],))[0]
        self.seen.append(len(batch))
        if len(batch) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


@dataclass(frozen=True, eq=False)
class Squeezed(ProbeLoss):
    limit: int = 10**6

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        snapshot.model.register_forward_pre_hook(Full(self.limit), with_kwargs=True)
        return super().__call__(snapshot)


@pytest.mark.parametrize(("limit", "told"), [(8, 0), (4, 1), (2, 2), (1, 3)])
def test_out_of_memory_is_tried_again_in_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, told: int
) -> None:
    tokens = torch.randint(VOCAB, (8, 9), generator=torch.Generator().manual_seed(0))
    model = family("gpt2")
    model.save_pretrained(tmp_path / "saved" / "step3")
    probe = Squeezed(tokens, batch_size=8, limit=limit)
    with_watches(monkeypatch, None, [Watch("loss", probe, every(1)), Watch("norm", Norm(), every(1))])
    events: list[Progress] = []
    Study(Plan(str(tmp_path / "saved"), str(tmp_path / "run.zarr"), "x.py:y")).measure(tell=events.append)
    found = [event for event in events if event.watch == "loss"]
    assert [event.kind for event in found] == [["measured"], ["retried", "measured"], ["retried", "retried", "measured"],
                                               ["retried", "retried", "failed"]][told]  # fmt: skip
    store = Trajectory(tmp_path / "run.zarr", "r")
    assert store.steps("norm") == [3]
    if told < 3:
        alone = Trajectory(tmp_path / "alone.zarr")
        observe(3, model, [Watch("loss", ProbeLoss(tokens, batch_size=8), every(1))], alone)
        for name in ("loss", "loss_se"):
            if name in alone["loss"]:
                torch.testing.assert_close(float(store["loss"][name][0]), float(alone["loss"][name][0]))
        assert store.failures("loss") == {}
    else:
        assert "OutOfMemoryError" in store.failures("loss")[3]


def test_chains_run_one_after_another_are_the_same_llc() -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    llc = LLC(
        (x, x @ torch.arange(4.0)[:, None]), regression_loss, nbeta=50, chains=4, draws=4, burn_in=1, batch_size=8
    )
    model = torch.nn.Linear(4, 1, bias=False)
    for parts in (2, 4):
        smaller = in_parts(llc, parts)
        assert smaller is not None
        assert identity(smaller) == identity(llc)
        assert smaller.of.batch_size == 8
        xr.testing.assert_allclose(smaller(Snapshot(0, model)), llc(Snapshot(0, model)), rtol=1e-6)
    assert in_parts(Norm(), 2) is None


# ---- language models ----


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    for seed, step in enumerate([0, 100, 1000]):
        family("gpt_neox", seed).save_pretrained(folder / "hf" / f"checkpoint-{step}")
    torch.save(torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(0)), folder / "tokens.pt")
    return folder


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


# ---- what is refused ----

REFUSED: dict[str, tuple[list[str], str]] = {
    "nothing to measure": ([], "nothing to measure: give --source"),
    "a preset alone": (["--preset", "standard"], "go together"),
    "tokens alone": (["--source", "S:study", "--tokens", "T"], "go together"),
    "no such preset": (["--preset", "huge", "--tokens", "T"], "those are economy, standard, full"),
    "no model": (["--preset", "economy", "--tokens", "T"], "bring no config.json"),
    "no watches": (["--source", "S:model"], "gives no watches"),
    "watches twice": (
        ["--source", "S:study", "--preset", "economy", "--tokens", "T"],
        "its own watches: leave --preset",
    ),
    "no study": (["--source", "S:nothing"], "a model, a list of Watch, a Monitor, or .model, watches.; got int"),
    "no vocabulary": (["--source", "S:model", "--preset", "economy", "--tokens", "T"], "--vocab-size"),
    "other tokens": (
        ["--source", "S:model", "--preset", "economy", "--tokens", "T", "--vocab-size", "5"],
        "0 to 4: give",
    ),
    "no tokens": (["--source", "S:model", "--preset", "economy", "--tokens", "none.npy"], "none.npy cannot be read"),
    "text": (["--source", "S:model", "--preset", "economy", "--tokens", "S"], "no tokenizer lies with the series"),
    "no such watch": (["--source", "S:study", "--watch", "lcc"], "no watch 'lcc': those are norm, llc"),
    "no such step": (["--source", "S:study", "--steps", "3"], "no checkpoint of step 3"),
    "no such engine": (["--source", "S:study", "--engine", "dask"], "those are processes, ray, slurm"),
    "an option of none": (["--source", "S:study", "--option", "num_gpus=1"], "of the engines ray and slurm"),
    "an option that is none": (["--source", "S:study", "--engine", "ray", "--option", "fast"], "NAME=VALUE"),
    "an LLC of none": (["--source", "S:study", "--llc", "nbeta=30"], "among the source's watches"),
    "shard": (["--source", "S:study", "--shard", "3/2"], "i from 1 to n"),
    "dtype": (
        ["--source", "S:study", "--dtype", "int8"],
        "no dtype 'int8': those are float32, float64, bfloat16, float16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_go_together_are_told_and_nothing_is_made(
    trained: Path, language: Path, tmp_path: Path, case: str
) -> None:
    args, said = REFUSED[case]
    places = {"S": str(trained / "script.py"), "T": str(language / "tokens.pt")}
    named = [places.get(arg, arg.replace("S:", places["S"] + ":")) for arg in args]
    with pytest.raises(DevmonError, match=said):
        raise measure(trained / "saved", "--into", tmp_path / "run.zarr", *named).exception  # type: ignore[misc]
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.parametrize(
    ("text", "retried"),
    [
        ("presett = 'full'", "unknown key 'presett', perhaps 'preset'"),
        ("workers = 'two'", "workers must be an integer, got 'two'"),
        ("workers = true", "workers must be an integer, got True"),
        ("seed = 0.5", "seed must be an integer, got 0.5"),
        ("forget = 1", "forget must be true or false, got 1"),
        ("steps = [1, 2]", r"steps must be a string, got \[1, 2\]"),
        ("watch = 'loss'", "watch must be a list of strings, got 'loss'"),
        ("watch = ['loss', 3]", r"watch must be a list of strings, got \['loss', 3\]"),
        ("series = ", "cannot be read as TOML"),
        ("preset = 'full'", "no series and no into"),
    ],
)
def test_a_config_with_mistakes_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(DataError, match=said):
        Plan.read(tmp_path / "study.toml", {})


# ---- several processes ----

PLAIN = """
import os
from dataclasses import dataclass

import torch
import xarray as xr

from devmon import InstrumentError, Watch, every

@dataclass(frozen=True)
class Drawn:
    kills: bool = False

    def __call__(self, snapshot):
        if self.kills and snapshot.step == 6 and not os.path.exists("GONE"):
            open("GONE", "w").close()
            os.kill(os.getpid(), 9)
        noise = torch.randn(5, generator=snapshot.generator("noise"))
        return xr.Dataset({"x": ((), (snapshot.model(noise) ** 2).sum().item())})

class Unfit:
    def __call__(self, snapshot):
        raise InstrumentError("made for another model")

def model():
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))

def study():
    return model(), [Watch("drawn", Drawn(True), every(1)), Watch("seldom", Drawn(), every(4))]

def unfit():
    return model(), [Watch("unfit", Unfit(), every(1))]
"""


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(PLAIN.replace("GONE", str(tmp_path / "gone")))
    (tmp_path / "saved").mkdir()
    for step in range(0, 14, 2):
        torch.manual_seed(step)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        save_file(model.state_dict(), tmp_path / "saved" / f"step{step}.safetensors")
    return tmp_path


def test_two_workers_write_what_one_does_though_one_is_killed_and_the_rest_done_later(plain: Path) -> None:
    (plain / "saved" / "step2.safetensors").write_bytes(b"")
    command = (plain / "saved", "--source", f"{plain / 'script.py'}:study", "--into")
    killed = measure(*command, plain / "two.zarr", "--workers", 2)
    assert killed.exit_code == 1
    for said in (
        "step 2 skipped",
        "step2.safetensors cannot be read",
        "died (exit code -9): give the command",
    ):
        assert said in killed.output
    two = Trajectory(plain / "two.zarr", "r")
    lost = {0, 4, 6, 8, 10, 12} - set(two.steps("drawn"))  # what the dead one had begun, or read ahead
    assert 6 in lost
    assert len(lost) <= 2
    again = measure(*command, plain / "two.zarr")
    assert (again.exit_code, "1 checkpoints skipped" in again.output) == (1, True), again.output
    alone = measure(*command, plain / "one.zarr")
    assert (alone.exit_code, "10 rows measured, 1 checkpoints skipped" in alone.output) == (1, True), alone.output
    assert Trajectory(plain / "one.zarr", "r").failures("drawn") == two.failures("drawn")
    same(rows(plain / "one.zarr"), rows(two.path))


def test_shards_do_the_whole_between_them(plain: Path) -> None:
    (plain / "gone").touch()
    command = (plain / "saved", "--source", f"{plain / 'script.py'}:study", "--into")
    told = [measure(*command, plain / "shards.zarr", "--shard", part).output for part in ("1/2", "2/2")]
    assert ["4 to measure" in told[0], "3 to measure" in told[1]] == [True, True], told
    assert measure(*command, plain / "one.zarr").exit_code == 0
    same(rows(plain / "one.zarr"), rows(plain / "shards.zarr"))


def test_what_ends_one_worker_is_raised(plain: Path) -> None:
    plan = Plan(str(plain / "saved"), str(plain / "run.zarr"), f"{plain / 'script.py'}:unfit", workers=2)
    with pytest.raises(DevmonError, match="step [024]: made for another model"):
        workers.measure(plan, [0, 2, 4])
    with pytest.raises(InstrumentError, match="step 0: made for another model"):
        Study(plan).measure()


def test_each_worker_has_a_gpu_of_those_that_are_visible(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str | None] = []

    class Process:
        """A process that ends at once."""

        exitcode = 0

        def __init__(self, target: Any, args: tuple[Any, ...], daemon: bool) -> None:
            self.args = args

        def start(self) -> None:
            started.append(self.args[1])
            self.args[2].send(workers.Ended())

        def join(self) -> None: ...

        def is_alive(self) -> bool:
            return False

    plan = Plan(str(plain / "saved"), str(plain / "run.zarr"), "x.py:y", workers=3)
    monkeypatch.setattr(forkserver.start(plan), "Process", Process)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5")
    assert workers.measure(plan, range(5)) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    workers.measure(plan, [7, 8])  # two processes are enough
    workers.measure(replace(plan, device="cpu"), [7])
    assert started == ["4", "GPU-5", "4", "0", "1", None]


def test_the_server_of_the_workers_imports_while_the_command_does(plain: Path) -> None:
    """Were torch there before it is begun, the two would import one after the other."""
    code = f"""
import sys
from devmon.offline.engines import forkserver
from devmon.cli.root import app
def start(plan):
    print("begun", [name for name in ("torch", "xarray", "devmon.offline.study") if name in sys.modules])
    raise SystemExit
forkserver.start = start
app(["measure", {str(plain / "saved")!r}, "--source", "{plain / "script.py"}:study", "--into", "run.zarr", "--workers", "2"])
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=plain, capture_output=True, text=True)
    assert ran.stdout == "begun []\n", ran.stderr


def test_an_interrupt_is_for_the_command_and_not_for_the_server_of_the_workers(plain: Path) -> None:
    """Both are of the terminal's group: the server would print where it was among its imports."""
    forkserver.start(Plan(str(plain / "saved"), str(plain / "run.zarr"), "x.py:y", workers=2))
    pid = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]

    def blocked(process: object) -> bool:
        status = Path(f"/proc/{process}/status").read_text()
        return bool(int(status.partition("SigBlk:")[2].split()[0], 16) >> (signal.SIGINT - 1) & 1)

    assert blocked(pid)
    assert not blocked("self")


def test_a_step_is_taken_when_the_one_before_is_begun(plain: Path) -> None:
    (plain / "gone").touch()
    log: list[Any] = []

    def dealt() -> Any:
        for step in (8, 4, 0):
            log.append(step)
            yield step

    plan = Plan(str(plain / "saved"), str(plain / "run.zarr"), f"{plain / 'script.py'}:study", watch=("drawn",))
    Study(plan).measure(dealt(), lambda event: log.append(f"measured {event.step}"))
    assert log == [8, 4, "measured 8", 0, "measured 4", "measured 0"]


def test_threads_are_those_of_numpy_too(plain: Path) -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    def blas() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with threadpool_limits(2):
        assert blas() == {2}
        Study(Plan(str(plain / "saved"), str(plain / "run.zarr"), f"{plain / 'script.py'}:study", threads=1))
        assert blas() == {1}
