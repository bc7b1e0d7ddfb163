"""Quality, geometry and lens of dictionaries: closed forms, and slow references through plain hooks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from devmon.anatomy import Anatomy
from devmon.errors import DataError, InstrumentError
from devmon.features import BatchTopK, Dictionary, Largest, Relu, Training
from devmon.features.geometry import coactive_interference, dimensionality
from devmon.features.probing import Probe, absorption
from devmon.features.quality import description_length
from devmon.instruments import DictionaryQuality, FeatureLens, SparseAutoencoder
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract
from tests.anatomy.families import VOCAB, D
from tests.features.test_dictionary import normal
from tests.instruments.made_up import features
from tests.instruments.test_instruments_families import TEXT, model_of
from tests.support.models import random_model

SITE = ("mlp_out", 1)


def perfect(d: int) -> Dictionary:
    """x = relu(x) − relu(−x)."""
    eye = torch.eye(d)
    return Dictionary(torch.cat([eye, -eye], 1), torch.zeros(2 * d), torch.cat([eye, -eye]), torch.zeros(d), Relu())


def measured(dictionary: Dictionary, tokens: torch.Tensor = TEXT, site: tuple[str, int] = SITE) -> Any:
    return DictionaryQuality(tokens, dictionary, site)(Snapshot(0, model_of("gpt2")))


def test_a_perfect_dictionary_costs_nothing() -> None:
    found = measured(perfect(D))
    np.testing.assert_allclose([found["fvu"], found["kl"]], 0, atol=1e-5)
    np.testing.assert_allclose([found["shrinkage"], found["kl_score_zero"], found["kl_score_mean"]], 1, atol=1e-4)
    np.testing.assert_allclose(found["loss"], found["loss_spliced"], rtol=1e-5)
    assert found["l0"] == D


def test_the_mean_explains_nothing() -> None:
    """FVU is 1 of the mean predictor, whatever the mean (formulas that square or average first say .5 to .9)."""
    _, reads = Anatomy(model_of("gpt2")).run(TEXT, [SITE])
    mean = reads[SITE][:, 1:].flatten(0, 1).mean(0)
    silent = Dictionary(torch.zeros(D, 3), -torch.ones(3), torch.ones(3, D), mean)
    found = measured(silent)
    np.testing.assert_allclose(found["fvu"], 1, rtol=1e-5)
    assert (found["l0"], found["dead"]) == (0, 1)
    np.testing.assert_allclose(found["kl_score_mean"], 0, atol=1e-5)
    assert (found["top_place"] == -1).all()
    assert found["strength"].isnull().all()


def test_against_plain_hooks() -> None:
    dictionary, model = features(), model_of("gpt2")
    found = measured(dictionary)
    block: Any = model.transformer.h[1].mlp  # type: ignore[union-attr, index]
    with torch.no_grad():
        kept: list[torch.Tensor] = []
        handle = block.register_forward_hook(lambda module, args, output: kept.append(output))
        clean = model(TEXT).logits
        handle.remove()
        x = kept[0][:, 1:]
        f = dictionary.encode(x)

        def ran(new: torch.Tensor) -> torch.Tensor:
            written = kept[0].clone()
            written[:, 1:] = new
            handle = block.register_forward_hook(lambda module, args, output: written)
            logits: torch.Tensor = model(TEXT).logits
            handle.remove()
            return logits

        def loss(logits: torch.Tensor) -> float:
            return float(F.cross_entropy(logits[:, 1:-1].flatten(0, 1), TEXT[:, 2:].flatten()))

        made = dictionary.decode(f)
        losses = {"clean": loss(clean), "made": loss(ran(made)), "zero": loss(ran(0 * x))}
        log_p, log_q = (F.log_softmax(each[:, 1:], -1) for each in (clean, ran(made)))
    flat_x, flat_made = x.flatten(0, 1), made.flatten(0, 1)
    expected = {
        "l0": (f > 0).sum(-1).float().mean(),
        "fvu": (flat_x - flat_made).square().sum() / (flat_x - flat_x.mean(0)).square().sum(),
        "shrinkage": flat_made.square().sum() / (flat_x * flat_made).sum(),
        "loss": losses["clean"],
        "loss_spliced": losses["made"],
        "kl": F.kl_div(log_q, log_p, log_target=True, reduction="sum") / x[..., 0].numel(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], float(value), rtol=1e-4, err_msg=name)
    if np.isfinite(found["loss_recovered_zero"]):
        ratio = (losses["zero"] - losses["made"]) / (losses["zero"] - losses["clean"])
        np.testing.assert_allclose(found["loss_recovered_zero"], ratio, rtol=1e-3)
    np.testing.assert_allclose(found["density"], (f > 0).float().mean((0, 1)), atol=1e-6)
    latent = int(found["density"].values.argmax())
    place = int(found["top_place"][latent, 0])
    np.testing.assert_allclose(f[place // 24, place % 24 - 1, latent], f[..., latent].max())


def test_description_length_by_hand() -> None:
    """64 latents that fire in 3/64 of places, uniform over 16 bins: 64 H₂(3/64) + 3 · 4 = 29.47 bits."""
    f = torch.zeros(64 * 16, 64)
    for j in range(64):
        f[(torch.arange(48) * 21 + j) % 1024, j] = 1 + torch.arange(48) % 16 / 15.0
    h = -(3 / 64 * math.log2(3 / 64) + 61 / 64 * math.log2(61 / 64))
    np.testing.assert_allclose(description_length(f, torch.eye(64), 1.0, bins=16), 64 * h + 12, rtol=1e-6)
    # as coarse as the error allows: all at one size need no bins, and a tight tolerance needs the finest
    assert description_length(f, torch.eye(64), 1e9) < 64 * h + 3.01
    assert description_length(f, torch.eye(64), 1e-9) > 64 * h + 12 - 1e-6
    assert description_length(0 * f, torch.eye(64), 1.0) == 0


@pytest.mark.parametrize(
    "name, expected", [("pentagon", 0.4), ("digon", 1 / 2), ("triangle", 2 / 3), ("tetrahedron", 3 / 4)]
)
def test_dimensionality_of_regular_figures(name: str, expected: float) -> None:
    turns = {"pentagon": 5, "digon": 2, "triangle": 3}
    if name == "tetrahedron":
        rows = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    else:
        angle = torch.arange(turns[name]) * 2 * math.pi / turns[name]
        rows = torch.stack([angle.cos(), angle.sin()], 1)
    scaled = rows * torch.arange(1, len(rows) + 1)[:, None]  # lengths do not count
    np.testing.assert_allclose(
        dimensionality(torch.cat([scaled, torch.zeros(1, rows.shape[1])])), [expected] * len(rows) + [0]
    )


def test_interference_counts_latents_that_fire_together() -> None:
    rows = torch.tensor([[1.0, 0], [1, 1], [0, 1]])
    fired = torch.tensor([[True, True, False], [True, False, False], [False, True, True], [True, True, False]])
    np.testing.assert_allclose(coactive_interference(rows, fired), [2 / 3 / 2, (2 / 2 + 1 / 2) / 3, 1 / 2], rtol=1e-6)


def test_the_lens_of_an_unembedding_row_is_its_token() -> None:
    model = model_of("gpt2")
    W_U = model.lm_head.weight.detach()  # type: ignore[union-attr]
    gain = model.transformer.ln_f.weight.detach()  # type: ignore[union-attr]
    rows = W_U / gain / W_U.norm(dim=1, keepdim=True)
    given = Dictionary(torch.zeros(D, VOCAB), torch.zeros(VOCAB), rows, torch.zeros(D))
    found = FeatureLens(given, ("resid_post", 1))(Snapshot(0, model))
    logits = (rows * gain @ W_U.T).double().numpy()
    z = (logits - logits.mean(1, keepdims=True)) / logits.std(1, keepdims=True)
    np.testing.assert_allclose(found["kurtosis"], (z**4).mean(1), rtol=1e-4)
    np.testing.assert_allclose(found["skewness"], (z**3).mean(1), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found["top_token"][:, 0], z.argmax(1))


@pytest.mark.parametrize(
    "dictionary, site, words",
    [
        (perfect(D - 1), SITE, "is 32 wide, the dictionary an autoencoder of 31"),
        (perfect(D), ("mlp_out", 9), "layers 0 to 1"),
        (perfect(D), ("mlp_in", 1), "cannot be replaced alone"),
    ],
)
def test_dictionaries_of_another_width_or_site_are_refused(dictionary: Dictionary, site: Any, words: str) -> None:
    with pytest.raises(InstrumentError) as error:
        measured(dictionary, TEXT, site)
    assert words in str(error.value)
    if words.startswith("is 32"):
        with pytest.raises(InstrumentError, match="directions of"):
            FeatureLens(dictionary, site)(Snapshot(0, model_of("gpt2")))


def test_a_training_of_another_form_is_refused() -> None:
    with pytest.raises(DataError, match="training is of an autoencoder"):
        SparseAutoencoder(TEXT, TEXT, SITE, Training(form="transcoder"))


def test_a_star_keeps_its_latents_in_order() -> None:
    shape = {"tokens": TEXT, "held_out": TEXT[:6], "site": ("resid_post", 1), "batch": 64}
    snapshot = Snapshot(0, random_model(0, VOCAB, 24))
    training = Training(BatchTopK(3), width=2, steps=40)
    width = int(snapshot.model.embed.weight.shape[1])  # type: ignore[union-attr, operator]
    rows = torch.nn.functional.normalize(normal(2 * width, width).float(), dim=1)
    start = Dictionary(rows.T.clone(), torch.zeros(2 * width), rows, torch.zeros(width), Largest(3))
    found = SparseAutoencoder(**shape, training=training, start=start)(snapshot)
    kept = torch.tensor(found["decoder"].values).float()
    torch.testing.assert_close(torch.tensor(found["moved"].values), (kept * rows).sum(1).double(), rtol=1e-2, atol=1e-2)
    assert found["moved"].median() > 0.8
    assert SparseAutoencoder(**shape, training=training)(snapshot)["moved"].isnull().all()


class TestSparseAutoencoder(InstrumentContract):
    def instrument(self) -> SparseAutoencoder:
        training = Training(BatchTopK(3), width=2, steps=5)
        return SparseAutoencoder(TEXT, TEXT[:6], ("resid_post", 1), training, batch=64)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed, VOCAB, 24)


class TestDictionaryQuality(InstrumentContract):
    def instrument(self) -> DictionaryQuality:
        return DictionaryQuality(TEXT[:6], perfect(12).chosen(range(6)), ("resid_post", 0))

    def model(self, seed: int) -> nn.Module:
        return random_model(seed, VOCAB, 24)


class TestFeatureLens(InstrumentContract):
    def instrument(self) -> FeatureLens:
        return FeatureLens(perfect(12), ("resid_post", 0))

    def model(self, seed: int) -> nn.Module:
        return random_model(seed, VOCAB, 24)


def test_labels_are_probed_by_means_over_a_sequence() -> None:
    """A sequence's class is which of two tokens fills it: a latent of that token's state tells it."""
    label = torch.arange(24) % 2
    tokens = 3 + 7 * label[:, None] + torch.randint(2, (24, 12), generator=torch.Generator().manual_seed(0))
    snapshot = Snapshot(0, model_of("gpt2"))
    found = DictionaryQuality(tokens, perfect(D), ("resid_post", 0), labels=label)(snapshot)
    assert float(found["probe"].max()) == 1
    assert float(found["probe_full"]) == 1
    assert float(found["probe_shuffled"].mean()) < 0.9
    assert found["erased"].values.tolist() == [2, 5, 10, 20, 50]
    assert "removal" not in found


@pytest.mark.parametrize(
    "labels, spurious, words",
    [
        (torch.arange(11), None, "one for each of 12 sequences; got (11,)"),
        (torch.rand(12), None, "labels are integers"),
        (None, torch.arange(12) % 2, "spurious goes with labels of two classes"),
        (torch.arange(12) % 3, torch.arange(12) % 2, "spurious goes with labels of two classes"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Any, spurious: Any, words: str) -> None:
    with pytest.raises(DataError) as error:
        DictionaryQuality(TEXT, perfect(D), SITE, labels=labels, spurious=spurious)
    assert words in str(error.value)


def test_absorption_is_of_the_places_that_are_given() -> None:
    """Against the same by hand, from states that are read apart."""
    snapshot, there = Snapshot(0, model_of("gpt2")), torch.stack([TEXT % 3 == 0, TEXT % 5 == 0])
    coder = features()
    found = DictionaryQuality(TEXT, coder, SITE, features=there)(snapshot)
    _, reads = Anatomy(snapshot.model).run(TEXT, [SITE])
    x = reads[SITE][:, 1:].flatten(0, 1)
    f = coder.encode(x).double().numpy()
    for feature, own in enumerate(there[..., 1:].flatten(1).numpy()):
        w = Probe(x.double().numpy(), own).direction
        expected = absorption(f, x.double().numpy(), coder.W_dec.double().numpy(), w, own)
        np.testing.assert_allclose(found["absorption"][feature], expected["full"])
        np.testing.assert_allclose(found["absorption_silent"][feature], expected["silent"])
    assert (found["absorption_se"] >= 0).all()
    assert (found["absorption"] <= found["absorption_silent"]).all()


@pytest.mark.parametrize("there", [torch.ones(12, 24, dtype=torch.bool), torch.zeros(2, 12, 24, dtype=torch.bool)])
def test_features_that_do_not_fit_are_refused(there: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"features are \(feature, \*\(12, 24\)\) of places"):
        DictionaryQuality(TEXT, perfect(D), SITE, features=there)
