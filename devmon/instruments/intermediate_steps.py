"""At which depth a model has the intermediate step of an answer, and at which the answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout
from devmon.anatomy.sites import Site
from devmon.cost import GPT2_SMALL, Cost, Shape
from devmon.data import ByContent, clustered_groups, clustered_mean, minibatches, probe_tokens
from devmon.data.rows import Rows
from devmon.data.shares import NO_SIGNAL, share
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class IntermediateSteps(ByContent):
    """Prompts a → b → c whose `bridge` b is never said: at which depth the lens has b, and at which the `answer` c.

    `tokens` (prompt, pos) end where c is to come, `bridge` and `answer` (prompt,) are tokens. The lens is final norm
    and unembedding of the stream at the last place; depth 0 is the embedding, L the whole model. A reciprocal rank is 1
    over the rank of the token among all. The twin of a prompt is that half the list further on. `_se` are over prompts;
    `devmon.analysis.step_depths` makes depths of them.

    - `bridge` (depth), 1: mean reciprocal rank of b. Null: `bridge_other`.
    - `bridge_se` (depth), 1: its standard error.
    - `answer` (depth), 1: mean reciprocal rank of c. Null: `answer_other`.
    - `answer_se` (depth), 1: its standard error.
    - `bridge_other` (depth), 1: the same of the twin's b: what is raised whatever the prompt.
    - `bridge_other_se` (depth), 1: its standard error.
    - `answer_other` (depth), 1: the same of the twin's c.
    - `answer_other_se` (depth), 1: its standard error.
    - `moved` (depth), share: how far the answer follows the state, where that of the twin at the last place and this
      depth is put in: log p of the twin's c, over its way from this prompt to the twin. Null: 0; 1 at depth L, exactly.
      NaN unless the twins' answers differ surely.
    - `moved_se` (depth), share: its standard error.
    - `log_p`, nats: log-probability of c. Null: -log of the size of the vocabulary.
    - `log_p_se`, nats: its standard error.

    A lens that reads no b does not say that there is none: it may be written in other coordinates. A state that moves
    the answer before the lens reads it holds a step on its way. Cost: one pass of the prompts and one for each depth.
    Raises DataError for shapes, InstrumentError for a model whose unembedding does not read the stream.
    """

    tokens: Tensor
    bridge: Tensor
    answer: Tensor
    layout: Layout | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "IntermediateSteps", shortest=1))
        for name in ("bridge", "answer"):
            given = torch.as_tensor(getattr(self, name))
            if given.shape != (len(self.tokens),) or given.is_floating_point():
                raise DataError(
                    f"IntermediateSteps needs {name} (prompt,) of integers, one for each of {len(self.tokens)} "
                    f"prompts, got {tuple(given.shape)} of {given.dtype}"
                )
            object.__setattr__(self, name, given.detach().to("cpu", torch.int64, copy=True))
        if len(self.tokens) < 4:
            raise DataError(f"IntermediateSteps needs four prompts or more, got {len(self.tokens)}")

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = "IntermediateSteps"
        anatomy = Anatomy.of(snapshot, self.layout, who)
        anatomy.need_sum()
        anatomy.need_causal(self.tokens)
        twin = torch.arange(len(self.tokens)).roll(-(len(self.tokens) // 2))
        states = self._states(anatomy)  # (depth, prompt, d)
        scores = self._lens(anatomy, states)
        if int(max(self.bridge.max(), self.answer.max())) >= scores.shape[-1]:
            raise InstrumentError(f"{who}: the model has {scores.shape[-1]} logits: give tokens of its vocabulary")

        rows, unit = Rows(headline=["bridge", "answer"], error="standard error over prompts"), "1"
        for name, of in (("bridge", self.bridge), ("answer", self.answer)):
            for other, target, label in (("", of, "its own prompt"), ("_other", of[twin], "another prompt")):
                ranks = _reciprocal(scores, target)
                _put(rows, f"{name}{other}", "depth", ranks, f"reciprocal rank of the {name} of {label}", unit)

        # the state of the twin in the place of one's own, depth by depth
        plain = scores[-1].double().log_softmax(-1)
        own, theirs = (plain.gather(-1, self.answer[at, None])[:, 0] for at in (torch.arange(len(twin)), twin))
        way = own[twin] - theirs
        gone = torch.stack(
            [self._patched(anatomy, depth, states[depth][twin], twin) for depth in range(len(states))], 1
        )
        moved, se = share((gone - theirs[:, None]).numpy(), way.numpy())
        rows.put("moved", "depth", moved, se, "share of the way to the twin's answer", units="share", nan=NO_SIGNAL)
        _put(rows, "log_p", (), own.numpy(), "log-probability of the answer", "nats")
        return rows.dataset(depth=np.arange(len(states)))

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        passes = (2 + shape.layers) * len(self.tokens)
        return Cost(passes, positions=self.tokens.shape[1], products=len(self.tokens) * (shape.layers + 1))

    def _states(self, anatomy: Anatomy) -> Tensor:
        """The stream at the last place, (depth, prompt, d)."""
        sites: tuple[Site, ...] = (("resid_pre", 0), "resid_post")
        parts = []
        for rows in minibatches(len(self.tokens), self.batch_size):
            _, reads = anatomy.run(self.tokens[rows], sites)
            whole = [reads["resid_pre", 0], *(reads["resid_post", i] for i in range(anatomy.layers))]
            parts.append(torch.stack([state[:, -1] for state in whole]))
        return torch.cat(parts, 1)

    def _lens(self, anatomy: Anatomy, states: Tensor) -> Tensor:
        with torch.no_grad():
            return anatomy.capped(anatomy.unembedding(anatomy.final_norm(states))).detach().cpu()

    def _patched(self, anatomy: Anatomy, depth: int, states: Tensor, twin: Tensor) -> Tensor:
        """log p (prompt,) of the twins' answers with these states (prompt, d) at the last place."""
        site: Site = ("resid_pre", 0) if depth == 0 else ("resid_post", depth - 1)
        parts = []
        for rows in minibatches(len(self.tokens), self.batch_size):

            def put_in(value: Tensor, here: Tensor = states[rows]) -> Tensor:
                return torch.cat([value[:, :-1], here[:, None].to(value)], 1)

            scores, _ = anatomy.run(self.tokens[rows], write={site: put_in})
            log_p = scores[:, -1].detach().cpu().double().log_softmax(-1)
            parts.append(log_p.gather(-1, self.answer[twin[rows], None])[:, 0])
        return torch.cat(parts)


def _reciprocal(scores: Tensor, target: Tensor) -> np.ndarray:
    """1 / rank (prompt, depth) of a token of each prompt; of equal logits the rank is the middle one."""
    own = scores.gather(-1, target.expand(len(scores), -1)[..., None])
    rank = 1 + (scores > own).sum(-1) + ((scores == own).sum(-1) - 1) / 2
    return (1 / rank.double()).T.numpy()


def _put(rows: Rows, name: str, dims: str | tuple[()], values: np.ndarray, label: str, units: str) -> None:
    each = np.ones(len(values))
    mean, se = clustered_mean(values, each)
    rows.put(name, dims, mean, se, label, units=units, replicates=clustered_groups(values, each))
