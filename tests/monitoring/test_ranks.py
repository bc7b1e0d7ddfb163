"""Several ranks measure as one does: the same numbers, training untouched, and no failure leaves a rank waiting."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import xarray as xr

from devmon import DevmonError, InstrumentError, Snapshot, Trajectory, Watch, every
from devmon.callbacks import Monitor
from devmon.instruments import LLC
from devmon.monitoring.observe import observe
from devmon.monitoring.ranks import SINGLE, Ranks, _portable
from devmon.sampling import classification_loss
from devmon.snapshot import Divisible, Instrument
from tests.support.lightning_toys import Careless, Net, Norm, train
from tests.support.two_ranks import Divided, Odd, after, raised, spawn_two

STEPS = {0, 5, 12}


def examples(n: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(3))
    return x, (x[:, 0] > 0).long()


def small_llc(**settings: Any) -> LLC:
    defaults = {"nbeta": 20.0, "gamma": 50.0, "lr": 1e-3, "chains": 4, "draws": 12, "burn_in": 4, "batch_size": 20}
    return LLC(examples(), classification_loss, **(defaults | settings))


# -- the parts of an instrument ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"control_variate": True}, {"shared_batches": True}, {"examples": 5, "acceptance": True, "prior": 0.1}],
)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_chains_dealt_to_any_number_of_ranks_are_the_undivided_llc(ranks: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    snapshot = Snapshot(0, Net().double().eval(), seed=11)
    instrument = small_llc(float64=True, **settings)
    whole = instrument(snapshot)
    shares = [instrument.share(rank, ranks) for rank in range(ranks)]
    assert [share is None for share in shares] == [rank >= 4 for rank in range(ranks)]
    parts = [pickle.loads(pickle.dumps(share(snapshot))) for share in shares if share is not None]
    assert sorted(int(chain) for part in parts for chain in part["chain"]) == [0, 1, 2, 3]  # each once
    assert max(part.sizes["chain"] for part in parts) == -(-4 // ranks)  # and dealt evenly
    joined = instrument.join(parts)
    assert joined.attrs == whole.attrs
    for name in whole.variables:
        assert (joined[name].dims, joined[name].dtype, joined[name].attrs) == (
            whole[name].dims, whole[name].dtype, whole[name].attrs)  # fmt: skip
    xr.testing.assert_allclose(joined, whole, rtol=1e-9, atol=1e-12)
    spread = np.ptp(whole["loss"].values[:, -1])
    assert spread > 1e-3, f"the chains hardly differ ({spread}): a mixed-up order would pass"


def test_settings_that_cannot_be_run_are_told_however_the_work_is_dealt() -> None:
    shares = [small_llc(chains=0).share(rank, 2) for rank in range(2)]
    assert shares[1] is None
    with pytest.raises(InstrumentError, match="chains must be at least 1"):
        shares[0](Snapshot(0, Net().eval()))


def test_only_instruments_with_shares_are_divisible() -> None:
    assert isinstance(small_llc(), Divisible)
    assert not isinstance(Norm(), Divisible)


class OddMisfit(Odd, InstrumentError):
    pass


def test_an_error_travels_as_itself_or_as_one_that_is_treated_alike() -> None:
    error = InstrumentError("no")
    assert _portable(error) is error
    assert repr(_portable(Odd("a", "b"))) == "RuntimeError('Odd: a-b')"
    assert repr(_portable(OddMisfit("a", "b"))) == "DevmonError('OddMisfit: a-b')"


def test_a_single_process_makes_plain_calls() -> None:
    assert Ranks.of_training() == SINGLE
    assert (SINGLE.gather(max, 1, 2), SINGLE.agree(max, 1, 2), SINGLE.first(max, 1, 2)) == ([2], 2, 2)
    with pytest.raises(KeyError, match="as it came"):
        SINGLE.first(fail, KeyError("as it came"))


# -- two processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FailsOnRankZero:
    """Not divisible: it only ever runs on rank 0."""

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        raise RuntimeError("only here")


class Keep(L.Callback):
    """Rank 0's weights and running statistics, for measuring them again on one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.is_global_zero and trainer.global_step in STEPS:
            torch.save(pl_module.state_dict(), self.folder / f"{trainer.global_step}.pt")


def fail(error: Exception) -> None:
    raise error


def two_processes(rank: int, folder: Path) -> None:
    """What each of the two ranks does; its findings go to `folder`."""
    if rank == 0:
        Trajectory(folder / "open.zarr")
    ddp: dict[str, Any] = {"strategy": "ddp", "devices": 2}
    results: dict[str, Any] = {"alone": after(train([], **ddp))}

    watches = [
        Watch("llc", small_llc(), STEPS),
        Watch("norm", Norm(), every(1)),
        Watch("careless", Careless(), every(1)),
        Watch("careless-everywhere", Divided(Careless()), every(1)),
        Watch("fails", Divided(Norm(), rank=1, step=3), every(1)),
        Watch("fails-oddly", Divided(Norm(), rank=1, step=4, kind="Odd"), every(1)),
        Watch("unsendable", Divided(Norm(), rank=1, step=5, kind="unsendable"), every(1)),
    ]
    monitor = Monitor(folder / "run.zarr", watches)
    results["watched"] = after(train([monitor, Keep(folder)], **ddp))
    results["holds a trajectory"] = monitor.trajectory is not None

    def watch(instrument: Instrument, store: Any = "strict.zarr", **options: Any) -> str:
        trajectory = folder / store if isinstance(store, str) else store
        return raised(lambda: train([Monitor(trajectory, [Watch("it", instrument, {2})], **options)], **ddp))

    results["strict"] = watch(Divided(Norm(), rank=1, step=2), strict=True)
    results["strict, on rank 0 only"] = watch(FailsOnRankZero(), "zero.zarr", strict=True)
    both = Divided(FailsOnRankZero(), rank=1, step=0, kind="InstrumentError")  # the misfit decides, not the lower rank
    results["misfit"] = watch(both, "misfit.zarr")
    (folder / f"file-{rank}").write_text("")
    results["store"] = watch(Norm(), "file-0")
    results["open"] = watch(Norm(), Trajectory(folder / "open.zarr"))
    results["identity"] = watch(FailsOnRankZero(), "open.zarr")  # whose rows are of Norm
    (folder / f"{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Both ranks' findings and the folder of their stores, from one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn_two(two_processes, folder)
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(folder=folder, results=results, store=Trajectory(folder / "run.zarr", "r"))


def test_training_is_bit_identical_with_and_without_the_monitor_on_both_ranks(ranks: SimpleNamespace) -> None:
    zero, one = ranks.results
    assert zero["watched"] == zero["alone"]
    assert one["watched"] == one["alone"]
    assert zero["alone"][0] != one["alone"][0], "the running statistics of the ranks should differ, to be worth testing"


def test_two_ranks_measure_what_one_rank_measures(ranks: SimpleNamespace, tmp_path: Path) -> None:
    """Against the kept weights measured on one process, seed and digests included."""
    again = Trajectory(tmp_path / "again.zarr")
    watches = [Watch("llc", small_llc(), STEPS), Watch("norm", Norm(), STEPS), Watch("careless", Careless(), STEPS)]
    for step in sorted(STEPS):
        module = Net()
        module.load_state_dict(torch.load(ranks.folder / f"{step}.pt", weights_only=True))
        assert observe(step, module, watches, again) == ["llc", "norm", "careless"]
    again.fold()
    for name in ("norm", "careless"):
        two = ranks.store[name].sel(step=sorted(STEPS))
        xr.testing.assert_identical(two.drop_vars("seconds"), again[name].drop_vars("seconds"))
    one, two = again["llc"].drop_vars("seconds"), ranks.store["llc"].drop_vars("seconds")
    assert two["chain"].values.tolist() == [0, 1, 2, 3]
    assert one.attrs == two.attrs
    xr.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


def test_what_fails_on_one_rank_is_recorded_and_the_others_go_on(ranks: SimpleNamespace) -> None:
    steps = list(range(13))
    assert ranks.store.failures("fails") == {3: "RuntimeError: no luck (on rank 1)"}
    assert ranks.store.failures("fails-oddly") == {4: "RuntimeError: Odd: no-luck (on rank 1)"}
    (reason,) = ranks.store.failures("unsendable").values()
    assert "pickle" in reason
    assert reason.endswith("(on rank 1)")
    for name, missing in {"norm": [], "fails": [3], "fails-oddly": [4], "unsendable": [5]}.items():
        assert ranks.store.steps(name) == [step for step in steps if step not in missing]
    np.testing.assert_array_equal(ranks.store["careless-everywhere"]["step"], steps)


def test_every_rank_runs_on_the_weights_of_rank_zero(ranks: SimpleNamespace) -> None:
    np.testing.assert_array_equal(ranks.store["fails"]["norm"], ranks.store["norm"]["norm"].drop_sel(step=3))


def test_what_ends_training_ends_it_on_both_ranks(ranks: SimpleNamespace) -> None:
    for name, text in {
        "strict": "RuntimeError | no luck | on rank 1",
        "strict, on rank 0 only": "RuntimeError | only here | on rank 0",
        "misfit": "InstrumentError | no fit | on rank 1",
    }.items():
        assert [results[name] for results in ranks.results] == [text, text]
    for name, text in {
        "store": "StoreError | .*file-0 exists",
        "identity": "IdentityError | .*'it' of another",
    }.items():
        first, second = (results[name] for results in ranks.results)
        kind, message = text.split(" | .*")
        assert first == second
        assert first.startswith(f"{kind} | ")
        assert message in first
    assert not Trajectory(ranks.folder / "misfit.zarr", "r").steps("it")


def test_only_rank_zero_holds_a_trajectory(ranks: SimpleNamespace) -> None:
    assert [results["holds a trajectory"] for results in ranks.results] == [True, False]
    assert [results["open"] for results in ranks.results] == ["nothing", "nothing"]
    store = Trajectory(ranks.folder / "open.zarr", "r")
    assert (store.steps("it"), len(store["it"]["norm"])) == ([2], 1)


# -- strategies that shard ---------------------------------------------------------------------------------------------


def strategy(name: str, base: type = object, **attributes: object) -> object:
    return type(name, (base,), attributes)()


@pytest.mark.parametrize(
    "sharded",
    [
        strategy("FSDPStrategy"),
        strategy("Mine", type(strategy("FSDPStrategy"))),
        strategy("ModelParallelStrategy"),
        strategy("DeepSpeedStrategy", zero_stage_3=True),
    ],
    ids=lambda s: type(s).__name__,
)
def test_sharded_weights_are_refused_before_training_with_what_to_do(sharded: object, tmp_path: Path) -> None:
    monitor = Monitor(tmp_path / "run.zarr", [Watch("norm", Norm(), every(1))])
    trainer = SimpleNamespace(strategy=sharded, world_size=2, is_global_zero=True)
    with pytest.raises(DevmonError, match=r"shards the weights.*use Sidecar \(devmon\.callbacks\).*strategy='ddp'"):
        monitor.setup(trainer, Net(), "fit")
    assert not (tmp_path / "run.zarr").exists()


def test_replicated_weights_are_not_refused(tmp_path: Path) -> None:
    for name, attributes in {"DDPStrategy": {}, "DeepSpeedStrategy": {"zero_stage_3": False}}.items():
        trainer = SimpleNamespace(strategy=strategy(name, **attributes), world_size=1, is_global_zero=True)
        Monitor(tmp_path / name, []).setup(trainer, Net(), "fit")


def test_rank_zero_without_a_trajectory_is_told() -> None:
    with pytest.raises(DevmonError, match="needs the trajectory on rank 0"):
        observe(0, Net(), [Watch("norm", Norm(), every(1))], None)
