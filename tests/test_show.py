"""`devmon show` on a run whose chains died."""

import pytest
import torch
from typer.testing import CliRunner

from devmon import Trajectory, Watch, every, observe
from devmon.cli import app
from devmon.instruments import LLC
from devmon.sampling import regression_loss


@pytest.mark.parametrize("lr, rejected", [(0.02, False), (3.0, True)])
def test_a_dead_sampler_is_told(tmp_path, lr, rejected):
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    model = torch.nn.Linear(3, 1, bias=False)
    data = (x, model(x).detach())
    llc = LLC(data, regression_loss, nbeta=40.0, gamma=5.0, lr=lr, chains=4, draws=300, burn_in=60, batch_size=60)
    observe(0, model, [Watch("llc", llc, every(10))], Trajectory(tmp_path / "run.zarr"))
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["show", str(tmp_path / "run.zarr")])
    assert shown.exit_code == 0, shown.output
    assert ("rejected" in shown.output) == rejected, shown.output
