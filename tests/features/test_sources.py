"""Streams of activations: the right places of the right sites, each once a time around, the same at every call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from devmon.anatomy import Anatomy
from devmon.errors import DataError, InstrumentError
from devmon.features import BatchTopK, Held, Streamed, TopK, Training, train
from devmon.features.sources import site_activations
from tests.anatomy.families import CONFIGS, VOCAB, D
from tests.instruments.test_instruments_families import CAUSAL, model_of

LAST = ("mlp_out", 1)
TOKENS = 3 + torch.randint(VOCAB - 3, (20, 11), generator=torch.Generator().manual_seed(0))


def stream(**options: object) -> Streamed:
    return Streamed(model_of("gpt2"), TOKENS, [LAST], batch=20, block=60, **options)  # type: ignore[arg-type]


def rows(x: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


def test_every_place_but_the_first_comes_once() -> None:
    _, reads = Anatomy(model_of("gpt2")).run(TOKENS, [LAST])
    expected = reads[LAST][:, 1:].flatten(0, 1)
    source = stream()
    assert source.places == len(expected) == 200
    seen = torch.cat([source(step)[0] for step in range(9)])  # blocks of 6 sequences, 3 batches each
    assert len(rows(seen)) == 180
    near = torch.cdist(seen, expected, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert float(near.max()) < 1e-5


def test_a_batch_is_the_same_in_whatever_order_it_is_asked_for() -> None:
    one, two = stream(), stream()
    forward = [one(step)[0] for step in range(8)]
    backward = [two(step)[0] for step in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(stream(seed=1)(0)[0], forward[0])
    assert len(rows(forward[0]) & rows(forward[3])) == 0


def test_no_more_than_two_blocks_are_held() -> None:
    source = stream()
    for step in range(20):
        source(step)
        assert source._held is not None
        assert len(source._held[1]) <= 60


def test_held_rows_come_once_a_time_around_with_their_targets() -> None:
    x = torch.arange(10.0)[:, None]
    source = Held(x, 2 * x, batch=4)
    for around in range(0, 20, 10):
        seen = torch.cat([source(step)[0] for step in range(5)])[around : around + 10]
        assert sorted(seen[:, 0].tolist()) == list(range(10))
    given, target = source(3)
    assert torch.equal(2 * given, target)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_dictionary_is_trained_on_any_family(name: str) -> None:
    """At every site that is a vector by place, and from an MLP's input to what it adds where that is the stream."""
    model = model_of(name)
    anatomy = Anatomy(model)
    sites = ["resid_post", "z", "attn_out", "normed"] + (["mlp_out"] if anatomy.has_mlp else [])
    for site in sites:
        source = Streamed(model, TOKENS, [(site, 0 if site == "normed" else 1)], batch=64)
        coder = train(Training(BatchTopK(2), width=1, steps=3), source).dictionary
        assert torch.isfinite(coder.W_dec).all()
    layered = [("mlp_in", 0), ("mlp_in", 1)], [("mlp_out", 0), ("mlp_out", 1)]
    if anatomy.layout.post_norm or not anatomy.has_mlp:
        with pytest.raises(InstrumentError, match="mlp_out|no stream whose norm|MLP"):
            Streamed(model, TOKENS, *layered)
        return
    source = Streamed(model, TOKENS, *layered, batch=64)
    training = Training(TopK(2), width=1, steps=3, form="cross-layer transcoder", parts=2)
    assert train(training, source).dictionary.outputs == 2 * source(0)[1].shape[1] // 2


def test_what_the_mlp_reads_is_its_input() -> None:
    for name in ("gpt2", "llama", "gpt_neox"):
        if name not in CONFIGS:
            continue
        model = model_of(name)
        anatomy, seen = Anatomy(model), []
        mlp: Any = anatomy.blocks[1].mlp
        handle = mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # noqa: B023
        x, y = site_activations(anatomy, TOKENS, [("mlp_in", 1)], [("mlp_out", 1)])
        handle.remove()
        torch.testing.assert_close(x, seen[-1][:, 1:].flatten(0, 1))
        with torch.no_grad():
            torch.testing.assert_close(mlp(x[None])[0], y)


@pytest.mark.parametrize(
    "site, words",
    [
        (("mlp_out", 7), "layers 0 to"),
        (("nowhere", 0), "is no site"),
        (("pattern", 0), "no vector by place"),
        ("mlp_out", "a name and a layer"),
    ],
)
def test_a_site_that_is_not_there_is_refused(site: object, words: str) -> None:
    with pytest.raises(InstrumentError, match=words):
        Streamed(model_of("gpt2"), TOKENS, [site])  # type: ignore[list-item]


def test_fewer_places_than_latents_are_refused() -> None:
    with pytest.raises(DataError, match=f"{D * 20} latents need at least as many places, got 200"):
        train(Training(TopK(2), width=20, steps=2), stream())


def test_no_later_layer_runs() -> None:
    model, ran = model_of("gpt2"), []
    blocks: Any = model.transformer.h  # type: ignore[union-attr]
    handles = [block.register_forward_hook(lambda *_, at=i: ran.append(at)) for i, block in enumerate(blocks)]
    handles.append(model.lm_head.register_forward_hook(lambda *_: ran.append("unembedding")))  # type: ignore[union-attr]
    anatomy = Anatomy(model)
    anatomy.run(TOKENS[:1])
    cases = {("mlp_out", 0): [0], ("mlp_out", 1): [0, 1], ("resid_pre", 0): [], ("resid_pre", 1): [0]}
    _, reads = anatomy.run(TOKENS, list(cases))
    for site, expected in cases.items():
        ran.clear()
        early = anatomy.read_up_to(TOKENS, [site])
        assert ran == expected
        assert torch.equal(early[site], reads[site])
    for handle in handles:
        handle.remove()
    assert not any(block._forward_pre_hooks for block in blocks)
