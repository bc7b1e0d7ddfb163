"""Interchange: a model that is the algorithm, nulls that find nothing, a subspace that only wakes a dormant path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from devmon.data.interchange import Interchanges, equality_items, hierarchical_equality
from devmon.errors import DataError, InstrumentError
from devmon.features.subspaces import Exchange, orthonormal, split
from devmon.instruments.interchange import Interchange
from devmon.snapshot import Snapshot
from devmon.testing import InstrumentContract
from tests.support.models import LENGTH, VOCAB, random_model

TURN = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
QUICK = {"steps": 200, "batch": 128}


class Equality(nn.Module):
    """Bits e, f of ±1 and two other numbers, turned; the class is e = f. The state is the algorithm's two variables."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Linear(4, 4, bias=False).double()
        self.turned.weight.data = TURN.clone()
        self.back = nn.Linear(4, 4, bias=False).double()
        self.back.weight.data = TURN.T.clone()

    def forward(self, x: Tensor) -> Tensor:
        e, f = self.back(self.turned(x))[:, :2].unbind(1)
        return torch.stack([-e * f, e * f], 1)


def bits(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, count, 4, generator=generator, dtype=torch.float64)
    drawn[..., :2] = drawn[..., :2].sign()
    return drawn[0], drawn[1]


def of_bits(count: int, seed: int = 0) -> Interchanges:
    """The first bit exchanged; the rival exchanges the second."""
    base, source = bits(count, seed)
    label, goal = base[:, 0] == base[:, 1], source[:, 0] == base[:, 1]
    return Interchanges(base, source, label.long(), goal.long(), (base[:, 0] == source[:, 1]).long())


def test_a_model_that_is_the_algorithm_holds_its_variable_in_one_direction() -> None:
    found = Interchange(of_bits(600), ("turned",), (1,), ("back",), **QUICK)(Snapshot(0, Equality()))
    for name in ("iia", "iia_changes", "iia_same", "accuracy", "iia_row"):
        np.testing.assert_array_equal(found[name], 1, err_msg=name)
    np.testing.assert_array_equal(found["iia_rival"], 1)  # the net holds the other variable as well: rivals can score
    assert 1.9 < found["difference"].item() <= 2  # 2 in the exact direction
    assert found["iia_random"].item() < 0.75
    assert found["difference_random"].item() < 1
    assert abs(found["iia_permuted"].item() - 0.5) < 4 * 0.5 / 300**0.5
    np.testing.assert_allclose(found["row_share"], 1)
    assert np.isnan(found["iia_null"]).all()  # a map of full rank sees everything
    changed = found["iia_changes"] * (1 - found["iia_unpatched"]) + found["iia_same"] * found["iia_unpatched"]
    np.testing.assert_allclose(found["iia"], changed)


def test_the_exact_direction_gives_the_algorithm_and_the_whole_state_the_source() -> None:
    pairs = of_bits(200)
    site = Exchange(Snapshot(0, Equality()), pairs.base, "turned")
    source, every = site.states(pairs.source), torch.arange(200)
    exact = site.outputs(every, source, TURN[:, :1])
    np.testing.assert_allclose(exact[:, 1], pairs.source[:, 0] * pairs.base[:, 1], rtol=1e-12)
    own = Equality()(pairs.source).detach()
    np.testing.assert_allclose(site.outputs(every, source), own, rtol=1e-12)
    np.testing.assert_allclose(site.outputs(every, source, torch.eye(4)), own, rtol=1e-12)
    np.testing.assert_array_equal(site.outputs(every, None), Equality()(pairs.base).detach())


class Dormant(nn.Module):
    """States (e, 0, e): the first is not read, the second is read but always 0, the third decides."""

    def __init__(self) -> None:
        super().__init__()
        self.site, self.reader = nn.Linear(1, 3, bias=False).double(), nn.Linear(3, 1, bias=False).double()
        self.site.weight.data = torch.tensor([[1.0], [0.0], [1.0]]).double()
        self.reader.weight.data = torch.tensor([[0.0, 4.0, 1.0]]).double()

    def forward(self, x: Tensor) -> Tensor:
        score = self.reader(self.site(x))
        return torch.cat([-score, score], 1)


def test_a_subspace_that_wakes_a_dormant_path_is_split_into_parts_that_do_nothing() -> None:
    base, source = (each[:, :1] for each in bits(100))
    model = Dormant()
    site = Exchange(Snapshot(0, model), base, "site")
    states, every = site.states(source), torch.arange(100)
    illusion = torch.tensor([[1.0], [1.0], [0.0]]).double() / 2**0.5
    said = site.outputs(every, states, illusion).argmax(1)
    np.testing.assert_array_equal(said, (source[:, 0] > 0).long())  # as if the state held it there
    seen, rest = split(illusion, torch.tensor([[0.0, 4.0, 1.0]]).double() / 17**0.5)
    unpatched = site.outputs(every, None)
    np.testing.assert_allclose(site.outputs(every, states, rest), unpatched, atol=1e-12)
    # what is read lies along (0, 4, 1): of it the true path moves a seventeenth, the dormant one nothing
    np.testing.assert_allclose(seen[:, 0].abs(), np.array([0, 4, 1]) / 17**0.5, atol=1e-12)
    moved = site.outputs(every, states, seen) - unpatched
    np.testing.assert_allclose(moved[:, 1], (source - base)[:, 0], atol=1e-12)


def test_parts_of_a_subspace_are_orthonormal_and_together_span_it() -> None:
    generator = torch.Generator().manual_seed(0)
    subspace, seen = (orthonormal(torch.randn(9, k, generator=generator).double()) for k in (3, 4))
    row, null = split(subspace, seen.T)
    for part in (row, null):
        np.testing.assert_allclose(part.T @ part, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(seen.T @ null, 0, atol=1e-12)
    both = torch.linalg.matrix_rank(torch.cat([row, null, subspace], 1))
    assert both == 6
    assert [part.shape[1] for part in split(subspace, torch.eye(9).double())] == [3, 0]


def measure(model: nn.Module, **settings: object) -> xr.Dataset:
    pairs = hierarchical_equality(2000, seed=3)
    return Interchange(pairs, ("0",), (2,), **({**QUICK, "steps": 60} | settings))(Snapshot(0, model))  # type: ignore[arg-type]


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)).eval()


def test_an_untrained_model_says_one_class_and_is_moved_no_more_than_by_random_subspaces() -> None:
    found, se = measure(mlp(0)), 0.5 / 1000**0.5
    for name in ("iia", "iia_random", "iia_permuted", "iia_rival", "accuracy"):
        assert abs(float(found[name].squeeze()) - 0.5) < 4 * se, name
    assert abs(float((found["difference"] - found["difference_random"]).squeeze())) < 0.1


def test_pairs_whose_label_changes_stand_apart_from_the_others() -> None:
    """A model that says class 0 whatever is exchanged is right where the algorithm says so."""
    model = mlp(0)
    model[2].bias.data = torch.tensor([9.0, 0.0])  # type: ignore[index,union-attr]
    pairs, found = hierarchical_equality(2000, seed=3), measure(model)
    judged = torch.randperm(2000, generator=Snapshot(0, model).generator("split"))[1000:]
    label, goal = pairs.label[judged], pairs.counterfactual[judged]
    for name, kept in {"iia": goal >= 0, "iia_changes": goal != label, "iia_same": goal == label}.items():
        np.testing.assert_allclose(found[name].item(), float((goal[kept] == 0).double().mean()), err_msg=name)


def test_sites_by_path_and_by_name_are_the_same_and_the_last_state_whole_is_the_source() -> None:
    tokens = torch.randint(VOCAB, (12, LENGTH), generator=torch.Generator().manual_seed(0))
    model, last = random_model(0), len(random_model(0).blocks) - 1
    snapshot, other = Snapshot(0, model), tokens.roll(1, 0)
    one, two = (Exchange(snapshot, tokens, site, batch_size=5) for site in (("resid_post", last), f"blocks.{last}"))
    every = torch.arange(12)
    subspace = orthonormal(torch.randn(12, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for basis in (None, subspace):
        said = [site.outputs(every, site.states(other), basis) for site in (one, two)]
        np.testing.assert_allclose(*said, rtol=1e-10)
    np.testing.assert_allclose(one.outputs(every, one.states(other)), model(other)[:, -1].detach(), rtol=1e-10)


def test_hierarchical_equality_is_balanced_and_its_labels_are_the_definition() -> None:
    pairs = hierarchical_equality(4000)
    a, b, c, d = pairs.base.view(-1, 4, 4).unbind(1)
    e, f = pairs.source.view(-1, 4, 4).unbind(1)[:2]
    same, right, other = ((x == y).all(1) for x, y in ((a, b), (c, d), (e, f)))
    np.testing.assert_array_equal(pairs.label, (same == right).long())
    np.testing.assert_array_equal(pairs.counterfactual, (other == right).long())
    np.testing.assert_array_equal(pairs.rival, ((e == b).all(1) == right).long())
    for share in (same, right, other, pairs.label, pairs.counterfactual):
        assert abs(float(share.double().mean()) - 0.5) < 0.04
    inputs, _ = equality_items(1000, torch.Generator().manual_seed(0))
    assert float(inputs.abs().max()) <= 0.5


def test_refusals() -> None:
    pairs = of_bits(20)
    with pytest.raises(DataError, match="8 pairs at least"):
        Interchanges(pairs.base[:7], pairs.source[:7], pairs.label[:7], pairs.counterfactual[:7])
    with pytest.raises(DataError, match="counterfactual"):
        Interchanges(pairs.base, pairs.source, pairs.label, pairs.counterfactual[:5])
    with pytest.raises(DataError, match="sizes from 1"):
        Interchange(pairs, ("turned",), (0,))
    with pytest.raises(DataError, match="for each of its 1 sites"):
        Interchange(pairs, ("turned",), (1,), ("back", "back"))
    for settings, said in (
        ({"sites": ("turn",)}, "no module 'turn': name one of turned, back"),
        ({"sites": ("turned",), "sizes": (5,)}, "5 dimensions was asked for, 'turned' has 4"),
        ({"sites": ("turned",), "readers": ("gone",)}, "reader 'gone' of Equality is nothing"),
    ):
        with pytest.raises(InstrumentError, match=said):
            Interchange(pairs, steps=1, batch=2, **settings)(Snapshot(0, Equality()))  # type: ignore[arg-type]
    with pytest.raises(InstrumentError, match="2 outputs"):
        Interchange(Interchanges(pairs.base, pairs.source, pairs.label + 1, pairs.label), ("turned",))(
            Snapshot(0, Equality())
        )
    twice = nn.Sequential(nn.Linear(4, 4).double(), nn.ReLU())
    twice.append(twice[0])
    with pytest.raises(InstrumentError, match="'0' ran 2 times"):
        Interchange(pairs, ("0",), steps=1, batch=2)(Snapshot(0, twice))


class TestInterchange(InstrumentContract):
    def instrument(self) -> Interchange:
        return Interchange(hierarchical_equality(40), ("0",), (1, 2), ("2",), steps=3, batch=8, random=2)

    def model(self, seed: int) -> nn.Module:
        return mlp(seed)
