"""One pass for all that is read of the same inputs: how many there are, the same numbers alone, and memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import xarray as xr
from torch import Tensor, nn

from devmon import InstrumentError, Snapshot, Trajectory, Watch, observe, presets
from devmon.anatomy import Anatomy, vocabulary
from devmon.anatomy.passes import Plan, Read, Seen, log_softmax, need_causal, read
from devmon.anatomy.vocabulary import log_softmax_
from devmon.instruments import LogitLens, NgramStages, PreviousTokenHeads, ProbeLoss, Sketch
from devmon.recipes.language_model import AttentionOnly
from devmon.testing.memory import peak_bytes

VOCAB = 60
TOKENS = torch.randint(VOCAB, (40, 32), generator=torch.Generator().manual_seed(0))
CORPUS = torch.randint(VOCAB, (64, 32), generator=torch.Generator().manual_seed(1))


def gpt2(vocab: int = VOCAB) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=vocab, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).eval()


@contextmanager
def passes(model_class: type[nn.Module]) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what the models of a class are given, but for trials of one sequence."""
    seen: list[tuple[int, ...]] = []
    forward = model_class.forward

    def counted(self: nn.Module, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(tokens) > 1:
            seen.append(tuple(tokens.shape))
        return forward(self, tokens, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_class, "forward", counted)
        yield seen


def rows(path: Path, watches: list[Watch], model: nn.Module) -> dict[str, xr.Dataset]:
    trajectory = Trajectory(path, seed=1)
    observe(3, model, [Watch(watch.name, watch.instrument, range(9)) for watch in watches], trajectory)
    return {watch.name: trajectory[watch.name].drop_vars("seconds").drop_attrs(deep=False).load() for watch in watches}


def test_the_standard_preset_reads_text_once_and_each_watch_alone_has_the_same_bits(tmp_path: Path) -> None:
    watches = presets.standard(TOKENS, vocab_size=VOCAB, last=10, corpus=CORPUS)
    with passes(transformers.GPT2LMHeadModel) as seen:
        together = rows(tmp_path / "together", watches, gpt2())
    text = [shape for shape in seen if shape[0] * 2 == len(TOKENS)]
    assert text == [(20, 32)] * 2  # 40 sequences, at most 32 at once, in equal parts: once for six watches
    assert seen.count((32, 32)) == 2 + 1  # repeats for three watches, and the tokens of copying
    backwards = rows(tmp_path / "backwards", watches[::-1], gpt2())
    for watch in watches:
        alone = rows(tmp_path / watch.name, [watch], gpt2())[watch.name]
        xr.testing.assert_identical(alone, together[watch.name])
        xr.testing.assert_identical(alone, backwards[watch.name])


@dataclass(frozen=True)
class Reader:
    """The mean of what `what` makes of each pass."""

    what: Any
    asked: tuple[tuple[str, Any], ...] = ()

    def reads(self) -> list[Read]:
        return [Read(self, TOKENS, self.what, **dict(self.asked))]

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        [parts] = read(snapshot, self)
        return xr.Dataset({"value": float(np.mean(parts))})


def broken(seen: Seen) -> float:
    raise InstrumentError("this one is broken")


def test_a_read_that_fails_fails_alone_and_in_the_same_pass(tmp_path: Path) -> None:
    good = Reader(lambda seen: float(seen.nats.mean()), (("predicts", "all"),))
    watches = [Watch("bad", Reader(broken), range(9)), Watch("good", good, range(9))]
    trajectory, model = Trajectory(tmp_path / "run.zarr"), AttentionOnly(VOCAB)
    with passes(AttentionOnly) as seen, pytest.warns(UserWarning, match="this one is broken"):
        measured = observe(0, model, watches, trajectory, strict=False, begun=["bad"])
    assert measured == ["good"]
    assert seen == [(20, 32)] * 2


def test_a_group_that_cannot_run_is_read_one_by_one(tmp_path: Path) -> None:
    """No site of the MLP is there, which the pass itself refuses: who asks for it is told, the other reads."""
    good = Reader(lambda seen: float(seen.nats.mean()), (("predicts", "all"),))
    bad = Reader(lambda seen: 0.0, (("sites", ("mlp_out",)),))
    snapshot = Snapshot(0, AttentionOnly(VOCAB).eval())
    snapshot.memo["plan"] = Plan([bad, good])
    assert float(good(snapshot)["value"]) == float(good(Snapshot(0, snapshot.model))["value"])
    with pytest.raises(InstrumentError, match="Reader: AttentionOnly has no MLP"):
        bad(snapshot)


@pytest.mark.parametrize("model", [gpt2(), AttentionOnly(VOCAB)], ids=["transformers", "own"])
def test_the_last_place_alone_is_that_of_all_places(model: nn.Module) -> None:
    wide = []

    def last(seen: Seen) -> float:
        wide.append(seen.log_p.shape)
        assert torch.allclose(seen.log_p[:, -1], log_softmax(Anatomy(seen.model).run(seen.inputs)[0])[:, -1], atol=1e-5)
        return 0.0

    read(Snapshot(0, model.eval()), Reader(last, (("predicts", "last"),)))
    assert wide == [(20, 1, VOCAB)] * 2


class Flat(nn.Module):
    """What comes after the unembedding wants every place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = AttentionOnly(VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens).view(len(tokens), tokens.shape[1], -1) + torch.zeros(tokens.shape[1], VOCAB)


def test_a_model_that_wants_every_place_has_them() -> None:
    torch.manual_seed(0)
    model = Flat().eval()
    seen = read(Snapshot(0, model), Reader(lambda s: s.log_p[:, 0].clone(), (("predicts", "last"),)))[0]
    expected = log_softmax(model(TOKENS))[:, -1]
    torch.testing.assert_close(torch.cat(seen), expected, atol=1e-5, rtol=0)


def test_log_probabilities_take_the_memory_of_the_logits_unless_somebody_else_holds_it() -> None:
    table = nn.Parameter(torch.randn(4, 5, 7))
    holder = nn.Module()
    holder.table = table
    own = torch.randn(4, 5, 7) * 30 + 1e4
    expected = log_softmax(own.clone())
    assert torch.equal(log_softmax_(holder, own), expected)
    assert torch.equal(own, expected)
    before = table.detach().clone()
    for held in (table.detach(), torch.randn(9, 5, 7)[:4], torch.randn(4, 7, 5).mT):
        kept = held.clone()
        assert torch.equal(log_softmax_(holder, held), log_softmax(kept))
        assert torch.equal(held, kept)
    assert torch.equal(table, before)
    half = torch.randn(4, 5, 7).bfloat16()
    assert log_softmax_(holder, half).dtype == torch.float32


def test_minibatches_are_as_large_as_their_logits_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "LOGITS", 15 * 32 * VOCAB * 4)
    with passes(transformers.GPT2LMHeadModel) as seen:
        read(Snapshot(0, gpt2()), ProbeLoss(TOKENS))
    assert seen == [(14, 32), (14, 32), (12, 32)]


def test_no_more_memory_than_half_again_the_logits_of_a_minibatch(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = 20_000
    model, one = gpt2(vocab), 32 * vocab * 4
    monkeypatch.setattr(vocabulary, "LOGITS", 8 * one)
    monkeypatch.setattr(vocabulary, "CHUNK", one // 4)
    text, corpus = TOKENS[:20], CORPUS[:8]
    with torch.no_grad():
        plain = peak_bytes(lambda: model(text[:7]))  # logits, and the activations
    for instrument in (
        ProbeLoss(text),
        PreviousTokenHeads(tokens=text),
        LogitLens(text),
        Sketch(text, (15, 31), outputs=True, dims=8),
        NgramStages(corpus, text, vocab, common=8),
    ):
        peak = peak_bytes(lambda i=instrument: i(Snapshot(0, model)))
        more = (peak - plain) / (7 * one)
        assert more < 0.5, f"{type(instrument).__name__}: {1 + more:.2f} times the logits"


def test_causality_is_asked_once_a_length_and_not_of_one_token_alone() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            passes.append(len(tokens))
            return self.table(tokens).flip(1)

    passes: list[int] = []
    seen, text = Snapshot(0, Backwards()), torch.arange(12).reshape(2, 6) % 5
    need_causal(seen, torch.zeros(2, 6, dtype=torch.long), "one token")
    assert not passes
    for _ in range(2):
        with pytest.raises(InstrumentError, match="depends on later tokens"):
            need_causal(seen, text, "text")

    causal = Snapshot(0, nn.Sequential(nn.Embedding(5, 5)))
    need_causal(causal, text, "text")
    need_causal(causal, text.flip(0), "other text")
    assert list(causal.memo) == [("causal", 6)]
