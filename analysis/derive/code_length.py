"""The prequential code of a run: what its data cost, token by token, to a learner that had not yet seen them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from devmon.analysis.series import Series, checked
from devmon.errors import DataError

TAIL = 0.1  # of the run: its mean loss is the loss at the end; more counts learning as noise, less counts noise


@dataclass(frozen=True)
class PrequentialCode:
    """Of one pass over fresh data, in nats: `length` Σ tokens · loss, `taken_in` Σ tokens · (loss - `end_loss`), the
    information about the data that training put into the weights, with the standard error `taken_in_se` from the noise
    of `end_loss`; and `regret`, the length above `entropy` nats a token, None where no entropy is given."""

    tokens: float
    length: float
    end_loss: float
    taken_in: float
    taken_in_se: float
    regret: float | None = None


def prequential_code(loss: Series, tokens_per_step: float, *, entropy: float | None = None) -> PrequentialCode:
    """The code of the training data by the losses before each update (Blier & Ollivier 2018, 1802.07044).

    `loss` is the logged training loss in nats a token, a value before the update of its step; steps between two logged
    ones are filled in by a straight line. `entropy`, nats a token, is that of the source where it is known
    (`devmon.data.grammars`, `devmon.data.markov`): the regret needs no loss at the end, and is what was paid to learn.

    It is a code length for data that are each seen once: in a second epoch the loss is of what is known already, and a
    held-out loss is none at all. It depends on the order of the data and on the whole training, so it says nothing of
    how small the final weights could be written. `taken_in` takes the loss at the end for what cannot be learnt: while
    that still falls it is too small. The error knows the noise of the last tenth as if its values were
    independent, and not what the straight lines miss. Raises DataError for fewer than 20 finite values, or tokens of 0.
    """
    steps, values, _ = checked(loss.steps, loss.values, name=loss.name)
    if len(steps) < 20 or not tokens_per_step > 0:
        raise DataError(
            f"a prequential code needs 20 logged losses and tokens of a step above 0, got {len(steps)} and "
            f"{tokens_per_step}: log the loss more often"
        )
    # the loss of every step from the first logged to the last
    every = np.arange(steps[0], steps[-1] + 1)
    nats = np.interp(every, steps, values)
    tail = values[steps >= steps[-1] - TAIL * (steps[-1] - steps[0])]
    tail = tail if len(tail) > 2 else values[-3:]
    end, se = float(tail.mean()), float(tail.std(ddof=1) / np.sqrt(len(tail)))

    tokens = float(tokens_per_step * len(every))
    length = float(tokens_per_step * nats.sum())
    regret = None if entropy is None else length - tokens * entropy
    return PrequentialCode(tokens, length, end, length - tokens * end, tokens * se, regret)
