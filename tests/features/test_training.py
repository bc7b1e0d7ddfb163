"""Training: planted dictionaries are found; a training goes on where it was; what cannot be trained is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from devmon.errors import DataError
from devmon.features import (
    BatchTopK,
    CrossLayer,
    Dictionary,
    Gated,
    Held,
    Jump,
    JumpReLU,
    Matryoshka,
    ReLU,
    TopK,
    Training,
    train,
)
from devmon.features.dictionary import tensors
from devmon.features.objectives import Objective
from devmon.testing.planted import Planted, best_cosines, directions

WIDTH, FEATURES = 16, 24
TRUE = directions(FEATURES, WIDTH)
MEAN = 0.3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
SOURCE = Planted(TRUE, 2 / FEATURES, MEAN, batch=256, seed=1)
FRESH = torch.cat([replace(SOURCE, seed=2)(step)[0] for step in range(20)])
SHORT = Training(BatchTopK(2), width=3, steps=30)


def fvu(coder: object, x: Tensor, y: Tensor | None = None) -> float:
    y = x if y is None else y
    return float((y - coder(x)).square().sum() / (y - y.mean(0)).square().sum())  # type: ignore[operator]


@pytest.mark.parametrize(
    "objective, cosine, most",
    [
        (ReLU(), 0.98, 0.2),
        (TopK(2), 0.97, 0.25),
        (BatchTopK(2), 0.96, 0.2),
        (JumpReLU(target=2.0), 0.96, 0.2),
        (Gated(3.0), 0.95, 0.2),
    ],
)
def test_planted_features_are_found(objective: Objective, cosine: float, most: float) -> None:
    trained = train(Training(objective, width=3, steps=700), SOURCE)
    coder = trained.dictionary
    assert isinstance(coder, Dictionary)
    alive = (coder.encode(FRESH) > 0).any(0)
    found = float(best_cosines(coder.W_dec[alive], TRUE).mean())
    assert found > cosine, (found, fvu(coder, FRESH))
    assert float((~alive).double().mean()) < (0.2 if isinstance(objective, Gated) else 0.12), "dead"
    assert fvu(coder, FRESH) < most
    torch.testing.assert_close(coder.norms(), torch.ones(coder.latents))
    # what training saw at the end is what the dictionary in use does, in units of the data
    assert abs(trained.history[-1]["fvu"] - fvu(coder, FRESH)) < 0.04
    l0 = float((coder.encode(FRESH) > 0).sum(1).float().mean())
    assert abs(trained.history[-1]["l0"] - l0) < 0.3


def test_scale_and_seed(tmp_path: Path) -> None:
    """A dictionary of 7 x is that of x in other units; another seed is another dictionary."""
    one, seven = (train(SHORT, Held(scale * FRESH, batch=100)).dictionary for scale in (1.0, 7.0))
    torch.testing.assert_close(seven(7 * FRESH), 7 * one(FRESH), rtol=1e-3, atol=1e-3)
    other = train(replace(SHORT, seed=1), Held(FRESH, batch=100)).dictionary
    assert not torch.allclose(one.W_dec, other.W_dec)


@pytest.mark.parametrize("objective", [BatchTopK(2), JumpReLU(), Gated(), Matryoshka(2, (4, 8))])
def test_a_training_goes_on_where_it_was(objective: Objective, tmp_path: Path) -> None:
    training = replace(SHORT, objective=objective)
    whole = train(training, SOURCE)
    file = tmp_path / "state.pt"

    def stop(step: int, steps: int, record: dict[str, float]) -> None:
        if step == 23:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(training, SOURCE, file=file, save_every=10, progress=stop)
    again = train(training, SOURCE, file=file, save_every=10)
    assert again.history == whole.history
    for name, tensor in tensors(whole.dictionary).items():
        assert torch.equal(tensor, getattr(again.dictionary, name)), name
    assert again.dictionary == whole.dictionary
    with pytest.raises(DataError, match="other settings"):
        train(replace(training, steps=31), SOURCE, file=file)


def test_a_warm_start_is_where_it_was(tmp_path: Path) -> None:
    for objective in (JumpReLU(target=2.0), Gated(), ReLU()):
        trained = train(replace(SHORT, objective=objective, steps=200), SOURCE).dictionary
        still = train(Training(objective, width=3, steps=1, lr=0.0), SOURCE, start=trained).dictionary
        torch.testing.assert_close(still.encode(FRESH), trained.encode(FRESH), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(still(FRESH), trained(FRESH), rtol=1e-3, atol=1e-4)


def test_transcoders_learn_a_map_and_a_skip_its_linear_part() -> None:
    generator = torch.Generator().manual_seed(3)
    map_in, map_out = torch.randn(8, 12, generator=generator), torch.randn(12, 5, generator=generator)
    x = torch.randn(4000, 8, generator=generator) + 1
    nonlinear, linear = (x @ map_in).relu() @ map_out + 2, x @ map_in @ map_out
    linear_fit = {}
    for form in ("transcoder", "skip transcoder"):
        training = Training(TopK(4), width=4, steps=400, form=form, lr=4e-3)  # type: ignore[arg-type]
        coder = train(training, Held(x, nonlinear, batch=250)).dictionary
        assert fvu(coder, x, nonlinear) < 0.25, form
        linear_fit[form] = fvu(train(training, Held(x, linear, batch=250)).dictionary, x, linear)
    assert linear_fit["skip transcoder"] < linear_fit["transcoder"] / 3, linear_fit


def test_a_cross_layer_transcoder_learns_all_layers() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 2, 6, generator=generator)
    first, second = torch.randn(2, 6, 6, generator=generator)
    y = torch.stack([(x[:, 0] @ first).relu(), x[:, 1].relu() + (x[:, 0] @ second).relu()], 1)
    training = Training(TopK(8), width=4, steps=400, form="cross-layer transcoder", parts=2, lr=4e-3)
    coder = train(training, Held(x.flatten(1), y.flatten(1), batch=250)).dictionary
    assert isinstance(coder, CrossLayer)
    assert fvu(coder, x.flatten(1), y.flatten(1)) < 0.3


def test_one_snapshot_twice_has_equal_norms_whatever_its_scale() -> None:
    x = torch.cat([SOURCE(step)[0] for step in range(10)])
    coder = train(
        Training(BatchTopK(2), width=3, steps=300, parts=2), Held(torch.cat([x, 5 * x], 1), batch=250)
    ).dictionary
    assert isinstance(coder, Dictionary)
    norms = coder.W_dec.unflatten(1, (2, -1)).norm(dim=-1)
    np.testing.assert_allclose(norms[:, 1] / norms[:, 0], 5, rtol=0.02)


def test_records_and_progress() -> None:
    seen = []
    trained = train(replace(SHORT, steps=250), SOURCE, progress=lambda *now: seen.append(now))
    assert [record["step"] for record in trained.history] == [2.0 * i for i in range(1, 126)]
    assert [(step, steps) for step, steps, _ in seen] == [(2 * i, 250) for i in range(1, 126)]
    assert seen[-1][2] == trained.history[-1]
    assert abs(trained.history[-1]["l0"] - 2) < 0.1


def test_latents_that_never_fired_are_dead_and_only_those() -> None:
    """A third of the latents is held far from firing, and dead from the first step after the window on."""
    start = train(replace(SHORT, objective=ReLU(0.01)), SOURCE).dictionary
    start.b_enc.view(-1)[:16] = -1e4
    training = replace(SHORT, steps=50, dead_after=0.2, objective=ReLU(), lr=0.0)
    shares = [record["dead"] for record in train(training, SOURCE, start=start).history]
    assert shares == [0.0] * 11 + [1 / 3] * 39


@pytest.mark.parametrize(
    "change, words",
    [
        ({"width": 0.5}, "width >= 1; got 0.5"),
        ({"steps": 0}, "got 0,"),
        ({"dead_after": 0.0}, "0 < dead_after <= 1"),
        ({"objective": TopK(49)}, "the number of latents, 48; got 49"),
        ({"objective": BatchTopK(0)}, "48; got 0"),
        ({"form": "transcoder"}, ""),
        ({"width": 400.0}, "6400 latents need at least as many places, got 5120"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, object], words: str) -> None:
    if not words:
        with pytest.raises(DataError, match="autoencoder's targets are its inputs"):
            train(SHORT, Held(FRESH, FRESH.clone()))
        return
    with pytest.raises(DataError) as error:
        train(replace(SHORT, **change), Held(FRESH, batch=100))  # type: ignore[arg-type]
    assert words in str(error.value)


def test_activations_and_starts_that_cannot_be_are_refused() -> None:
    bad = FRESH.clone()
    bad[7, 3] = float("nan")
    with pytest.raises(DataError, match="1 not finite"):
        train(SHORT, Held(bad, batch=len(bad)))
    start = train(SHORT, SOURCE).dictionary
    with pytest.raises(DataError, match="reads 16 and writes 16 numbers in 1 parts, the activations are 15"):
        train(SHORT, Held(FRESH[:, :15], batch=100), start=start)
    assert isinstance(start.activation, Jump)
