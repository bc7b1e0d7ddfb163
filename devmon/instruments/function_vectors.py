"""Function-vector heads: whose mean output over prompts of a task makes the model do the task in other prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout, activations
from devmon.anatomy.patching import run_patched
from devmon.cost import Cost
from devmon.data import ByContent, clustered_groups, minibatches
from devmon.data.rows import Rows
from devmon.data.shares import MIN_SIGNAL, signal
from devmon.data.symbol_tasks import TaskPrompts
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot

NO_GAIN = f"NaN where the examples do not help: gain not above {MIN_SIGNAL:g} of its standard errors"
SCREENED = f"{NO_GAIN}; NaN where attribution screened it out"
LABELS = {  # of every effect of a head: long name, units, smallest change, when it is NaN
    "p_effect": ("probability of the answer gained by the head's mean over the task", "probability", None, SCREENED),
    "logit_effect": ("logit of the answer gained by the head's mean over the task", "nats", 0.2, SCREENED),
    "p_effect_null": ("the same with the mean over shuffled prompts", "probability", None, SCREENED),
    "logit_effect_null": ("the same with the mean over shuffled prompts", "nats", None, SCREENED),
    "logit_attribution": ("logit of the answer gained, to first order", "nats", None, NO_GAIN),
}


@dataclass(frozen=True, eq=False)
class FunctionVectorHeads(ByContent):
    """The average indirect effect of each head: its mean output over prompts of a task, put into prompts of no task.

    `tasks` are prompts that show a task by examples, the same prompts with shuffled labels, and the right answers
    (`devmon.data.symbol_tasks`; Todd et al. 2024, 2310.15213). Half of the prompts of each task make the mean of z,
    what the head writes before W_O, at the last place; it takes the place of z at the last place of the shuffled
    prompts of the other half, so that no prompt helps to answer itself. Effects are means over these prompts of all
    tasks.

    - `gain`, nats: log p(answer | prompt) - log p(answer | shuffled), what the examples are worth; all effects are NaN
      where it is not above 3 of its standard errors, for then there is no task to carry.
    - `gain_se`, nats: its standard error over prompts.
    - `p_effect` (layer, head), probability: p(answer | shuffled, mean put in) - p(answer | shuffled), in [-1, 1], that
      of the paper. Null: `p_effect_null`.
    - `p_effect_se` (layer, head), probability: its standard error over prompts.
    - `logit_effect` (layer, head), nats: the same of the logit of the answer minus the mean logit over the vocabulary:
      p moves little where it is near 0 or 1, the logit everywhere (read it first, over time). Null:
      `logit_effect_null`.
    - `logit_effect_se` (layer, head), nats: its standard error over prompts.
    - `p_effect_null` (layer, head), probability: `p_effect` with the mean over *shuffled* prompts put in: what any mean
      does.
    - `p_effect_null_se` (layer, head), probability: its standard error over prompts.
    - `logit_effect_null` (layer, head), nats: the same for `logit_effect`.
    - `logit_effect_null_se` (layer, head), nats: its standard error over prompts.
    - `logit_attribution` (layer, head), nats: slope of that logit at z · (mean - z), attribution patching: the first
      order of `logit_effect`, which screens: the effects of the `exact` heads with the largest absolute value are
      measured, those of the others are NaN.
    - `logit_attribution_se` (layer, head), nats: its standard error over prompts.

    Heads that attend to the answer in the prompt and copy it (`query="shown"`) have a mean of all answers, and score
    little: that is meant (Yin & Steinhardt 2502.14010 on how these heads and induction heads differ). Tasks that share
    an output (a language, a category) leak: a mean can raise all outputs of the set without telling the task; compare
    p_effect with the share of the answers in the set. Errors are over prompts, not over tasks. Cost: 2 passes of all
    prompts, half a pass forward and back, 1 for each of `exact` heads. Raises InstrumentError for models whose heads
    are not known or whose vocabulary is too small, DataError for settings.
    """

    tasks: TaskPrompts
    exact: int = 16
    layout: Layout | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.exact < 0:
            raise DataError(f"FunctionVectorHeads needs exact >= 0, got {self.exact}")

    def cost(self) -> Cost:
        count, measured = len(self.tasks.prompts), len(self._halves()[1])
        return Cost(
            forwards=2 * count + measured * (1 + 2 * self.exact),
            backwards=measured,
            positions=self.tasks.prompts.shape[1],
        )

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who, tasks = type(self).__name__, self.tasks
        anatomy = Anatomy.of(snapshot, self.layout, who)
        anatomy.need_causal(tasks.prompts)
        (shown_output, shown), (blind_output, blind) = (
            activations(snapshot, tokens, ["z"], who, self.layout, self.batch_size)
            for tokens in (tasks.prompts, tasks.shuffled)
        )
        if int(tasks.answer.max()) >= shown_output.shape[-1]:
            raise InstrumentError(
                f"{who}: answers go up to {int(tasks.answer.max())}, {type(snapshot.model).__name__} has "
                f"{shown_output.shape[-1]} logits: give tokens of its vocabulary"
            )
        made, measured = self._halves()
        base = _scores(blind_output[measured], tasks.answer[measured])
        with_examples = _scores(shown_output[measured], tasks.answer[measured])
        gain, gain_se, there = signal(with_examples["log_p"] - base["log_p"])

        # the mean of each head over prompts that show the task, and over shuffled ones, which say what any mean does
        last = [
            {layer: reads["z", layer][:, -1] for layer in range(anatomy.layers)} for reads in (shown, blind)
        ]  # (prompt, head, d_head)
        means = [[self._means(z[layer], made)[measured] for layer in range(anatomy.layers)] for z in last]

        # a gradient for all heads says which are worth a pass of their own; without a gain there is nothing to measure
        guess = self._attribution(anatomy, measured, means[0])
        shape = (anatomy.layers, anatomy.heads)
        chosen = np.argsort(-np.abs(guess.mean(0)).ravel(), kind="stable")[: self.exact if there else 0]
        effects = {name: np.full((len(measured), *shape), np.nan) for name in LABELS}
        for at in chosen:
            layer, head = (int(i) for i in np.unravel_index(at, shape))
            for null, mean in zip(("", "_null"), means, strict=True):
                put_in = self._put(anatomy, measured, layer, head, mean[layer])
                for name in ("p", "logit"):
                    effects[f"{name}_effect{null}"][:, layer, head] = put_in[name] - base[name]
        if there:
            effects["logit_attribution"] = guess

        result = Rows(headline=["gain", "logit_effect"], error="standard error over prompts")
        if not there:
            result.attrs["below_floor"] = NO_GAIN
        label = "log-probability of the answer: with examples minus with shuffled ones"
        prompts = np.ones(len(measured))
        groups = clustered_groups(with_examples["log_p"] - base["log_p"], prompts)
        result.put("gain", (), gain, gain_se, label, units="nats", smallest_change=0.1, replicates=groups)
        for name, (long_name, units, change, nan) in LABELS.items():
            values = effects[name]
            mean, se = values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))
            about: dict[str, Any] = {"smallest_change": change, "nan": nan}
            about["replicates"] = clustered_groups(values, prompts)
            result.put(name, ("layer", "head"), mean, se, long_name, units=units, **about)
        return result.dataset(layer=np.arange(anatomy.layers), head=np.arange(anatomy.heads))

    def _halves(self) -> tuple[Tensor, Tensor]:
        """The prompts that make the means, and those that are measured: the first and second half of each task."""
        made, measured = [], []
        for task in self.tasks.task.unique():
            rows = (self.tasks.task == task).nonzero()[:, 0]
            made.append(rows[: len(rows) // 2])
            measured.append(rows[len(rows) // 2 :])
        return torch.cat(made), torch.cat(measured)

    def _means(self, z: Tensor, made: Tensor) -> Tensor:
        """For every prompt the mean (prompt, head, d_head) of z over the prompts `made` of its task."""
        means = torch.empty_like(z)
        for task in self.tasks.task.unique():
            rows = made[self.tasks.task[made] == task]
            means[self.tasks.task == task] = z[rows].mean(0)
        return means

    def _attribution(self, anatomy: Anatomy, measured: Tensor, mean: list[Tensor]) -> np.ndarray:
        """(prompt, layer, head)."""
        parts = []
        for rows in minibatches(len(measured), self.batch_size):
            here = measured[rows]
            with torch.enable_grad():
                output, reads = anatomy.run(self.tasks.shuffled[here], ["z"], grad=True)
                last = output[:, -1].double()
                answer = self.tasks.answer[here].to(last.device)
                wanted = last.gather(1, answer[:, None])[:, 0] - last.mean(1)
                sites = [("z", layer) for layer in range(anatomy.layers)]
                slopes = torch.autograd.grad(wanted.sum(), [reads[site] for site in sites], allow_unused=True)
            layers = []
            for site, slope in zip(sites, slopes, strict=True):
                z = reads[site].detach()[:, -1].double()
                steep = torch.zeros_like(z) if slope is None else slope[:, -1].double()
                layers.append(((mean[site[1]][rows].double() - z) * steep).sum(-1))
            parts.append(torch.stack(layers, 1).cpu().numpy())
        return np.concatenate(parts)

    def _put(self, anatomy: Anatomy, measured: Tensor, layer: int, head: int, mean: Tensor) -> dict[str, np.ndarray]:
        """The scores of the shuffled prompts with the head's mean at the last place."""
        parts = []
        for rows in minibatches(len(measured), self.batch_size):
            here = measured[rows]
            tokens = self.tasks.shuffled[here]
            source = mean[rows][:, None].expand(-1, tokens.shape[1], -1, -1)
            output, _ = run_patched(anatomy, tokens, [(("z", layer), (slice(None), -1, head), source)], last=True)
            parts.append(_scores(output, self.tasks.answer[here]))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _scores(output: Tensor, answer: Tensor) -> dict[str, np.ndarray]:
    """p, log p and the centred logit (prompt,) of the answer at the last place, in float64."""
    last = output[:, -1].detach().double().cpu()
    log_p = last.log_softmax(-1).gather(1, answer[:, None])[:, 0]
    logit = last.gather(1, answer[:, None])[:, 0] - last.mean(-1)
    return {"p": log_p.exp().numpy(), "log_p": log_p.numpy(), "logit": logit.numpy()}
