"""What is known at w*: closed forms, once for all that sample around the same weights, and the same bits alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import xarray as xr
from torch import Tensor, nn

from devmon import Snapshot, Trajectory, Watch, observe
from devmon.anatomy.passes import Plan
from devmon.cost import Cost, estimates
from devmon.instruments import LLC, BayesianInfluence, ProbeLoss, RestrictedLLC, Susceptibilities
from devmon.sampling import Settings, center, regression_loss, sample
from devmon.sampling.data import as_examples
from devmon.sampling.flat import Flat
from devmon.sampling.schedule import Schedule

TOKENS = torch.randint(60, (24, 8), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"lr": 1e-6, "gamma": 100.0, "nbeta": 30.0, "chains": 2, "draws": 2, "burn_in": 1}
SMALL |= {"batch_size": 8}


def line(n: int = 30) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 3, generator=generator), torch.randn(n, 2, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 2), (x, y)


@contextmanager
def gradients(of: str = "measure") -> Iterator[list[int]]:
    """How many examples' gradients are taken at w*, run by run."""
    counts: list[int] = []
    own = center.measure

    def counted(flat: Any, examples: Any, index: Tensor, *rest: Any, **named: Any) -> center.Center:
        counts.append(len(index))
        return own(flat, examples, index, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(center, of, counted)
        yield counts


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("micro", [4, 10])
def test_losses_gradient_and_spread_against_single_examples(masked: bool, micro: int) -> None:
    model, (x, y) = line()
    flat = Flat(model, regression_loss, torch.float64)
    index = torch.randperm(30, generator=torch.Generator().manual_seed(1))[:25]
    where = torch.tensor([True, False, True, True, False, False, True, False]) if masked else None
    found = center.measure(flat, as_examples((x.double(), y.double())), index, 10, micro, where)

    # one example at a time: ∇ of ½‖Wx + b − y‖² is the residual times x, and the residual
    weight, bias = (p.detach().double() for p in (model.weight, model.bias))
    residual = x.double() @ weight.T + bias - y.double()
    each = torch.cat([(residual[:, :, None] * x.double()[:, None]).flatten(1), residual], 1)
    each = each if where is None else each * where
    expected = torch.full((30,), torch.nan, dtype=torch.float64)
    expected[index] = 0.5 * residual[index].square().sum(1)
    torch.testing.assert_close(found.losses, expected, equal_nan=True)
    torch.testing.assert_close(found.gradient, each[index].mean(0))
    # parts of 10, 10 and 5: Σ |b| (g_b − g)² / 2
    parts = [(len(b), each[b].mean(0) - each[index].mean(0)) for b in index.split(10)]
    variance = sum(size * away.square() for size, away in parts) / 2
    assert found.spread() == pytest.approx(float(variance.sum()), rel=1e-12)
    if masked:
        torch.testing.assert_close(found.variance, variance)
    else:
        assert found.variance is None
        torch.testing.assert_close(found.traces, torch.stack([variance[:6].sum(), variance[6:].sum()]))


@pytest.mark.parametrize("blocks", [2**20, 7])  # of a small model, and of a large one, whose gradients come one by one
@pytest.mark.parametrize("masked", [False, True])
def test_a_mask_takes_its_part_of_what_was_left_for_all(
    blocks: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("devmon.sampling.flat.BLOCK", blocks)
    model, data = line()
    schedule, examples = Schedule(draws=2, batch_size=8, control_variate=True), as_examples(data)
    memo: center.Memo = {}
    center.around(model, Flat(model, regression_loss), examples, schedule, [], 8, memo=memo)
    masks = {"weight": torch.tensor([True, False, True, False, False, True]), "bias": torch.tensor([True, False])}
    for names in (["weight"], ["bias"], ["weight", "bias"]):
        mask = torch.cat([masks[name] for name in names]) if masked else None
        flat = [Flat(model, regression_loss, names=names) for _ in range(2)]
        one = center.around(model, flat[0], examples, schedule, [], 8, mask)
        with gradients() as counts:
            other = center.around(model, flat[1], examples, schedule, [], 8, mask, memo)
        assert counts == []
        assert one.spread() == other.spread()  # bit for bit
        for a, b in ((one.losses, other.losses), (one.gradient, other.gradient)):
            assert torch.equal(a, b)
        assert len(one.gradient) == flat[0].numel


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=60, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).eval()


INSTRUMENTS: dict[str, Any] = {
    "loss": ProbeLoss(TOKENS),
    "llc": LLC(TOKENS, **SMALL),
    "sharp": LLC(TOKENS.clone(), **SMALL | {"gamma": 300.0, "control_variate": True, "sampler": "baoab"}),
    "restricted": RestrictedLLC(TOKENS, components={"first": "transformer.h.0.*"}, null=False, **SMALL),
    "susceptibilities": Susceptibilities(
        TOKENS, {"text": TOKENS[:8]}, ["transformer.h.0.*", "layer 1 head 1"], nulls=0, shuffled=0, scored=12, **SMALL
    ),
    "influence": BayesianInfluence(TOKENS, {"text": TOKENS[:8]}, examples=12, **SMALL),
}


def test_one_observation_takes_the_gradient_at_the_weights_once_and_each_watch_alone_has_the_same_bits(
    tmp_path: Path,
) -> None:
    passed: Counter[str] = Counter()
    model, forward = gpt2(), transformers.GPT2LMHeadModel.forward

    def counted(self: nn.Module, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, tokens, *args, **kwargs)
        passed["forwards"] += len(tokens)
        if output.logits.requires_grad:  # of passes that are no chains: these are mapped
            output.logits.register_hook(lambda _: passed.update({"backwards": len(tokens)}))
        return output

    def rows(*names: str) -> tuple[dict[str, xr.Dataset], Counter[str]]:
        passed.clear()
        trajectory = Trajectory(tmp_path / f"{'+'.join(names)}.zarr", seed=1)
        observe(0, model, [Watch(name, INSTRUMENTS[name], range(9)) for name in names], trajectory)
        return {name: trajectory[name].drop_vars("seconds").load() for name in names}, passed.copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.GPT2LMHeadModel, "forward", counted)
        together, passes = rows(*INSTRUMENTS)
        backwards, _ = rows(*list(INSTRUMENTS)[::-1])
        alone = {name: rows(name) for name in INSTRUMENTS}
    for name, (row, _) in alone.items():
        xr.testing.assert_identical(row[name], together[name])
        xr.testing.assert_identical(row[name], backwards[name])
    # Five that sample need 24 gradients once; two follow the same 12 examples, scored at the weights once.
    saved = Counter[str]()
    for _, own in alone.values():
        saved += own
    saved -= passes
    assert saved == {"forwards": 4 * 24 + 12, "backwards": 4 * 24}
    assert alone["susceptibilities"][1]["backwards"] == 24  # once for its components


def test_what_is_shared_is_told_beside_the_cost() -> None:
    watches = [Watch(name, INSTRUMENTS[name], range(1)) for name in INSTRUMENTS]
    told = {estimate.name: estimate.saved for estimate in estimates(watches, 0)}
    one = Cost(24, 24, 8).tokens()
    assert told["llc"] == told["loss"] == 0
    assert {told[name] for name in ("sharp", "restricted", "susceptibilities", "influence")} == {one}
    other = LLC(TOKENS, **SMALL | {"batch_size": 4})  # which sums otherwise
    assert estimates([*watches, Watch("other", other, range(1))], 0)[-1].saved == 0


def test_a_ladder_a_choice_and_its_estimate_share_and_a_lone_run_leaves_nothing() -> None:
    model, data = line()
    settings = Settings(lr=1e-4, gamma=1.0, draws=5, burn_in=0, batch_size=8, nbeta=[9.0, 3.0, 1.0])
    with gradients() as counts:
        sample(model, regression_loss, data, settings)
    assert counts == [30]
    with torch.no_grad():  # at the optimum, so that a choice can be made
        x, y = data
        best = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1)], 1), y).solution
        model.weight.copy_(best[:3].T)
        model.bias.copy_(best[3])
    with gradients() as counts:
        LLC(data, loss=regression_loss, chains=2, draws=40, burn_in=20, batch_size=10)(Snapshot(0, model))
    assert counts == [30]

    llc = LLC(data, loss=regression_loss, lr=1e-4, gamma=1.0, draws=5, burn_in=0, batch_size=8)
    for number, kept in ((1, False), (2, True)):
        snapshot = Snapshot(0, model)
        snapshot.memo["plan"] = Plan([llc] * number)
        llc(snapshot)
        assert any(isinstance(value, center.Center) for value in snapshot.memo.values()) is kept


def test_other_data_losses_precision_and_little_memory_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = line()
    settings: dict[str, Any] = {"lr": 1e-4, "gamma": 1.0, "draws": 3, "burn_in": 0, "batch_size": 8}

    def half(model: nn.Module, batch: Any) -> Tensor:
        return regression_loss(model, batch) / 2

    runs: list[tuple[Any, Any, dict[str, Any]]] = [
        (regression_loss, (x, y), {}),
        (regression_loss, (x, y + 1), {}),
        (half, (x, y), {}),
        (regression_loss, (x, y), {"float64": True}),
        (regression_loss, (x, y), {"precision": "bfloat16"}),
    ]
    memo: center.Memo = {}
    with gradients() as counts:
        for loss, data, options in runs:
            shared = sample(model, loss, data, Settings(**settings | options), memo=memo)
            alone = sample(model, loss, data, Settings(**settings | options))
            for name in alone:
                np.testing.assert_array_equal(shared[name], alone[name])
    assert len(counts) == 5 + 4 + 3  # bfloat16 alone has a trial in float32, which is in the memo already
    monkeypatch.setattr(center, "MOST_KEPT", 0)
    memo = {}
    with gradients() as counts:
        for _ in range(2):
            sample(model, regression_loss, (x, y), Settings(**settings), memo=memo)
    assert counts == [24, 24]
    assert memo == {}
