"""Spectra of heads: circuits in closed form, full matrices over the vocabulary, all families, the contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.anatomy import Anatomy
from devmon.errors import DataError, InstrumentError
from devmon.instruments.head_spectra import HeadSpectra
from devmon.snapshot import Snapshot
from devmon.testing import AttentionOnly, InstrumentContract, even, fixed_offset, induction
from tests.anatomy.test_anatomy_sites import CONFIGS, HEADS, MASKED, VISION, VOCAB, D, family
from tests.instruments.test_composition import random_model

CAUSAL = [name for name in CONFIGS if name not in MASKED and name not in VISION]
LEARNED = ("gpt2", "gpt_neo", "opt", "gpt_bigcode", "gpt_bigcode, by head")
SINGLE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")  # experts are multiplied in float32 at most


def measure(model: nn.Module, **more: Any) -> Any:
    return HeadSpectra(**{"length": 8, **more})(Snapshot(0, model.eval()))


def token_model(*circuits: Tensor, attend: Tensor | None = None, length: int = 8) -> AttentionOnly:
    """One layer on one-hot tokens and places, whose heads have the OV circuits (vocab, vocab) that are given."""
    vocab = len(circuits[0])
    width = 2 * vocab + length
    eye = torch.eye(width, dtype=torch.float64)
    heads = []
    for circuit in circuits:
        add, query = torch.zeros_like(eye), torch.zeros_like(eye)
        add[:vocab, vocab : 2 * vocab] = circuit
        if attend is not None:
            query[:] = attend
        heads.append((query, add))
    return AttentionOnly(eye[:vocab], eye[2 * vocab :], [heads], eye[:, vocab : 2 * vocab])


def test_an_identity_copies_and_its_negative_suppresses() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    turn = torch.zeros(6, 6, dtype=torch.float64)
    turn[[0, 2, 4], [1, 3, 5]], turn[[1, 3, 5], [0, 2, 4]] = 1.0, -1.0  # eigenvalues ±i
    shift = torch.diag(torch.ones(5, dtype=torch.float64), 1)  # no eigenvalues but zeros
    found = measure(token_model(3 * eye, -2 * eye, turn, shift))
    np.testing.assert_allclose(found["copying"][0], [1, -1, 0, np.nan], atol=1e-12)
    np.testing.assert_allclose(found["copying_singular"][0], [1, -1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(found["copy_rate"][0], [1, 0, 0, 0])
    z = 5**0.5  # an entry of 1 among 0s: (1 − 1/6) / √(1/6 · 5/6)
    np.testing.assert_allclose(found["copy_z"][0, :3], [z, -z, 0], atol=1e-9)
    np.testing.assert_allclose(found["copy_z"][0, 3], -5 / 6 / z, atol=1e-9)
    np.testing.assert_allclose(found["ov_rank"][0], [6, 6, 6, 5], rtol=1e-6)
    assert "eigenvalues" in found["copying"].attrs["nan"]
    np.testing.assert_allclose(found["copy_chance"], 1 / 6)


def test_eigenvalues_of_rounding_say_nothing() -> None:
    """A circuit N with N² = 0 in a random basis: eigenvalues are computed as some 1e-9, not as zeros."""
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    nilpotent = torch.zeros(6, 6, dtype=torch.float64)
    nilpotent[[0, 2, 4], [1, 3, 5]] = 1.0
    found = measure(token_model(basis @ nilpotent @ basis.T))
    assert np.isnan(found["copying"]).all()
    np.testing.assert_allclose(found["copying_singular"], 0, atol=1e-9)
    np.testing.assert_allclose(found["ov_rank"], 3.0, rtol=1e-6)


@pytest.mark.parametrize("c", [0.5, 4.0])
def test_a_circuit_that_is_not_normal_has_two_scores(c: float) -> None:
    """[[1, c], [0, 1]]: both eigenvalues 1, singular values with s₁ s₂ = 1, s₁² + s₂² = 2 + c², so Σs = √(4 + c²)."""
    found = measure(token_model(torch.tensor([[1.0, c], [0.0, 1.0]], dtype=torch.float64)))
    np.testing.assert_allclose(found["copying"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(found["copying_singular"], 2 / np.sqrt(4 + c**2), rtol=1e-9)
    np.testing.assert_allclose(found["ov_rank"], (4 + c**2) / (2 + c**2), rtol=1e-9)


def test_heads_that_look_at_tokens_and_at_places() -> None:
    """One-hot tokens and places: Var over keys of α δ(t, query) is α² (1 − 1/n) / n."""
    vocab, length = 5, 8
    for alpha, beta in ((3.0, 0.0), (0.0, 2.0), (3.0, 2.0)):
        attend = torch.zeros(2 * vocab + length, dtype=torch.float64)
        attend[:vocab], attend[2 * vocab :] = alpha, beta
        found = measure(token_model(torch.eye(vocab, dtype=torch.float64), attend=attend.diag()))
        token, place = alpha**2 * (1 - 1 / vocab) / vocab, beta**2 * (1 - 1 / length) / length
        np.testing.assert_allclose(found["positional_share"], place / (place + token), atol=1e-12)
        np.testing.assert_allclose(found["matching"], 1.0 if alpha else np.nan, atol=1e-12)
        np.testing.assert_allclose(found["matching_singular"], 1.0 if alpha else np.nan, atol=1e-12)
        rank = (alpha * vocab + beta * length) ** 2 / (alpha**2 * vocab + beta**2 * length)
        np.testing.assert_allclose(found["qk_rank"], rank, rtol=1e-6)


def test_the_induction_circuit() -> None:
    found = measure(induction(12, 14))
    np.testing.assert_allclose(found["copying"], [[np.nan, np.nan], [1, np.nan]], atol=1e-9)
    np.testing.assert_allclose(found["copy_rate"], [[np.nan, np.nan], [11 / 12, np.nan]])  # all but the first token
    assert float(found["positional_share"][0, 1]) == pytest.approx(1.0), "it looks one place back"
    offset = measure(fixed_offset(12, 14, 3))
    np.testing.assert_allclose([offset["copying"], offset["positional_share"]], 1.0, atol=1e-9)
    assert np.isnan(measure(even(12, 14))["copying"]).all()


def half_silent() -> AttentionOnly:
    """Copies 2 tokens of 12 and reads nothing of tokens and places to attend."""
    circuit = torch.eye(12, dtype=torch.float64)
    circuit[2:] = 0
    attend = torch.zeros(32, dtype=torch.float64)
    attend[12:24] = 1.0
    return token_model(circuit, attend=attend.diag())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model", [induction(12, 14), fixed_offset(12, 14, 3), half_silent()])
def test_a_rotation_of_the_stream_changes_nothing(model: AttentionOnly, seed: int) -> None:
    """Circuits that are zero because nothing is read where a head writes are zero up to rounding then."""
    plain = measure(model)
    width = model.embed.weight.shape[1]
    turn = torch.linalg.qr(
        torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).Q
    heads = []
    for block in model.blocks:
        reads, writes = block.query.weight.T, block.out.weight.T  # type: ignore[union-attr, operator]
        pairs = zip(reads.split(width, 1), writes.split(width), strict=True)
        heads.append([(turn.T @ a.detach() @ turn, turn.T @ b.detach() @ turn) for a, b in pairs])
    embed, positions, unembed = model.embed.weight @ turn, model.positions @ turn, turn.T @ model.unembed.weight.T
    turned = measure(AttentionOnly(embed.detach(), positions.detach(), heads, unembed.detach()))
    for name in ("copying", "copying_singular", "matching", "ov_rank", "copy_rate", "copy_z", "positional_share"):
        np.testing.assert_allclose(turned[name], plain[name], atol=1e-5, err_msg=name)


def spectra(matrix: np.ndarray) -> tuple[float, float]:
    values, singular = np.linalg.eigvals(matrix), np.linalg.svd(matrix, compute_uv=False)
    return values.sum().real / np.abs(values).sum(), values.sum().real / singular.sum()


def effective(matrix: np.ndarray) -> float:
    singular = np.linalg.svd(matrix, compute_uv=False)
    return float(singular.sum() ** 2 / (singular**2).sum())


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family_by_full_matrices(name: str) -> None:
    model = family(name) if name in SINGLE else family(name).double()
    found, anatomy = measure(model), Anatomy(model)
    embed = model.get_input_embeddings().weight.detach().double().numpy()
    unembed = model.get_output_embeddings().weight.detach().double().numpy().T
    for layer in range(2):
        q, k, v, o = (
            w.detach().double().numpy()
            for w in (anatomy.W_Q(layer), anatomy.W_K(layer), anatomy.W_V(layer), anatomy.W_O(layer))
        )
        for head in range(HEADS):
            here = found.isel(layer=layer, head=head)
            circuit = embed @ v[head] @ o[head] @ unembed
            match = embed @ q[head] @ k[head].T @ embed.T
            np.testing.assert_allclose([here["copying"], here["copying_singular"]], spectra(circuit), atol=1e-5)
            np.testing.assert_allclose([here["matching"], here["matching_singular"]], spectra(match), atol=1e-5)
            np.testing.assert_allclose(here["ov_rank"], effective(v[head] @ o[head]), rtol=1e-5)
            np.testing.assert_allclose(here["qk_rank"], effective(q[head] @ k[head].T), rtol=1e-5)
            hit = circuit.argmax(1) == np.arange(VOCAB)
            z = (np.diag(circuit) - circuit.mean(1)) / circuit.std(1)
            for part, values in (("copy_rate", hit), ("copy_z", z)):
                np.testing.assert_allclose(here[part], values.mean(), atol=1e-6 if name in SINGLE else 1e-9)
                np.testing.assert_allclose(
                    here[f"{part}_se"], values.std(ddof=1) / VOCAB**0.5, atol=1e-6 if name in SINGLE else 1e-9
                )
    if name in LEARNED:
        assert (found["positional_share"] > 0.01).all()
        assert (found["positional_share"] < 0.99).all()
    else:
        assert np.isnan(found["positional_share"]).all()
        assert "rotary" in found["positional_share"].attrs["nan"]


def test_positional_share_of_gpt2_by_listing_all_scores() -> None:
    """The variance over keys of all scores (query token, query place, key token, key place), split as an analysis of
    variance: the two parts add up to the whole."""
    model = family("gpt2").double()
    found = measure(model)["positional_share"]
    token = model.transformer.wte.weight.detach().numpy()
    place = model.transformer.wpe.weight.detach().numpy()[:8]
    anatomy = Anatomy(model)
    for head in range(HEADS):
        q, k = (w[head].detach().numpy() for w in (anatomy.W_Q(1), anatomy.W_K(1)))
        both = (token[:, None] + place).reshape(-1, 32)
        scores = (both @ q @ k.T @ both.T).reshape(-1, VOCAB, 8)
        whole = scores.var((1, 2)).mean()
        by_place, by_token = scores.mean(1).var(1).mean(), scores.mean(2).var(1).mean()
        np.testing.assert_allclose(by_place + by_token, whole, rtol=1e-9)
        np.testing.assert_allclose(found[1, head], by_place / whole, rtol=1e-6)


def test_a_sample_of_the_vocabulary_and_its_error() -> None:
    """Rates over half of the tokens scatter around the rate over all with the error that is given."""
    model = family("gpt2")
    whole = measure(model)
    drawn = [measure(model, sample=12, seed=seed) for seed in range(30)]
    assert float(drawn[0]["copy_z"][0, 0]) != float(drawn[1]["copy_z"][0, 0])
    spread = np.std([d["copy_z"] for d in drawn], axis=0, ddof=1)
    error = np.sqrt(np.mean([d["copy_z_se"] ** 2 for d in drawn], axis=0)) * np.sqrt(
        1 - 12 / VOCAB
    )  # finite vocabulary
    np.testing.assert_allclose(np.mean(spread / error), 1.0, atol=0.15)
    gap = np.mean([d["copy_z"] for d in drawn], axis=0) - whole["copy_z"].values
    assert np.abs(gap / error).max() < 4 / 30**0.5
    np.testing.assert_allclose(drawn[0]["copying"], whole["copying"])


def test_random_heads_are_at_the_null() -> None:
    model = family("llama")
    found = measure(model)
    for name in ("copying", "copying_singular", "matching", "matching_singular"):
        null, sd = (float(found[part].sel(score=name)) for part in ("null", "null_sd"))
        assert abs(null) < 4 * sd / 8
        z = (found[name].values - null) / sd
        assert 0.3 < z.std() < 2, (name, z)
        assert np.abs(z).max() < 4


def test_precision_of_the_weights_hardly_matters() -> None:
    model = family("llama").double()
    wide = measure(model)
    narrow = measure(model.float())
    for name in ("copying", "copying_singular", "matching", "ov_rank", "copy_z", "null"):
        np.testing.assert_allclose(narrow[name], wide[name], rtol=1e-4, atol=1e-5)
    half = measure(model.bfloat16())
    np.testing.assert_allclose(half["copying"], wide["copying"], atol=0.05)


def test_what_it_refuses() -> None:
    with pytest.raises(DataError, match="sample >= 2"):
        HeadSpectra(sample=1)
    with pytest.raises(InstrumentError, match="stream that is summed up and unembedded; that of BertForMaskedLM"):
        measure(family("bert"))
    with pytest.raises(InstrumentError, match="HeadSpectra needs"):
        measure(family("vit"))
    with (
        pytest.warns(UserWarning, match="made for 32 positions"),
        pytest.raises(InstrumentError, match="lower vocab_size or length"),
    ):
        measure(family("gpt2"), length=33)
    assert HeadSpectra(sample=20, length=4).cost().work == 0  # no pass but those that try the layout


class TestHeadSpectra(InstrumentContract):
    without_error = dict.fromkeys(("copying", "matching"), "exact functions of the weights")

    def instrument(self) -> HeadSpectra:
        return HeadSpectra(length=6)

    def model(self, seed: int) -> nn.Module:
        return random_model(seed)


class TestOnGPT2(TestHeadSpectra):
    def instrument(self) -> HeadSpectra:
        return HeadSpectra(sample=12, length=6)

    def model(self, seed: int) -> nn.Module:
        return family("gpt2", seed)


def test_a_part_of_the_vocabulary_spares_rows_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("gpt2")
    with torch.no_grad():  # a head that copies some tokens, and loses others to a rival
        attention = model.transformer.h[0].attn
        attention.c_attn.weight[:, 64:72] = torch.linalg.qr(
            torch.randn(D, 8, generator=torch.Generator().manual_seed(0))
        )[0]
        attention.c_proj.weight[:8] = attention.c_attn.weight[:, 64:72].T
    whole = measure(model)
    assert 0 < float(whole["copy_rate"][0, 0]) < 1
    monkeypatch.setattr("devmon.instruments.head_spectra.RIVALS", 3)
    xr.testing.assert_identical(measure(model), whole)
