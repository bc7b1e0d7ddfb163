"""What the spectra of the checkpoints promise of an estimate, and which lr and gamma promise most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from devmon.sampling.choosing.spectrum import Spectrum, mobility
from devmon.sampling.choosing.trials import Trials
from devmon.sampling.constants import (
    BIAS_SHARE,
    FILLED,
    FIRST_GAMMA,
    LAST_GAMMA,
    LOWER_LR,
    RATIO,
    TRIAL_BURN_IN,
    TRIAL_DRAWS,
)


@dataclass(frozen=True)
class Plan:
    """What the spectra promise: for which `lr` and `gamma` an estimate misses least of λ̂, bias by noise included."""

    trials: Trials
    spectra: Sequence[Spectrum]

    @property
    def scale(self) -> float:
        return max(spectrum.scale for spectrum in self.spectra)

    @property
    def top_lr(self) -> float:
        """A quarter of the largest stable step at the first gamma."""
        return 1 / ((1 + FIRST_GAMMA) * self.scale)

    @property
    def pace(self) -> float:
        return mobility(self.trials.start)

    def gammas(self) -> list[float]:
        """From the first gamma to the last by half decades."""
        count = 1 + round(math.log(FIRST_GAMMA / LAST_GAMMA, RATIO))
        return [FIRST_GAMMA * self.scale / RATIO**k for k in range(count)]

    @staticmethod
    def between(largest: float, least: float) -> list[float]:
        """From one gamma to the other in even steps of at most a decade, both included."""
        count = math.ceil(abs(math.log10(largest / least)) - 1e-9)
        return [largest * (least / largest) ** (k / count) for k in range(count)] + [least]

    def of_estimate(self, lr: float, gamma: float, steps_per_draw: int) -> tuple[float, float]:
        """The share of λ̂ that an estimate misses, and its temperature: the worst of all models."""
        start = self.trials.start
        steps = start.burn_in * steps_per_draw, (start.burn_in + start.draws) * steps_per_draw
        return self._worst(lr, gamma, steps)

    def _worst(self, lr: float, gamma: float, steps: tuple[float, float]) -> tuple[float, float]:
        times = (self.pace * lr * steps[0], self.pace * lr * steps[1])
        found = [(s.filled(gamma, times), s.llc()) for s in self.spectra]
        missing = max(1 - value / whole if whole else 0.0 for (value, _), whole in found)
        return missing, min(temperature for (_, temperature), _ in found)

    def steps_per_draw(self, lr: float, gamma: float) -> int:
        """The fewest steps a draw of a trial, by doublings, that miss no more than the longest do by half a tolerance
        and fill the flat directions."""
        most = self.trials.most_steps_per_draw
        least, _ = self._worst(lr, gamma, (TRIAL_BURN_IN * most, (TRIAL_BURN_IN + TRIAL_DRAWS) * most))
        steps = 1
        while steps < most:
            missing, temperature = self._worst(
                lr, gamma, (TRIAL_BURN_IN * steps, (TRIAL_BURN_IN + TRIAL_DRAWS) * steps)
            )
            if missing <= least + self.trials.tolerance / 2 and temperature >= FILLED:
                break
            steps = min(2 * steps, most)
        return steps

    def fills(self, lr: float, gamma: float) -> bool:
        """Whether the longest estimate fills the flat directions at this gamma."""
        return self.of_estimate(lr, gamma, self.trials.longest)[1] >= FILLED

    def best(self, lr: float, bias: float, heated_at: float | None = None) -> tuple[float, float]:
        """The largest lr and gamma that fill the flat directions and at which bias and what is missing together are
        within half a tolerance of the least possible; where nothing fills them, `lr` and the first gamma.

        Minibatch noise biases λ̂ by `bias` at `lr`, in proportion to lr. Where it showed at the gamma `heated_at`, it is
        taken to come from weights far from w*, and to grow with 1 / gamma.
        """
        first = round(math.log(self.top_lr / lr, RATIO))
        smaller = [self.top_lr / RATIO**k for k in range(first, first + LOWER_LR)]
        options = []
        for less in smaller:
            for gamma in self.gammas():
                if self.fills(less, gamma):
                    share = less / lr * (1.0 if heated_at is None else heated_at / gamma)
                    options.append((bias * share + self.of_estimate(less, gamma, self.trials.longest)[0], less, gamma))
        if not options:
            return lr, self.gammas()[0]
        allowed = min(options)[0] + BIAS_SHARE * self.trials.tolerance
        return next((lr, gamma) for error, lr, gamma in options if error <= allowed)
