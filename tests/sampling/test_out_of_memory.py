"""What is tried where memory ends, and what is held where."""

import numpy as np
import pytest
import torch
from torch import nn

from devmon.sampling import classification_loss, regression_loss
from devmon.sampling.data import as_examples
from devmon.sampling.evaluators import Looped, Stacked
from devmon.sampling.memory import Plan, out_of_memory
from tests.support.sampling_toys import Net, net_and_data, run

SMALL = {"chains": 3, "draws": 6, "burn_in": 0, "lr": 1e-3, "loss": classification_loss}


@pytest.fixture
def tried(monkeypatch):
    """What is tried, (kind, chains, examples of a pass), and fails where `tried.limit` says so of these three."""

    class Tried(list):
        error = torch.OutOfMemoryError("CUDA out of memory")

        def limit(self, kind, chains, micro):
            return False

    found = Tried()
    for kind in (Stacked, Looped):

        def bind(self, values, kind=kind, plain=kind.bind):
            score = plain(self, values)

            def limited(index, take):
                what = (kind.__name__, len(values[0]), min(self.micro, index.shape[1]))
                if what not in found:
                    found.append(what)
                if found.limit(*what):
                    raise found.error
                return score(index, take)

            return limited

        monkeypatch.setattr(kind, "bind", bind)
    return found


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 GB")]
)
@pytest.mark.parametrize("extra", [{}, {"control_variate": True}])
def test_stacked_chains_are_halved_then_run_in_turn_then_in_smaller_passes(tried, error, extra):
    net, data = net_and_data()
    settings = SMALL | {"chains": 5} | extra
    expected = run(net, data, **settings)
    tried.clear()
    tried.error, tried.limit = error, lambda kind, chains, micro: kind == "Stacked" or micro > 3
    found = run(net, data, **settings)
    stacked, looped = ([what[1:] for what in tried if what[0] == kind] for kind in ("Stacked", "Looped"))
    assert stacked == [(5, 10), (3, 10), (2, 10)]
    assert looped[:3] == [(1, 10), (1, 5), (1, 3)]
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_memory_that_is_not_there_at_all_and_other_errors_are_raised(tried):
    net, data = net_and_data()
    tried.limit = lambda kind, chains, micro: True
    with pytest.raises(torch.OutOfMemoryError):
        run(net, data, **SMALL)
    assert tried[-1] == ("Looped", 1, 1)
    tried.clear()
    tried.error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        run(net, data, **SMALL)
    assert len(tried) == 1


def test_the_passes_at_the_center_are_halved_too():
    class Limited(Net):
        def forward(self, x):
            if len(x) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    net, data = net_and_data()
    limited = Limited()
    limited.load_state_dict(net.state_dict())
    for extra in ({}, {"control_variate": True}):
        found, expected = (run(m, data, stacked=False, **SMALL, **extra) for m in (limited, net))
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-9)


def test_plans():
    plan, full = Plan(5, True, 6), torch.OutOfMemoryError("")
    seen = []
    while plan is not None:
        seen.append((plan.size, plan.stacked, plan.micro))
        plan = plan.after(full)
    assert seen == [
        (5, True, 6),
        (3, True, 6),
        (2, True, 6),
        (1, False, 6),
        (1, False, 3),
        (1, False, 2),
        (1, False, 1),
    ]
    assert Plan(1, True, 1).after(full) == Plan(1, False, 1)
    assert Plan(4, False, 8).after(RuntimeError("other")) is None
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"))
    assert not out_of_memory(ValueError("shape"))


def test_weights_that_are_read_beside_the_graph_move_after_the_backward_pass(monkeypatch):
    """Moving `w` as its gradient comes would change what the other product, through a detached `w`, hands back."""

    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.w = nn.Parameter(torch.eye(3) / 2), nn.Parameter(torch.eye(3) / 3)

        def forward(self, x):
            return x @ self.v @ self.w.detach() + (self.w * self.w).sum()

    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    settings = SMALL | {"loss": regression_loss}
    expected = run(Detached(), (x, x), stacked=True, **settings)
    monkeypatch.setattr("devmon.sampling.flat.BLOCK", 4)  # not small
    found = run(Detached(), (x, x), stacked=False, **settings)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-9)


def test_examples_that_are_too_large_for_the_device_stay_where_they_are(monkeypatch):
    net, (x, y) = net_and_data()
    examples = as_examples((x, y))
    held = examples.to(torch.device("cpu"), torch.float64, most=examples.nbytes() - 1)
    moved = examples.to(torch.device("cpu"), torch.float64, most=examples.nbytes())
    assert held.tree[0] is x
    assert moved.tree[0].dtype == torch.float64
    index = torch.tensor([[3, 1], [0, 3]])
    for batches in zip(held.batch(index), moved.batch(index), held.reader()(index), strict=True):
        assert all(torch.equal(batch, batches[0]) and batch.dtype == batches[0].dtype for batch in batches)
    assert held.positions() == moved.positions()
    expected = {flag: run(net, (x, y), stacked=flag, **SMALL) for flag in (True, False)}
    monkeypatch.setattr("devmon.sampling.chains.most_for_examples", lambda device: 0)
    for flag, traces in expected.items():
        np.testing.assert_array_equal(run(net, (x, y), stacked=flag, **SMALL)["loss"], traces["loss"])
