"""Every instrument on every family: finite headlines of the same dimensions for all, with tiny random models.

A new instrument is one line of `INSTRUMENTS`; `test_none_is_forgotten` asks for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import devmon.instruments
from devmon.anatomy import Anatomy
from devmon.cost import Cost
from devmon.data import random_tokens
from devmon.errors import InstrumentError
from devmon.features import BatchTopK, Training
from devmon.instruments import Sketch
from devmon.presets import vision
from devmon.snapshot import Snapshot
from devmon.testing.contract import headlines, state
from tests.anatomy.families import CONFIGS, KINDS, MASKED, PYRAMIDS, VISION, VOCAB, D, T, family
from tests.instruments.made_up import AnyToken, choices, coder, exchanges, features, negated, pairs, tasks, touching

CAUSAL = tuple(name for name in CONFIGS if name not in (*MASKED, *VISION))
LENGTH = 24
TEXT = 3 + random_tokens(VOCAB - 3, 12, LENGTH, seed=0)
PATCHES = 5  # of a 16 x 16 image in 8 x 8 patches, and one class token
LAYER, HEAD, DEPTH = ("layer",), ("layer", "head"), ("depth",)


@dataclass(frozen=True)
class Case:
    """`module` of devmon.instruments, how `name` is built for tokens (batch, pos) of a model, where it makes sense, and
    the dimensions of its headlines."""

    module: str
    name: str
    make: Callable[[Any, Tensor], Any]
    dims: tuple[tuple[str, ...], ...]
    families: tuple[str, ...] = CAUSAL
    nan: str = ""  # why a headline may be NaN in a random model
    refuses: bool = False  # the families that are not named, in words
    told: str = ""  # why its cost is not what passes through the model here


ALL = tuple(CONFIGS)
TOKENS = tuple(name for name in CONFIGS if name not in VISION)
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")  # whose neurons are those of no one map
UNMIXED = tuple(name for name in CONFIGS if name != "bert")  # whose stream is a sum of what the layers add
OUTSIDE = (0, 1, 2)
EMBEDS = "its passes end at the embedding"
UNIGRAM = "there is no common_ratio of order 1"
AT_MOST = "what is asked for can be more than there is"
LAYERS = ("HeadAblation", "ActivationPatching", "Circuit")  # some passes start at a layer: counted in their own tests
RARE = "a random model's effect can be within 3 standard errors of 0"
INSTRUMENTS = [
    # behaviour
    Case("probe_loss", "ProbeLoss", lambda make, x: make(x), ((), ()), refuses=True),
    Case("token_loss", "TokenLoss", lambda make, x: make(x, 40), ((),)),
    Case("repeat_gain", "RepeatGain", lambda make, x: make(VOCAB, 4, LENGTH, exclude=OUTSIDE), ((),)),
    Case("ngram_stages", "NgramStages", lambda make, x: make(x, x[:4], VOCAB, (1, 2)), (), nan=UNIGRAM, told=AT_MOST),
    Case("in_context", "InContextLearning", lambda make, x: make(x, 2, 20), ((), ())),
    Case(
        "few_shot",
        "FewShot",
        lambda make, x: make(VOCAB, shots=(1, 2), prompts=8, exclude=OUTSIDE),
        (("shots",), ("shots",)),
    ),
    Case("markov_references", "MarkovReferences", lambda make, x: make(x, VOCAB), (("solution",), ("solution",))),
    Case("evaluation", "Evaluation", lambda make, x: make(*choices(x)), ((), (), ()), refuses=True),
    Case("negation", "Negation", lambda make, x: make(negated(x)), ((), ()), nan=RARE),
    Case("grammar_excess", "GrammarExcess", lambda make, x: make(x, AnyToken()), ((), ())),
    # attention heads
    Case("induction", "InductionHeads", lambda make, x: make(VOCAB, 4, LENGTH, exclude=OUTSIDE), (HEAD,)),
    Case("attention_sinks", "AttentionSinks", lambda make, x: make(x), (HEAD, DEPTH, DEPTH), ALL),
    Case("attention_distance", "AttentionDistance", lambda make, x: make(x), (HEAD,), ALL),
    Case("attention_contacts", "AttentionContacts", lambda make, x: make(*touching(x), separation=1), ((),), ALL),
    Case("previous_token", "PreviousTokenHeads", lambda make, x: make(tokens=x), (HEAD,), ALL),
    Case(
        "fuzzy_induction",
        "FuzzyInduction",
        lambda make, x: make(torch.tensor([-1] * 3 + [*range(13, 23), *range(3, 13)]), 8, 18),
        (HEAD, ()),
    ),
    Case("fuzzy_induction", "AbstractInduction", lambda make, x: make(torch.arange(VOCAB) % 9, 8, 18), (HEAD, ())),
    Case("fuzzy_induction", "HierarchicalInduction", lambda make, x: make((3, 4), (5, 6), 8, 18), (HEAD, ())),
    Case("copying", "CopyingHeads", lambda make, x: make(tokens=x), (HEAD, HEAD), refuses=True),
    Case("composition", "Composition", lambda make, x: make(draws=16), (), UNMIXED, refuses=True),
    Case("head_spectra", "HeadSpectra", lambda make, x: make(sample=16, length=8), (), refuses=True, told=EMBEDS),
    Case(
        "head_ablation", "HeadAblation", lambda make, x: make(VOCAB, 8, LENGTH, heads=((1, 0),), groups=2), (), nan=RARE
    ),
    # the residual stream
    Case("logit_lens", "LogitLens", lambda make, x: make(x[:4]), (DEPTH, (), HEAD), refuses=True),
    Case("tuned_lens", "TunedLens", lambda make, x: make(x[:6], steps=3), (DEPTH, DEPTH, ()), refuses=True),
    Case(
        "layers",
        "LayerRoles",
        lambda make, x: make(x[:6], permutations=9),
        (LAYER, ()),
        nan=RARE,
        refuses=True,
        told="for 12 layers",
    ),
    Case(
        "residual_attribution",
        "ResidualAttribution",
        lambda make, x: make(x[:6], x[:6, 0], (x[:6, 0] - 3 + 1) % 20 + 3, ablation_prompts=4),
        (),
        nan=RARE,
        refuses=True,
        told="without ablations",
    ),
    Case("patching", "ActivationPatching", lambda make, x: make(pairs(), exact=2), (), nan=RARE),
    Case(
        "circuit",
        "Circuit",
        lambda make, x: make(pairs(), steps=1, shares=(0.1,), random=1),
        (),
        nan=RARE,
    ),
    Case(
        "interchange",
        "Interchange",
        lambda make, x: make(exchanges(x), (("resid_post", 0),), (2,), steps=2, batch=4, random=2),
        (("site", "size"), ("site", "size")),
    ),
    Case("function_vectors", "FunctionVectorHeads", lambda make, x: make(tasks(), exact=2), (), nan=RARE, told=AT_MOST),
    # representations
    Case("linear_probe", "LinearProbe", lambda make, x: make(x, x % 3), (LAYER, LAYER), ALL),
    Case("probe_erasure", "ProbeErasure", lambda make, x: make(x, x % 3), (LAYER,), refuses=True, told="for 12 layers"),
    Case("mdl_probe", "MDLProbe", lambda make, x: make(x, x % 3), (LAYER, LAYER), ALL),
    Case("intrinsic_dimension", "IntrinsicDimension", lambda make, x: make(x), (), ALL),
    Case("representation_sketch", "Sketch", lambda make, x: make(x, dims=8), (LAYER,), ALL),
    Case("soft_entropy", "SoftEntropy", lambda make, x: make(x, per_label=2, vectors=9), (LAYER,) * 3, TOKENS),
    Case("superposition", "Superposition", lambda make, x: make(), (), (*CAUSAL, *MASKED), refuses=True),
    Case(
        "polysemanticity",
        "Polysemanticity",
        lambda make, x: make(x, x % 3),
        (),
        tuple(name for name in ALL if name not in EXPERTS),
        refuses=True,
    ),
    # features and directions
    Case(
        "steering",
        "Steering",
        lambda make, x: make(pairs(), x[:4], ("resid_post", 1), torch.ones(1, D), strengths=(1.0,), random=2),
        (("direction", "strength"),),
    ),
    Case(
        "concept_direction",
        "ConceptDirection",
        lambda make, x: make(*x.repeat(2, 1)[:20].split(10), shuffles=2),
        (("estimator", "layer"),),
        tuple(name for name in ALL if name not in VISION),
    ),
    Case(
        "feature_circuit",
        "FeatureCircuit",
        lambda make, x: make(pairs(), {("resid_post", 1): coder(True)}, steps=1, counts=(2,), random=1, top=2),
        ((), ()),
        nan=RARE,
        told="backward passes of edges are of parts of the model",
    ),
    Case(
        "transcoder",
        "Transcoder",
        lambda make, x: make({0: coder(False), 1: coder(False)}, x[:4], x[:2], most=2),
        ((), ()),
        told="backward passes of graphs go back part of the way",
    ),
    Case(
        "sparse_autoencoder",
        "SparseAutoencoder",
        lambda make, x: make(x, x[:6], ("resid_post", 1), Training(BatchTopK(4), width=1, steps=3), batch=64),
        ((), (), ()),
        nan=RARE,
        told="in whole blocks",
    ),
    Case("dictionary_quality", "DictionaryQuality", lambda make, x: make(x, features(), ("attn_out", 0)), (), nan=RARE),
    Case("feature_lens", "FeatureLens", lambda make, x: make(features(), ("resid_post", 1)), (), CAUSAL),
    Case("site_activations", "SiteActivations", lambda make, x: make(x, ("resid_post", 1)), ((),), (*CAUSAL, *MASKED)),
    # weights
    Case("weight_statistics", "WeightStatistics", lambda make, x: make(), (), ALL),
]
ELSEWHERE = {
    "AttachmentHeads": "of trees; tests/instruments/test_grammar_heads.py",
    "BoundaryAttention": "of spans; tests/instruments/test_grammar_heads.py",
    "StructuralProbe": "of trees; tests/instruments/test_structural_probe.py",
    "TreeStructure": "of sentences; tests/instruments/test_tree_structure.py",
    "BracketClosing": "of brackets; tests/instruments/test_bracket_closing.py",
    "FrozenProbe": "of two models; tests/instruments/test_probe_twins.py",
    "IntermediateSteps": "of prompts in two steps; tests/instruments/test_intermediate_steps.py",
    "PairedEmbeddings": "of two towers; tests/instruments/test_modalities.py",
    "NeuralCollapse": "of classifiers; tests/instruments/test_neural_collapse.py",
    "RegressionReferences": "of numbers in a context; tests/instruments/test_references.py",
    "LLC": "samples for seconds; tests/analysis/test_llc_derive.py, tests/sampling",
    "RestrictedLLC": "samples for seconds; tests/sampling/test_components.py, tests/instruments/test_restricted_llc.py",
    "Susceptibilities": "samples for seconds; tests/instruments/test_susceptibilities.py",
    "BayesianInfluence": "samples for seconds; tests/instruments/test_influence.py",
    "ModelCode": "of any loss; tests/instruments/test_model_code.py",
    "Curvature": "of any loss; tests/instruments/test_curvature.py",
    "ReferenceDrift": "of two models; tests/instruments/test_reference_drift.py",
    "GradientStatistics": "of any loss and update; tests/instruments/test_gradient_statistics.py",
    "RestrictedLoss": "of addition modulo p; tests/instruments/test_fourier_instruments.py",
    "FourierSpectrum": "of addition modulo p; tests/instruments/test_fourier_instruments.py",
}


class OfPatches(nn.Module):
    """A vision encoder of images put together from a book of patches: tokens (batch, pos), the first is not read."""

    def __init__(self, inner: nn.Module, side: int = 8) -> None:
        super().__init__()
        self.inner = inner
        generator = torch.Generator().manual_seed(0)
        self.book = nn.Parameter(torch.randn(VOCAB, 3, side, side, generator=generator))

    def forward(self, tokens: Tensor) -> Any:
        if tokens.shape[1] != PATCHES:
            raise ValueError(f"images of {PATCHES} places")
        rows = self.book[tokens[:, 1:]].unflatten(1, (2, 2))  # (batch, 2, 2, 3, side, side)
        return self.inner(rows.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3))


@cache
def model_of(name: str) -> nn.Module:
    if not of_images(name):
        return family(name)
    return OfPatches(family(name), 16 if name in PYRAMIDS else 8).eval()


def of_images(name: str) -> bool:
    return KINDS.get(name) is T.AutoModel and "towers" not in name


def tokens_of(name: str) -> Tensor:
    return TEXT[:, :PATCHES] if of_images(name) else TEXT


def instrument_of(case: Case, name: str) -> Any:
    module = importlib.import_module(f"devmon.instruments.{case.module}")
    return case.make(getattr(module, case.name), tokens_of(name))


@pytest.mark.parametrize(
    "case, name",
    [pytest.param(case, name, id=f"{case.name}-{name}") for case in INSTRUMENTS for name in case.families],
)
def test_every_instrument_on_every_family(case: Case, name: str) -> None:
    found = instrument_of(case, name)(Snapshot(0, model_of(name)))
    followed = headlines(found)
    assert followed
    for key in followed:
        values = found[key].values
        assert values.size
        assert not np.isinf(values).any(), f"{key} is infinite"
        assert case.nan or np.isfinite(values).all(), f"{key} is NaN: {values}"
    assert not case.dims or tuple(found[key].dims for key in followed) == case.dims
    if "head" in found.sizes and name in CAUSAL:
        assert (found.sizes["layer"], found.sizes["head"]) == (2, 4)


@pytest.mark.parametrize("case", [case for case in INSTRUMENTS if case.refuses], ids=lambda case: case.name)
def test_models_that_make_no_sense_are_refused_by_name(case: Case) -> None:
    for name in sorted(set(ALL) - set(case.families)):
        with pytest.raises(InstrumentError, match=case.name):
            instrument_of(case, name)(Snapshot(0, model_of(name)))


@pytest.mark.parametrize("name", VISION)
def test_images_go_in_as_they_are(name: str) -> None:
    images = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for watch in vision(images, torch.arange(24) % 2, last=10):
        found = watch.instrument(Snapshot(0, family(name)))
        assert all(np.isfinite(found[key].values).all() for key in headlines(found)), watch.name
    _, reads = Anatomy(family(name)).run(images, [("resid_post", 1)])
    sketch = Sketch(images, dims=D)(Snapshot(0, family(name)))["sketch"]  # as many directions as there are: the states
    np.testing.assert_allclose(sketch[2], reads["resid_post", 1].mean(1), rtol=1e-4, atol=1e-5)


PREDICTS = (
    *(
        "ProbeLoss",
        "Evaluation",
        "TokenLoss",
        "RepeatGain",
        "InContextLearning",
        "FewShot",
        "NgramStages",
        "MarkovReferences",
        "GrammarExcess",
    ),
    *("HeadAblation", "ActivationPatching", "FunctionVectorHeads"),
)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("predicts", PREDICTS)
def test_models_that_see_the_answer_are_refused(predicts: str, name: str) -> None:
    case = next(case for case in INSTRUMENTS if case.name == predicts)
    with pytest.raises(
        InstrumentError, match=f"{predicts} needs a model that predicts each token from those before it"
    ):
        instrument_of(case, name)(Snapshot(0, model_of(name)))


@pytest.mark.parametrize("name", CONFIGS)
def test_all_of_them_left_no_trace(name: str) -> None:
    """After the tests above, in one process, the family's model is what it was."""
    fresh = OfPatches(family(name)).eval() if name in VISION else family(name)
    before, after = state(fresh), state(model_of(name))
    assert before == after, [key for key in before if before[key] != after.get(key)]


@pytest.mark.parametrize("case", INSTRUMENTS, ids=lambda case: case.name)
def test_the_cost_is_the_tokens_that_pass_through_the_model(case: Case) -> None:
    """Up to four short passes more are checks that the model is causal, and looks at its sizes."""
    instrument, model = instrument_of(case, "gpt2"), model_of("gpt2")
    tokens = {True: 0, False: 0}

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering = args[0] if args else kwargs["input_ids"]
        tokens[torch.is_grad_enabled()] += entering.shape[0] * entering.shape[1]

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        instrument(Snapshot(0, model))
    finally:
        hook.remove()
    cost, passed = instrument.cost(), tokens[False] + 3 * tokens[True]  # backward passes count two
    assert isinstance(cost, Cost)
    assert case.told == EMBEDS or (cost.work > 0) == (passed > 0), (cost, passed)
    if not case.told and case.name not in LAYERS:
        assert 0.9 * cost.work <= passed <= cost.work + 4 * cost.positions + cost.trials, (cost, passed)


def test_none_is_forgotten() -> None:
    known = {case.name for case in INSTRUMENTS} | set(ELSEWHERE)
    assert set(devmon.instruments.__all__) <= known, "add a line to INSTRUMENTS for each of the others"
