"""`devmon instruments` and `devmon cost`: what is said is what the classes hold and what a run does."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from devmon import Snapshot, Watch, every, log_spaced
from devmon.analysis.reports.references import CITED
from devmon.anatomy.passes.plan import Plan
from devmon.cli.describe import Description, Variable, description, instrument, instruments, signature, summary
from devmon.cli.root import app
from devmon.cost import (
    LAYOUT_PASSES,
    LAYOUT_TOKENS,
    OVERHEAD,
    READING,
    SOFTMAX,
    Cost,
    Shape,
    estimates,
    together,
    trials,
)
from devmon.errors import DataError
from devmon.instruments import (
    LLC,
    CopyingHeads,
    InductionHeads,
    LinearProbe,
    LogitLens,
    PreviousTokenHeads,
    ProbeLoss,
    RepeatGain,
)
from devmon.sampling import sample
from devmon.testing import even
from devmon.testing.memory import peak_bytes

TOKENS = torch.randint(20, (6, 16), generator=torch.Generator().manual_seed(0))
SOURCE = """
import torch
from devmon import Watch, every
from devmon.callbacks import Monitor
from devmon.instruments import InductionHeads, RepeatGain
watches = [Watch("induction", InductionHeads(50, 10, 32), every(10)), Watch("own", print, every(5))]
def made():
    return Monitor("never.zarr", watches[:1])
nothing = 3
"""


LLCS = """
llcs = [Watch("llc", LLC(torch.zeros(40, 8, dtype=torch.int64), lr=1e-6), every(50))]
with_model = (nn.Linear(120, 100, bias=False), llcs)
"""


@pytest.mark.parametrize("name", list(instruments()))
def test_every_instrument_explains_itself(name: str) -> None:
    kind = instruments()[name]
    assert all(f"  {field.name}: " in signature(kind) for field in fields(kind))
    assert summary(kind).endswith((".", ":"))
    assert callable(getattr(kind, "cost", None)), f"{name} does not tell its cost"


DOC = """Heads that look back.

Scores are means over queries.

- `score` (layer, head), attention: A[q, q - p]: mean over
  queries (Olsson et al. 2022). Null: `uniform`.
- `low` and `high` (layer), nats per token: ends of the 90% interval.
- `uniform`, attention: attention spread evenly.
- `batch_size`: a field, not a variable.

Pitfalls: none.
Raises DataError.
"""


def test_variables_are_read_from_the_bullets_of_a_docstring() -> None:
    parts = description(DOC)
    assert parts.variables == (
        Variable(
            "score", "layer, head", "attention", "A[q, q - p]: mean over queries (Olsson et al. 2022).", "`uniform`"
        ),
        Variable("low", "layer", "nats per token", "ends of the 90% interval."),
        Variable("high", "layer", "nats per token", "ends of the 90% interval."),
        Variable("uniform", "", "attention", "attention spread evenly."),
    )
    assert parts.above == "Heads that look back.\n\nScores are means over queries."
    assert parts.below.startswith("- `batch_size`: a field")
    assert parts.below.endswith("Pitfalls: none.\nRaises DataError.")
    plain = "Norms.\n\nReturns norm(layer): of each layer."
    assert description(plain) == Description(plain, (), "")


def test_the_command_prints_the_text_and_the_variables_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Heads:
        size: int = 3

    @dataclass
    class Plain:
        """Norms.

        Returns norm(layer): of each layer, `size` of them.
        """

    Heads.__doc__ = DOC
    monkeypatch.setattr("devmon.cli.describe.instruments", lambda: {"Heads": Heads, "Plain": Plain})
    lines = CliRunner().invoke(app, ["instruments", "Heads"]).output.splitlines()
    rows = {line.split()[0]: line for line in lines if line.strip()}
    assert rows["size:"] == "  size: int  = 3"
    assert rows["returns"].split() == ["returns", "dims", "unit", "meaning", "null"]
    assert rows["score"].rstrip().endswith("(Olsson et al. 2022).  `uniform`")
    assert rows["uniform"].split() == ["uniform", "attention", "attention", "spread", "evenly."]
    order = [lines.index(line) for line in ("Scores are means over queries.", rows["returns"], "Pitfalls: none.")]
    assert order == sorted(order)
    assert CliRunner().invoke(app, ["instruments", "Plain"]).output.rstrip().endswith(inspect.getdoc(Plain) or "none")


def test_every_instrument_is_cited() -> None:
    assert set(CITED) == set(instruments())


def test_the_commands(tmp_path: Path) -> None:
    run = CliRunner().invoke
    listed = run(app, ["instruments"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in instruments())
    with pytest.raises(DataError, match="perhaps InductionHeads"):
        instrument("induction")
    script = tmp_path / "script.py"
    script.write_text(SOURCE)
    shown = run(app, ["cost", f"{script}:watches", "--last", "100", "--tokens-per-step", "1000"], terminal_width=120)
    words = {line.split()[0]: line.split() for line in shown.output.splitlines() if line.strip()}
    *passes, work, _, unit, share = words["induction"][2:]
    assert unit == "GB"
    assert passes == ["10", "0", "32", "11"]
    told = 11 * InductionHeads(50, 10, 32).cost().tokens()
    assert work == f"{told:.3g}"
    assert share == f"{told / (3 * 1000 * 100):.1%}"
    assert words["own"][-2:] == ["21", "unknown"]
    assert words["all"][-2] == "GB"
    script.write_text(f"{SOURCE}\nfrom devmon.instruments import LLC\nfrom torch import nn\n" + LLCS)
    for name, held in (("llcs", "3 copies"), ("with_model", "0.000144 GB")):
        shown = run(app, ["cost", f"{script}:{name}", "--last", "100"], terminal_width=160)
        assert held in shown.output, shown.output
    assert run(app, ["cost", f"{script}:made", "--last", "100"]).exit_code == 0
    with pytest.raises(DataError, match=r"a list of Watch, a Monitor, or \(model, watches\); got int"):
        run(app, ["cost", f"{script}:nothing", "--last", "5"], catch_exceptions=False)


@pytest.mark.parametrize(
    "instrument",
    [
        InductionHeads(20, 10, 16, batch_size=4),
        RepeatGain(20, 10, 16, batch_size=4),
        PreviousTokenHeads(20, 10, 16),
        ProbeLoss(TOKENS),
        LinearProbe(TOKENS, TOKENS % 3, blocks="blocks"),
        LLC(TOKENS, chains=2, draws=3, burn_in=2, batch_size=4, lr=1e-6),
        LLC(TOKENS, chains=2, draws=3, burn_in=2, batch_size=4, lr=1e-6, control_variate=True),
        LLC(TOKENS, chains=3, draws=3, burn_in=2, batch_size=4, lr=1e-6, control_variate=True, shared_batches=True),
    ],
    ids=lambda instrument: type(instrument).__name__,
)
def test_the_cost_is_what_passes_through_the_model(instrument: object) -> None:
    model = even(20, 16).float()
    seen = {True: 0, False: 0}

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[0] > 1:  # one alone is the check that the model is causal
            seen[torch.is_grad_enabled()] += args[0].shape[0]

    model.register_forward_pre_hook(count)
    told = instrument.cost()  # type: ignore[attr-defined]
    if isinstance(instrument, LLC):  # hooks of a stacked pass see one chain of many
        sample(model, instrument.loss, instrument.data, instrument, stacked=False)
        assert told.backwards == seen[True]
        assert told.forwards >= seen[True] + seen[False] > 0.9 * told.forwards
    else:
        instrument(Snapshot(0, model))  # type: ignore[operator]
        assert (told.forwards, told.backwards, told.positions) == (seen[False], 0, 16)


def test_observations_are_counted_by_the_rule() -> None:
    found = estimates([Watch("a", print, log_spaced(5, 10_000)), Watch("b", print, every(7, start=3))], 100)
    assert [e.observations for e in found] == [4, 14]
    assert found[0].work is None


def test_unembeddings_and_work_on_weights_count_by_the_shape_of_the_model() -> None:
    shape = Shape(layers=2, heads=2, d_model=10, vocab=40, weights=600)  # a token: 600 and 10 · 40
    assert Cost(3, 1, positions=20).tokens(shape) == 100
    assert Cost(3, positions=20, unembedded=0).tokens(shape) == 36
    assert Cost(3, positions=20, products=50, operations=30_000).tokens(shape) == 60 + 20 + 30
    assert Cost(softmaxes=5).tokens(shape) == round(5 * SOFTMAX * 40 / 1000)
    assert ProbeLoss(TOKENS).cost().tokens() > 6 * 16


def test_the_shape_is_read_off_the_model_and_tied_tables_count_once() -> None:
    for tied in (True, False):
        config = GPT2Config(n_layer=2, n_embd=12, n_head=3, vocab_size=50, tie_word_embeddings=tied, n_positions=7)
        model = GPT2LMHeadModel(config)
        weights = sum(p.numel() for p in model.transformer.parameters()) - 50 * 12
        assert Shape.of(model) == Shape(2, 3, 12, 50, weights, tied)
    assert Shape.of(torch.nn.Linear(2, 2)) is None


def test_what_an_earlier_watch_reads_as_often_is_saved() -> None:
    other = TOKENS.roll(1, 1)
    watches = [
        Watch("loss", ProbeLoss(TOKENS), range(8)),
        Watch("again", ProbeLoss(TOKENS.clone()), range(4)),
        Watch("other", ProbeLoss(other), range(8)),
        Watch("oftener", ProbeLoss(other.clone()), range(9)),
    ]
    short = trials(TOKENS.shape[1], 3, layout=False)  # passes of one sequence, which are made once a step
    assert short == 3 * (TOKENS.shape[1] + READING)
    assert [e.saved for e in estimates(watches, 10)] == [0, 4 * (TOKENS.numel() + short), 8 * short, 0]


def test_short_passes_count_their_weights_and_what_python_takes() -> None:
    shape = Shape(layers=2, heads=2, d_model=10, vocab=40, weights=600)
    assert Cost(trials=30).tokens(shape) == 30 + OVERHEAD // 1000
    assert trials() == trials(16) == LAYOUT_PASSES * (LAYOUT_TOKENS + READING)
    assert trials(16, 2) == trials() + 2 * (16 + READING)


def test_the_memory_of_passes_is_what_tensors_take() -> None:
    # Wide enough that states, patterns and logits are of one size: a part that is left out shows.
    config = GPT2Config(n_layer=3, n_embd=64, n_head=4, vocab_size=1500, n_positions=48)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(1500, (24, 48), generator=torch.Generator().manual_seed(0))
    watches = [
        Watch("loss", ProbeLoss(tokens), range(2)),
        Watch("heads", PreviousTokenHeads(tokens=tokens), range(2)),
        Watch("lens", LogitLens(tokens), range(2)),
        Watch("copying", CopyingHeads(1500, 24, 48), range(2)),
    ]
    for told in estimates(watches, 1, model):
        [instrument] = [watch.instrument for watch in watches if watch.name == told.name]
        taken = peak_bytes(lambda instrument=instrument: instrument(Snapshot(0, model)))
        assert told.memory is not None
        assert 1 / 1.3 < taken / told.memory < 1.3, (told.name, taken, told.memory)

    def all_of_them() -> None:
        memo = {"plan": Plan([watch.instrument for watch in watches])}
        for watch in watches:
            watch.instrument(Snapshot(0, model, memo=memo))

    most = together(watches, model)
    assert most is not None
    assert most > max(e.memory or 0 for e in estimates(watches, 1, model))
    assert 1 / 1.3 < peak_bytes(all_of_them) / most < 1.3
    assert together([Watch("own", print, range(2))], model) is None
