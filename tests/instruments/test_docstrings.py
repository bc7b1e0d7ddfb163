"""Every variable that an instrument returns is a bullet of its docstring, with its dims and units, and no other is.

    - `name` (dims), unit: meaning [Null: …]

`devmon instruments NAME` prints these bullets as a table. The dims of a scalar are left out. Replicates of a headline
(`name_replicates`) are the same everywhere, and said in `Rows.put`: they have no bullets.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
import xarray as xr

import devmon.instruments
from devmon.data import broken_repeats, random_tokens
from devmon.data.grammars import Brackets
from devmon.features import Dictionary
from devmon.instruments import (
    LLC,
    ActivationPatching,
    AttachmentHeads,
    AttentionSinks,
    BayesianInfluence,
    BoundaryAttention,
    BracketClosing,
    Composition,
    Curvature,
    DictionaryQuality,
    Evaluation,
    FourierSpectrum,
    FrozenProbe,
    GradientStatistics,
    HeadAblation,
    IntermediateSteps,
    ModelCode,
    Negation,
    NeuralCollapse,
    PairedEmbeddings,
    ReferenceDrift,
    RegressionReferences,
    RestrictedLLC,
    RestrictedLoss,
    Sketch,
    Steering,
    StructuralProbe,
    Susceptibilities,
    TreeStructure,
)
from devmon.snapshot import Snapshot
from tests.anatomy.test_anatomy_sites import VOCAB
from tests.instruments.made_up import features, negated
from tests.instruments.test_instruments_families import (
    INSTRUMENTS,
    LENGTH,
    OUTSIDE,
    TEXT,
    instrument_of,
    model_of,
)
from tests.instruments.test_modalities import Towers

BULLET = re.compile(r"- `(?P<name>\w+)`(?: \((?P<dims>\w+(?:, \w+)*)\))?, (?P<units>[^:]+): (?P<meaning>\S.*)")
P = 5


class Regressor(torch.nn.Module):
    """Predictions (batch, pair) of inputs (batch, pair, 2)."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs[..., 0]


class Adder(torch.nn.Module):
    """Logits (batch, P) of x + y modulo P."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed = torch.nn.Embedding(P, 4), torch.nn.Linear(8, P)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        return self.unembed(self.embed(pairs).flatten(1))


def adder() -> Snapshot:
    torch.manual_seed(0)
    return Snapshot(0, Adder().eval())


def regressor() -> Snapshot:
    return Snapshot(0, Regressor())


def gpt2() -> Snapshot:
    return Snapshot(0, model_of("gpt2"))


def returned(name: str) -> dict[str, xr.DataArray]:
    """What an instrument returns, over all settings that add variables."""
    text = 3 + random_tokens(VOCAB - 3, 4, 8, seed=0)
    cases = [case for case in INSTRUMENTS if case.name == name]
    measured = [instrument_of(case, "gpt2")(gpt2()) for case in cases]
    measured += [instrument(snapshot()) for instrument, snapshot in MORE[name](text)] if name in MORE else []
    variables = (pair for dataset in measured for pair in dataset.data_vars.items())
    return {str(key): values for key, values in variables if not str(key).endswith("_replicates")}


FEW: dict[str, Any] = {"draws": 5, "chains": 2, "batch_size": 3, "gamma": 100.0, "lr": 1e-4}
WIDE = Dictionary(torch.eye(32, 40), torch.zeros(40), torch.eye(40, 32) + 0.1, torch.zeros(32))
MORE: dict[str, Any] = {
    "Steering": lambda x: [
        (Steering(broken_repeats(VOCAB, 8, 4), x, ("mlp_out", 1), dictionary=WIDE, latents=(1, 2), random=2), gpt2)
    ],
    "HeadAblation": lambda x: [(HeadAblation(VOCAB, 8, LENGTH, exclude=OUTSIDE, groups=2), gpt2)],
    "Evaluation": lambda x: [
        (Evaluation(x, torch.arange(4) // choices, places, places + 1, torch.arange(4) % choices == 0, places), gpt2)
        for choices in (1, 2)
        for places in [torch.ones(4, dtype=torch.int64)]
    ],
    "Composition": lambda x: [(Composition(pair=((0, 1), (1, 2)), draws=16), gpt2)],
    "ActivationPatching": lambda x: [
        (
            ActivationPatching(broken_repeats(VOCAB, 8, 4, exclude=OUTSIDE), exact=2, paths=((0, 1, "q", 1, 2),)),
            gpt2,
        )
    ],
    "LLC": lambda x: [
        (
            LLC(
                x,
                nbeta=[9.0, 3.0],
                draws=5,
                chains=2,
                gamma=1.0,
                batch_size=3,
                control_variate=True,
                examples=2,
                acceptance=True,
            ),
            gpt2,
        ),
        (LLC(x, **{**FEW, "draws": 30}, precision="bfloat16"), gpt2),
    ],
    "RestrictedLLC": lambda x: [
        (RestrictedLLC(x, components=("mlps",), **{**FEW, "draws": 2, "burn_in": 0}, control_variate=True), gpt2)
    ],
    "Susceptibilities": lambda x: [(Susceptibilities(x, {"a": x}, ["layer 0 mlp"], **FEW, nulls=2), gpt2)],
    "BayesianInfluence": lambda x: [(BayesianInfluence(x, {"a": x}, **FEW), gpt2)],
    "IntermediateSteps": lambda x: [(IntermediateSteps(x, x[:, 0], x[:, 1]), gpt2)],
    "FrozenProbe": lambda x: [(FrozenProbe(model_of("gpt2"), TEXT, TEXT % 3), gpt2)],
    "AttentionSinks": lambda x: [(AttentionSinks(x), gpt2)],
    "Negation": lambda x: [(Negation(negated(TEXT)), gpt2)],
    "NeuralCollapse": lambda x: [
        (
            NeuralCollapse(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2),
            lambda: Snapshot(0, torch.nn.Linear(3, 2)),
        )
    ],
    "RegressionReferences": lambda x: [
        (RegressionReferences(torch.ones(4, 3, 2), torch.ones(4, 3, 1), torch.ones(4, 3), 1.0), regressor)
    ],
    "DictionaryQuality": lambda x: [
        (
            DictionaryQuality(
                x.repeat(10, 1).roll(1, 0),
                features(),
                ("resid_post", 0),
                labels=torch.arange(40) % 2,
                spurious=torch.arange(40) // 2 % 2,
                features=(x.repeat(10, 1).roll(1, 0) % 3 == 0)[None],
            ),
            gpt2,
        )
    ],
    "PairedEmbeddings": lambda x: [
        (PairedEmbeddings(torch.eye(16), torch.ones(16, 3)), lambda: Snapshot(0, Towers())),
    ],
    "ModelCode": lambda x: [(ModelCode(x, tolerance=(0.1, 0.2)), gpt2)],
    "AttachmentHeads": lambda x: [
        (AttachmentHeads(x, (torch.arange(8) - 1).expand(4, 8), torch.zeros_like(x), torch.zeros_like(x), 5), gpt2)
    ],
    "BoundaryAttention": lambda x: [(BoundaryAttention(x, (torch.arange(8) % 2).expand(1, 4, 8)), gpt2)],
    "StructuralProbe": lambda x: [
        (StructuralProbe(x, (torch.arange(8) - 1).expand(4, 8), torch.zeros_like(x), steps=2), gpt2)
    ],
    "TreeStructure": lambda x: [(TreeStructure(x, torch.full((4,), 6)), gpt2)],
    "BracketClosing": lambda x: [
        (BracketClosing(Brackets(3, 2).draw(4, 8, torch.Generator().manual_seed(0)), Brackets(3, 2)), gpt2)
    ],
    "Curvature": lambda x: [(Curvature(x, top=2, probes=2), gpt2)],
    "ReferenceDrift": lambda x: [(ReferenceDrift(model_of("gpt2"), x), gpt2)],
    "GradientStatistics": lambda x: [(GradientStatistics(x[:4], batch_size=1), gpt2)],
    "FourierSpectrum": lambda x: [(FourierSpectrum(P, ("embed.weight",)), adder)],
    "Sketch": lambda x: [(Sketch(x, outputs=True), gpt2)],
    "RestrictedLoss": lambda x: [(RestrictedLoss(torch.rand(P, P) < 0.5), adder)],
}


def bullets(kind: type) -> dict[str, tuple[tuple[str, ...], str]]:
    """Name to dims and units of the bullets of a class; wrapped lines are indented by two signs."""
    text = re.sub(r"\n {2,}(?=\S)", " ", inspect.getdoc(kind) or "")
    entries = [BULLET.fullmatch(line) for line in text.split("\n") if line.startswith("- ")]
    assert all(entries), [line for line in text.split("\n") if line.startswith("- ") and not BULLET.fullmatch(line)]
    names = [entry["name"] for entry in entries if entry]
    assert len(set(names)) == len(names), f"twice in {kind.__name__}: {names}"
    return {e["name"]: (tuple((e["dims"] or "").split(", ")) if e["dims"] else (), e["units"]) for e in entries if e}


@pytest.mark.parametrize("name", devmon.instruments.__all__)
def test_every_variable_is_a_bullet_with_its_dims_and_units(name: str) -> None:
    written = bullets(getattr(devmon.instruments, name))
    data = returned(name)
    assert data, f"add a case for {name}"
    assert sorted(written) == sorted(data)
    assert written == {key: (tuple(map(str, v.dims)), v.attrs["units"]) for key, v in data.items()}


@pytest.mark.parametrize("name", devmon.instruments.__all__)
def test_the_first_paragraph_is_a_sentence(name: str) -> None:
    """It is stored with every run, and is the line of an instrument in the list of all."""
    first = (inspect.getdoc(getattr(devmon.instruments, name)) or "").split("\n\n")[0]
    assert first.endswith(".")
    assert "\n" not in first, first


def test_a_bullet_is_told_from_what_only_looks_like_it() -> None:
    class Form:
        """A form.

        - `a` (layer, head), nats per token: what it is,
          on two lines. Null: `b`.
        - `b`, 1: a scalar.
        """

    class Bare:
        """A form.

        - `a` (layer): no unit.
        """

    assert bullets(Form) == {"a": (("layer", "head"), "nats per token"), "b": ((), "1")}
    with pytest.raises(AssertionError, match="no unit"):
        bullets(Bare)
