"""Presets on models that have the effects: nothing in them can only be flat, and random tokens are real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from devmon import presets
from devmon.analysis.detection.constants import FEWEST
from devmon.data import random_tokens
from devmon.data.words import case_map
from devmon.errors import DataError
from devmon.instruments import LLC
from devmon.snapshot import Snapshot
from devmon.testing import induction
from devmon.testing.handbuilt_tasks import relational_induction
from tests.support.tokenizers import Words

LENGTH = 33


def watches(tokens: Tensor, **more: Any) -> dict[str, Any]:
    return {watch.name: watch.instrument for watch in presets.full(tokens, last=100, **more)}


def test_full_sees_induction_wherever_induction_shows() -> None:
    """A preset whose tasks the model cannot do measures nothing, however able the model."""
    made = watches(1 + random_tokens(39, 12, LENGTH), vocab_size=40, bos=0)
    model = Snapshot(0, induction(40, LENGTH).eval())
    assert "fuzzy_induction" not in made, "no map that text teaches is known without a tokenizer"
    assert made["patching"].pairs.clean.shape == (96, 1 + 8 + 5)
    for name, variable in (("few_shot", "map_gain"), ("function_vectors", "gain")):
        found = made[name](model)
        value, error = (found[f"{variable}{end}"].values for end in ("", "_se"))
        assert (value > 1).all(), (name, value)
        assert (value > 3 * error).all(), name
    assert made["circuit"].pairs == made["patching"].pairs


def test_full_measures_what_is_dear_seldom_and_the_curvature_beside_the_llc() -> None:
    tokens = random_tokens(40, 12, LENGTH)
    made = {watch.name: watch for watch in presets.full(tokens, vocab_size=40, last=20_000)}
    often = {name: sum(step in watch.steps for step in range(20_001)) for name, watch in made.items()}
    assert often["loss"] > 4 * often["patching"] > 6 * often["circuit"] >= 6 * FEWEST  # points that a search needs
    assert often["circuit"] == often["tuned_lens"]
    assert "curvature" not in made
    with_llc = presets.full(tokens, vocab_size=40, last=20_000, llc=LLC(tokens))
    assert [watch.name for watch in with_llc if watch.name not in made] == ["llc", "curvature"]


def test_full_finds_a_head_that_follows_the_words_of_a_tokenizer() -> None:
    tokenizer = Words()
    mapping = case_map(tokenizer)
    vocab = len(mapping)
    shuffled = mapping.clone()
    shuffled[mapping >= 0] = mapping[mapping >= 0].roll(1)
    text = torch.randint(4, vocab, (12, 24), generator=torch.Generator().manual_seed(0))
    instrument = watches(text, tokenizer=tokenizer)["fuzzy_induction"]
    both = []
    for known in (mapping, shuffled):
        match, copy = (torch.zeros(vocab + 1, vocab + 1, dtype=torch.float64) for _ in range(2))
        words = (known >= 0).nonzero()[:, 0]
        match[known[words], words] = 1.0
        copy[words, known[words]] = 8.0
        # the hand-built model rests at token 0, the tokenizer's texts start with token 1
        order = torch.tensor([1, 0, *range(2, vocab + 1)])
        both.append(relational_induction(match[order][:, order], copy[order][:, order], 24))
    tokens = instrument._probe.tokens
    assert (tokens[:, 0] == 1).all()
    swapped = [_swapped(model) for model in both]
    right, wrong = (instrument(Snapshot(0, model.eval())) for model in swapped)
    assert float(right["gain"]) > 3 > 0.5 > float(wrong["gain"])
    assert float(right["matching"].max()) > 0.9
    assert float(wrong["matching"].max()) < 0.5


def _swapped(model: Any) -> Any:
    """The model with tokens 0 and 1 changed for one another."""
    with torch.no_grad():
        for weight in (model.embed.weight, model.unembed.weight):
            weight[[0, 1]] = weight[[1, 0]]
    return model


@pytest.mark.parametrize("tier", ["economy", "standard", "full"])
def test_random_tokens_are_real_ones_and_padding_is_no_text(tier: str) -> None:
    tokenizer = Words()
    text = torch.randint(4, 20, (16, 30), generator=torch.Generator().manual_seed(0))
    text[:, 26:] = tokenizer.pad_token_id
    for watch in getattr(presets, tier)(text, tokenizer=tokenizer, last=100):
        fields = vars(watch.instrument)
        if fields.get("vocab_size") is not None and "bos" in fields:
            assert fields["bos"] == 1, watch.name
            assert {0, 2, 3, tokenizer.hole} <= set(fields["exclude"]), watch.name
        for data in (fields.get("tokens"), getattr(watch.instrument, "data", None)):
            if isinstance(data, Tensor):
                assert data.shape[1] == 26, watch.name
                assert not (data == tokenizer.pad_token_id).any(), watch.name
    smaller = presets.economy(text, tokenizer=tokenizer, vocab_size=30, last=100)[1].instrument
    assert smaller.vocab_size == 30
    assert max(smaller.exclude) < 30
    with pytest.raises(DataError, match="expected vocab_size or a tokenizer"):
        presets.economy(text, last=100)


def test_small_vocabularies_have_a_standard_preset() -> None:
    """Letters, or the symbols of a task: sequences of copying, without a token twice, are as long as they can be."""
    for size in (27, 50, 200):
        tokens = torch.randint(0, size, (12, 64))
        made = {w.name: w.instrument for w in presets.standard(tokens, vocab_size=size, bos=0, last=10)}
        assert made["copying"].length == min(64 - 1, size - 1)  # after `bos`


def test_few_tokens_still_make_pairs() -> None:
    made = watches(1 + random_tokens(29, 12, 12), vocab_size=30, bos=0)
    assert made["patching"].pairs.clean.shape[1] <= 12


@pytest.mark.parametrize(("length", "bos"), [(64, 0), (24, 0), (16, None), (9, 3)])
def test_no_probe_is_longer_than_the_text(length: int, bos: int | None) -> None:
    """A model whose positions are those of its text, as the ones that are trained on it: what is drawn fits too."""
    tokens, corpus = random_tokens(100, 16, length), random_tokens(100, 16, length, seed=1)
    config = GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=100, n_positions=length, bos_token_id=0, eos_token_id=0
    )
    model = Snapshot(0, GPT2LMHeadModel(config).eval())
    for name, instrument in watches(tokens, vocab_size=100, bos=bos, corpus=corpus).items():
        if name not in ("patching", "circuit", "curvature"):  # whose probes are the text, or shorter by construction
            assert instrument(model).sizes, name
