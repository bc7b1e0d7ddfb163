"""Instruments: each a frozen dataclass that reads one thing off a snapshot of the weights."""

from devmon.instruments.curvature import Curvature
from devmon.instruments.induction import InductionHeads
from devmon.instruments.linear_probe import LinearProbe
from devmon.instruments.llc import LLC
from devmon.instruments.previous_token import PreviousTokenHeads
from devmon.instruments.probe_loss import ProbeLoss
from devmon.instruments.repeat_gain import RepeatGain

__all__ = [  # noqa: RUF022 (in groups)
    # behaviour
    "ProbeLoss",
    "RepeatGain",
    # attention heads
    "InductionHeads",
    "PreviousTokenHeads",
    # representations
    "LinearProbe",
    # geometry
    "LLC",
    "Curvature",
]
