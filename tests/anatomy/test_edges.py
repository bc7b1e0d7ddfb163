"""Edges of every family: cutting all is the other prompt, cutting the edges of one part is writing that part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from devmon.anatomy import Anatomy, Layout
from devmon.anatomy.edges import Edges, Sent
from devmon.data.prompt_pairs import PromptPairs, broken_repeats
from devmon.errors import DataError, InstrumentError
from devmon.recipes.language_model import AttentionOnly
from devmon.testing import induction
from tests.anatomy.test_anatomy_sites import CONFIGS, MASKED, OWN, VISION, VOCAB, Own, family

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")  # whose products do not know float64
CAUSAL = [name for name in CONFIGS if name not in (*MASKED, *VISION, *EXPERTS)]


def prompts(seed: int, length: int = 9) -> Tensor:
    return torch.randint(3, VOCAB, (3, length), generator=torch.Generator().manual_seed(seed))


def double(name: str) -> Any:
    return (family(name) if name != "demo" else demo()).double()


def demo() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AttentionOnly(VOCAB).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", [*CAUSAL, "demo"])
def test_cutting_the_edges_of_a_part_is_writing_that_part(name: str) -> None:
    model = double(name)
    edges, anatomy = Edges(model, who="Test"), Anatomy(model)
    clean, corrupt = prompts(0), prompts(1)
    plain, _ = anatomy.run(clean)
    wrong, reads = anatomy.run(corrupt, ["q", "k", "v", "z", *(["mlp_out"] if edges.has_mlp else [])])
    again, _ = edges.sent(clean)
    torch.testing.assert_close(again, plain)
    other_output, other = edges.sent(corrupt)
    torch.testing.assert_close(other_output, wrong)
    assert (plain - wrong).abs().max() > 0.1

    def cut(*which: tuple[str, str]) -> Tensor:
        """Logits with the edges between senders and receivers of these beginnings cut."""
        chosen = torch.zeros_like(edges.exists)
        for sender, receiver in which:
            rows = torch.tensor([one.startswith(sender) for one in edges.senders])
            columns = torch.tensor([one.startswith(receiver) for one in edges.receivers])
            chosen |= rows[:, None] & columns[None]
        assert (chosen & edges.exists).any()
        return edges.cut(clean, chosen & edges.exists, other)

    def written(site: tuple[str, int], head: int | None) -> Tensor:
        def write(value: Tensor) -> Tensor:
            if head is None:
                return reads[site]
            new = value.clone()
            new[:, :, head] = reads[site][:, :, head]
            return new

        return anatomy.run(clean, [], {site: write})[0]

    rough: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}  # RMSNorms of transformers round to float32
    torch.testing.assert_close(edges.cut(clean, torch.zeros_like(edges.exists), other), plain, **rough)
    torch.testing.assert_close(cut(("", "")), wrong, **rough)
    torch.testing.assert_close(cut(("", "logits")), wrong, **rough)
    torch.testing.assert_close(cut(("head 0.2", "")), written(("z", 0), 2), **rough)
    torch.testing.assert_close(cut(("head 1.3", "")), written(("z", 1), 3), **rough)
    assert (cut(("head 0.2", "")) - plain).abs().max() > 1e-3
    torch.testing.assert_close(cut(("", "q 1.1")), written(("q", 1), 1), **rough)
    last = edges.anatomy.kv_heads - 1
    torch.testing.assert_close(cut(("", f"k 0.{last}")), written(("k", 0), last), **rough)
    torch.testing.assert_close(cut(("", "v 1.0")), written(("v", 1), 0), **rough)
    if edges.has_mlp:
        torch.testing.assert_close(cut(("mlp 0", "")), written(("mlp_out", 0), None), **rough)
        torch.testing.assert_close(cut(("", "mlp 1")), written(("mlp_out", 1), None), **rough)


@pytest.mark.parametrize("name", [*CAUSAL, "demo"])
def test_slopes_are_those_of_small_changes_of_one_receivers_input(name: str) -> None:
    """Along what an edge carries: replacing a little of it, back and forth, against slope times difference."""
    model = double(name)
    edges = Edges(model)
    clean = prompts(0)
    _, one = edges.sent(clean)
    _, far = edges.sent(prompts(1))

    def towards(share: float) -> Sent:
        def mix(a: Tensor, b: Tensor) -> Tensor:
            return a + share * (b - a)

        z, mlp = ([mix(a, b) for a, b in zip(*pair, strict=True)] for pair in ((one.z, far.z), (one.mlp, far.mlp)))
        return Sent(mix(one.embed, far.embed), z, mlp)

    def metric(logits: Tensor) -> Tensor:
        return logits.double()[:, -1, 3] - logits.double()[:, -1, 4]

    slopes = edges.slopes(clean, one.embed, lambda output: metric(output).sum())
    ends = towards(5e-3), towards(-5e-3)
    carried = edges.differences(ends[1], ends[0]) / 2
    last = edges.receivers[-1]
    for sender, receiver in (
        ("embed", "q 1.2"),
        ("head 0.1", f"v 1.{edges.anatomy.kv_heads - 1}"),
        ("head 1.0", last),
        ("embed", "k 0.0"),
        *((("head 0.3", "mlp 1"), ("mlp 0", "q 1.0")) if edges.has_mlp else ()),
    ):
        s, r = edges.place(sender, receiver)
        cut = torch.zeros_like(edges.exists)
        cut[s, r] = True
        real = (metric(edges.cut(clean, cut, ends[1])) - metric(edges.cut(clean, cut, ends[0]))).sum() / 2
        group, rows = next((g, rows) for g, rows in edges.groups.items() if rows.start <= r < rows.stop)
        guess = (slopes[group][:, :, r - rows.start] * carried[:, :, s]).sum()
        torch.testing.assert_close(guess, real, rtol=0.03, atol=1e-5, msg=f"{sender} {receiver}: {guess} {real}")


def test_the_graph_of_a_grouped_model_and_of_parallel_blocks() -> None:
    edges = Edges(family("llama"))
    assert edges.senders == [
        "embed",
        "head 0.0",
        "head 0.1",
        "head 0.2",
        "head 0.3",
        "mlp 0",
        "head 1.0",
        "head 1.1",
        "head 1.2",
        "head 1.3",
        "mlp 1",
    ]
    assert edges.receivers[:9] == ["q 0.0", "q 0.1", "q 0.2", "q 0.3", "k 0.0", "k 0.1", "v 0.0", "v 0.1", "mlp 0"]
    assert int(edges.exists.sum()) == 8 + 5 + 8 * 6 + 10 + 11
    parallel = Edges(family("phi"))
    assert int(parallel.exists.sum()) == 12 + 1 + 12 * 6 + 6 + 11
    assert edges.names([edges.place("head 0.1", "k 1.0")[0] * 19 + edges.place("head 0.1", "k 1.0")[1]]) == [
        "head 0.1 → k 1.0"
    ]
    for sender, receiver in (("head 1.0", "q 0.0"), ("head 1.0", "q 1.0"), ("head 9.0", "logits"), ("mlp 1", "mlp 1")):
        with pytest.raises(InstrumentError, match="there is no edge"):
            edges.place(sender, receiver)


def test_models_without_a_sum_are_refused() -> None:
    with pytest.raises(InstrumentError, match="a residual stream that is the sum.*BertForMaskedLM"):
        Edges(family("bert"))
    bare = Own()
    bare.tower[0].never = nn.LayerNorm(8)
    bare.tower[0].forward = lambda x: (y := type(bare.tower[0]).forward(bare.tower[0], x)) + bare.tower[0].idle(y)
    layout = Layout(blocks="tower", qkv="all", out="back", neurons="idle", heads=2, embed="table", unembed="read")
    with pytest.raises(InstrumentError, match="set the input of the MLP apart"):
        Edges(bare, layout).sent(prompts(0))
    with pytest.raises(InstrumentError, match="nothing was seen to enter the mlp of layer 0"):
        Edges(bare, replace(layout, mlp_norm="never")).sent(prompts(0))
    assert Edges(Own(), OWN).sent(prompts(0))[0].shape == (3, 9, VOCAB)


def test_broken_repeats() -> None:
    pairs = broken_repeats(30, prompts=50, period=6, seed=2, bos=29, exclude=(4,))
    for clean, corrupt, answer, foil in zip(
        pairs.clean.tolist(), pairs.corrupt.tolist(), pairs.answer, pairs.foil, strict=True
    ):
        assert clean[0] == corrupt[0] == 29
        assert clean[1:5] == clean[7:]
        assert len(set(clean[1:7])) == 6
        assert not {4, 29} & set(clean[1:] + corrupt[1:])
        assert [i for i in range(11) if clean[i] != corrupt[i]] == [4]
        assert corrupt.count(corrupt[4]) == 1
        assert clean[4] == clean[-1]
        assert int(answer) == clean[5]
        assert int(foil) in set(clean[1:7]) - {clean[4], clean[5]}
    assert len(set(pairs.foil.tolist())) > 10
    again = broken_repeats(30, prompts=50, period=6, seed=2, bos=29, exclude=(4,))
    assert again == pairs != broken_repeats(30, prompts=50, period=6, seed=3, bos=29, exclude=(4,))
    with pytest.raises(DataError, match="more tokens to draw from"):
        broken_repeats(8, period=8)
    ones = torch.ones(3, 4, dtype=torch.int64)
    for wrong in (
        (ones, ones[:, :2], ones[:, 0], 2 * ones[:, 0]),
        (ones, ones, ones[:2, 0], ones[:, 0]),
        (ones, ones, ones[:, 0], ones[:, 0]),
        (ones[:1], ones[:1], ones[:1, 0], 2 * ones[:1, 0]),
    ):
        with pytest.raises(DataError, match="PromptPairs"):
            PromptPairs(*wrong)


def test_the_hand_built_circuit_is_three_edges() -> None:
    """Match and copy read the embedding, the match reads the previous-token head, the logits the induction head."""
    model, pairs = induction(40, 20), broken_repeats(40, prompts=6, bos=0)
    edges = Edges(model)
    clean, _ = edges.sent(pairs.clean)
    _, other = edges.sent(pairs.corrupt)
    kept = [("embed", "v 0.1"), ("embed", "q 1.0"), ("embed", "v 1.0"), ("head 0.1", "k 1.0"), ("head 1.0", "logits")]
    cut = edges.exists.clone()
    for edge in kept:
        cut[edges.place(*edge)] = False
    torch.testing.assert_close(edges.cut(pairs.clean, cut, other)[:, -1], clean[:, -1])
    for edge in (("embed", "v 0.1"), ("head 0.1", "k 1.0"), ("head 1.0", "logits")):
        broken = cut.clone()
        broken[edges.place(*edge)] = True
        assert (edges.cut(pairs.clean, broken, other)[:, -1] - clean[:, -1]).abs().max() > 10, edge
