"""The instruments against TransformerLens on the same weights; runs where it is installed (extra `lens`)."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformer_lens", reason="the extra `lens` is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformer_lens import head_detector
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.tools.analysis import direct_logit_attribution

from devmon.data import random_tokens, repeats
from devmon.instruments import InductionHeads, PreviousTokenHeads
from devmon.instruments.composition import Composition
from devmon.instruments.residual_attribution import ResidualAttribution
from devmon.snapshot import Snapshot
from tests.anatomy.test_anatomy_sites import CONFIGS, VOCAB, family

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, not ours
FAMILIES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "gpt_neox": "GPTNeoXForCausalLM"}
assert set(FAMILIES) <= set(CONFIGS)


def bridge(name: str, model: Any, **folding: Any) -> Any:
    """The same weights in a TransformerBridge, as they are; with `folding`, folded as its attribution wants them."""
    copied = copy.deepcopy(model)
    made = build_bridge_from_module(copied, FAMILIES[name], hf_config=copied.config)
    if folding:
        made.enable_compatibility_mode(**folding)
    return made


def patterns(name: str, model: Any, tokens: Tensor) -> list[Tensor]:
    with torch.no_grad():
        _, cache = bridge(name, model).run_with_cache(tokens)
    return [cache["pattern", layer].double() for layer in range(2)]


@pytest.mark.parametrize("name", FAMILIES)
def test_composition_scores(name: str) -> None:
    model = family(name)
    found = Composition()(Snapshot(0, model))["composition"]
    for kind in "KQV":
        theirs = bridge(name, model).all_composition_scores(kind).scores.detach()[0, :, 1]  # (head_from, head)
        ours = found.sel(kind=kind).values[1, :, 0].T
        print(name, kind, "largest difference", np.abs(ours - theirs.numpy()).max())
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_direct_logit_attribution(name: str) -> None:
    """They fold the norm into the unembedding, centre, and (by default) move value biases from heads to the output's
    bias: a difference of definition, left out here."""
    model = family(name)
    tokens = random_tokens(VOCAB - 3, 6, 9, seed=1) + 3
    answers = random_tokens(VOCAB, 6, 1, seed=2)[:, 0]
    foils = (answers + 5) % VOCAB
    prompts = zip(tokens.split(1), answers.split(1), foils.split(1), strict=True)
    parts = [ResidualAttribution(*prompt, ablation_prompts=0) for prompt in prompts]
    ours = np.array([part(Snapshot(0, model))["attribution"].values for part in parts])  # (prompt, component)
    names = parts[0](Snapshot(0, model))["component"].values.tolist()
    made = bridge(name, model, fold_value_biases=False, disable_warnings=True)
    for unit in ("head", "component"):
        with torch.no_grad():
            theirs = direct_logit_attribution(made, tokens, answers, foils, unit=unit)
        rows = dict(zip(theirs.labels, theirs.attribution.double().numpy(), strict=True))
        for layer in range(2):
            heads = [ours[:, names.index(f"head {layer}.{head}")] for head in range(4)]
            if unit == "head":
                for head in range(4):
                    print(name, layer, head, np.abs(rows[f"L{layer}H{head}"] - heads[head]).max())
                    np.testing.assert_allclose(rows[f"L{layer}H{head}"], heads[head], atol=1e-4)
            else:
                attention = sum(heads) + ours[:, names.index(f"attention bias {layer}")]
                np.testing.assert_allclose(rows[f"{layer}_attn_out"], attention, atol=1e-4)
                np.testing.assert_allclose(rows[f"{layer}_mlp_out"], ours[:, names.index(f"mlp {layer}")], atol=1e-4)
        if unit == "component":
            embedding = rows["embed"] + rows.get("pos_embed", 0)
            np.testing.assert_allclose(embedding, ours[:, names.index("embedding")], atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_head_detector(name: str) -> None:
    """Their score is the share of all attention; ours leaves out the first two queries, and for induction all queries
    but those of the second copy whose token came once before."""
    model, probe = family(name), repeats(VOCAB, 8, 20, 0)
    previous = PreviousTokenHeads(tokens=probe.tokens)(Snapshot(0, model))["previous_token"].values
    found = InductionHeads(VOCAB, 8, 20)(Snapshot(0, model))
    shown = patterns(name, model, probe.tokens)
    wanted = [head_detector.get_induction_head_detection_pattern(row[None]).double() for row in probe.tokens]
    doubles = [head_detector.get_duplicate_token_head_detection_pattern(row[None]).double() for row in probe.tokens]
    before = head_detector.get_previous_token_head_detection_pattern(probe.tokens[:1])
    plain = {"exclude_bos": False, "exclude_current_token": False, "error_measure": "mul"}
    for layer, pattern in enumerate(shown):
        for head in range(4):
            here = pattern[:, head]
            scores = [head_detector.compute_head_attention_similarity_score(row, before, **plain) for row in here]
            ours = (previous[layer, head] * 18 + float(here[:, 1, 0].mean())) / 20
            np.testing.assert_allclose(np.mean(scores), ours, atol=1e-4)
            for part, detection in (("prefix_matching", wanted), ("duplicate_token", doubles)):
                rows = zip(here, detection, probe.query, strict=True)
                sums = [float((row * wanted_there)[query].sum()) for row, wanted_there, query in rows]
                np.testing.assert_allclose(found[part][layer, head], sum(sums) / int(probe.query.sum()), atol=1e-4)
