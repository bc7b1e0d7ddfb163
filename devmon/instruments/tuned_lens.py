"""The tuned lens: what an affine map, trained for each layer, reads off the residual stream for the unembedding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from devmon.anatomy import Anatomy, Layout, activations
from devmon.cost import GPT2_SMALL, Cost, Shape
from devmon.data import ByContent, clustered_groups, clustered_mean, probe_tokens
from devmon.data.rows import Rows
from devmon.errors import DataError, InstrumentError
from devmon.snapshot import Snapshot, derive_seed


@dataclass(frozen=True, eq=False)
class TunedLens(ByContent):
    """An affine map per layer, then final norm and unembedding, trained to say what the model says (2303.08112).

    Half of the sequences of `tokens` (batch, pos), drawn by `seed`, train the maps, the others test them; the last
    position of a sequence, which has no next token, is left out. `depth` counts the layers that have run (0: the
    embedding). At each depth below the last h ↦ h + s (x W + b), x the state h centred and scaled to unit mean square
    over the training half, s the root mean square of the last layer's states, minimises

        mean over training positions of KL(p ‖ q) + `penalty` · ‖W‖²_F                                       (nats)

    p the model's next-token distribution, q the lens's. The form is that of the authors' code: the penalty pulls
    towards the identity, the raw lens. `steps` iterations of full-batch L-BFGS (float32, or the model's float64) start
    from the identity or from the ridge regression of the last layer's states, whichever is lower, and what is not lower
    than the identity is thrown away: on the training half the tuned lens is never worse than the raw one. Nothing is
    kept from one step of training to the next, so every checkpoint has the same chance. All but `kl_train` and
    `kl_train_raw` are of the test half, with `_se` over its sequences.

    - `kl` (depth), nats: KL(p ‖ q); 0 at the last depth, where the lens is the model. Null: `kl_constant`.
    - `kl_se` (depth), nats: its standard error.
    - `kl_raw` (depth), nats: the same of the logit lens.
    - `kl_raw_se` (depth), nats: its standard error.
    - `loss` (depth), nats per token: cross-entropy of q on the next token.
    - `loss_se` (depth), nats per token: its standard error.
    - `agreement` (depth), share: positions where p and q have the same most likely token.
    - `agreement_se` (depth), share: its standard error.
    - `prediction_depth`, layers: the depth from which on they do.
    - `prediction_depth_se`, layers: its standard error.
    - `kl_constant`, nats: KL from p of the mean of p over the training half, what a map that reads nothing can learn.
    - `kl_constant_se`, nats: its standard error.
    - `kl_train` (depth), nats: KL(p ‖ q) on the training half.
    - `kl_train_raw` (depth), nats: that of the logit lens.

    Pitfalls: the map has d² numbers, so a probe of few positions (fewer than some 10 d) is learnt by heart: kl_train
    far below kl, kl above kl_raw; raise `penalty`, or give more tokens. What it reads the model need not use. Cost:
    besides one pass of the model about 1.25 · `steps` passes, forward and backward, of the unembedding alone over the
    training half, for each layer. Raises DataError for fewer than four sequences, InstrumentError for a model whose
    unembedding does not read the stream right after the final norm (encoders, post-norm).
    """

    tokens: Tensor
    layout: Layout | None = None
    steps: int = 20
    penalty: float = 1e-3
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", probe_tokens(self.tokens, "TunedLens"))
        if len(self.tokens) < 4:
            raise DataError(
                f"TunedLens needs four sequences, half to train on and half to test, got {len(self.tokens)}"
            )
        if self.steps < 1 or not self.penalty >= 0:
            raise DataError(f"TunedLens needs steps >= 1 and penalty >= 0, got {self.steps} and {self.penalty}")

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        """One pass; for each layer the training of its map, passes of the unembedding over half of the sequences."""
        sequences, positions = self.tokens.shape
        trained = sequences // 2 * positions * shape.layers
        # an evaluation is a forward and a backward pass of the unembedding alone
        evaluations = round(1.25 * self.steps) + 4
        products = 2 * evaluations * trained + 2 * trained
        return Cost(sequences, positions=positions, products=products, softmaxes=2 * evaluations * trained)

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        who = type(self).__name__
        anatomy = Anatomy.of(snapshot, self.layout, who)
        anatomy.need_sum()
        sites: tuple[str | tuple[str, int], ...] = (("resid_pre", 0), "resid_post")
        output, reads = activations(snapshot, self.tokens, sites, who, self.layout, self.batch_size)
        if int(self.tokens.max()) >= output.shape[-1]:
            raise InstrumentError(
                f"{who}: the tokens go up to {int(self.tokens.max())} but {type(anatomy.model).__name__} has "
                f"{output.shape[-1]} logits: give tokens of this model's vocabulary"
            )
        stream = [state[:, :-1] for state in (reads["resid_pre", 0], *reads.stack("resid_post"))]
        # half of the sequences to train on, half to test
        order = torch.randperm(len(self.tokens), generator=torch.Generator().manual_seed(derive_seed(self.seed, who)))
        train, test = (part.sort().values for part in order.tensor_split([len(order) // 2]))
        lens = _Lens(anatomy, self.batch_size * (self.tokens.shape[1] - 1))
        log_p = {
            half: _log_softmax(output[rows, :-1]).flatten(0, 1) for half, rows in (("train", train), ("test", test))
        }
        goal = stream[-1][train].flatten(0, 1)
        target = self.tokens[test, 1:].to(output.device)

        # each depth by itself; the lens of the last one is the model, and needs no map
        read: list[dict[str, np.ndarray]] = []
        for depth, state in enumerate(stream):
            seen, unseen = (_floats(state[rows].flatten(0, 1)) for rows in (train, test))
            best, kl_train, kl_train_raw = None, 0.0, 0.0
            if depth < len(stream) - 1:
                best, kl_train, kl_train_raw = _train(
                    lens, seen, _floats(goal), log_p["train"], self.steps, self.penalty
                )
            scores = lens.scores(unseen if best is None else best(unseen)).detach()
            raw = scores if best is None else lens.scores(unseen).detach()
            read.append(
                _compare(log_p["test"], scores, raw, target)
                | {"train": np.array(kl_train), "train_raw": np.array(kl_train_raw)}
            )

        # the null: KL from p of its mean over the training half
        mean = log_p["train"].exp().mean(0)
        null = (log_p["test"].exp() * log_p["test"]).sum(-1) - torch.xlogy(log_p["test"].exp(), mean).sum(-1)
        return _dataset(read, null.reshape(target.shape).double().cpu().numpy())


class _Lens:
    """Final norm, unembedding and cap, over (place, d) in chunks."""

    def __init__(self, anatomy: Anatomy, chunk: int) -> None:
        self.anatomy, self.chunk = anatomy, chunk
        self.dtype = anatomy.W_U.dtype

    def scores(self, state: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._logits(part) for part in state.split(self.chunk)])

    def kl(self, state: Tensor, log_p: Tensor, through: _Affine, slopes: list[Tensor] | None = None) -> float:
        """KL(p ‖ q) summed over places; `slopes` are raised by its gradient in the map's weight and bias."""
        total = 0.0
        for part, log in zip(state.split(self.chunk), log_p.split(self.chunk), strict=True):
            with torch.set_grad_enabled(slopes is not None):
                log_q = _log_softmax(self._logits(through(part)))
                value = F.kl_div(log_q, log, reduction="sum", log_target=True)
            for slope, more in zip(slopes or [], self._slopes(value, through) if slopes else [], strict=True):
                slope += more
            total += value.item()
        return total

    @staticmethod
    def _slopes(value: Tensor, through: _Affine) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, [through.weight, through.bias])  # and none in the model

    def _logits(self, state: Tensor) -> Tensor:
        a = self.anatomy
        return a.capped(a.unembedding(a.final_norm(state.to(self.dtype))))


@dataclass
class _Affine:
    """h ↦ h + scale ((h - mean) / spread · W + b)."""

    mean: Tensor
    spread: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, state: Tensor) -> Tensor:
        return state + self.scale * ((state - self.mean) / self.spread @ self.weight + self.bias)


def _train(
    lens: _Lens, state: Tensor, goal: Tensor, log_p: Tensor, steps: int, penalty: float
) -> tuple[_Affine, float, float]:
    """The trained map of states (place, d), its mean KL on them, and that of the identity."""
    mean = state.mean(0)
    spread, scale = ((x - x.mean(0)).square().mean().sqrt().clamp(min=1e-12) for x in (state, goal))

    # two starts: the identity, and the ridge regression of what the last layer adds on standardised states
    d, n = state.shape[1], len(state)
    identity = _Affine(mean, spread, scale, state.new_zeros(d, d), state.new_zeros(d))
    x, residual = ((state - mean) / spread).double(), ((goal - state) / scale).double()
    shift = residual.mean(0)
    gram = x.T @ x + max(penalty, 1e-6) * n * torch.eye(d, dtype=x.dtype, device=x.device)
    solved = torch.linalg.solve(gram, x.T @ (residual - shift)).contiguous()
    ridge = _Affine(mean, spread, scale, solved.to(state), shift.to(state))

    def objective(tried: _Affine) -> float:
        return lens.kl(state, log_p, tried) / n + penalty * float(tried.weight.square().sum())

    # from the lower of the two, by full-batch L-BFGS; what is not lower than where it started is thrown away
    raw, other = objective(identity), objective(ridge)
    lowest, best = (other, ridge) if other < raw else (raw, identity)
    weight, bias = (t.clone().requires_grad_() for t in (best.weight, best.bias))
    moving = replace(best, weight=weight, bias=bias)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=steps,
        history_size=10,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        slopes = [torch.zeros_like(weight), torch.zeros_like(bias)]
        value = lens.kl(state, log_p, moving, slopes) / n + penalty * float(weight.detach().square().sum())
        weight.grad, bias.grad = slopes[0] / n + 2 * penalty * weight.detach(), slopes[1] / n
        return value

    optimizer.step(closure)
    moved = replace(best, weight=weight.detach(), bias=bias.detach())
    best = moved if objective(moved) < lowest else best
    return best, lens.kl(state, log_p, best) / n, raw


def _compare(log_p: Tensor, scores: Tensor, raw: Tensor, target: Tensor) -> dict[str, np.ndarray]:
    """By place (sequence, pos)."""
    log_q = _log_softmax(scores)
    compared = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "kl_raw": (log_p.exp() * (log_p - _log_softmax(raw))).sum(-1),
        "loss": -log_q.gather(-1, target.reshape(-1, 1))[:, 0],
        "agreement": log_q.argmax(-1) == log_p.argmax(-1),
    }
    return {name: values.reshape(target.shape).double().cpu().numpy() for name, values in compared.items()}


def _floats(state: Tensor) -> Tensor:
    return state if state.dtype == torch.float64 else state.float()


def _log_softmax(scores: Tensor) -> Tensor:
    return F.log_softmax(_floats(scores), -1)


LABELS = {
    "kl": ("divergence of the tuned lens from the model", "nats", 0.1),
    "kl_raw": ("divergence of the logit lens from the model", "nats", None),
    "loss": ("loss of the tuned lens on the next token", "nats per token", 0.1),
    "agreement": ("share of places where tuned lens and model prefer one token", "share", 0.02),
    "prediction_depth": ("layers until the tuned lens keeps the model's token", "layers", 0.1),
    "kl_constant": ("divergence of the model's mean prediction from the model", "nats", None),
}


def _dataset(read: list[dict[str, np.ndarray]], null: np.ndarray) -> xr.Dataset:
    values = {name: np.stack([each[name] for each in read], -1) for name in ("kl", "kl_raw", "loss", "agreement")}
    late = np.arange(1, len(read))
    values["prediction_depth"] = (late * (1 - values["agreement"][..., :-1])).max(-1, initial=0.0)
    values["kl_constant"] = null
    rows, count = Rows(headline=["kl", "agreement", "prediction_depth"]), np.full(len(null), null.shape[1])
    for name, (label, units, change) in LABELS.items():
        mean, se = clustered_mean(values[name].sum(1), count)
        groups, dims = clustered_groups(values[name].sum(1), count), "depth" if mean.ndim else ()
        rows.put(name, dims, mean, se, label, units=units, smallest_change=change, replicates=groups)
    for name, lens in (("train", "tuned"), ("train_raw", "logit")):
        divergence = np.array([float(each[name]) for each in read])
        rows.put(
            f"kl_{name}", "depth", divergence, None, f"divergence of the {lens} lens on its training half", units="nats"
        )
    return rows.dataset(depth=np.arange(len(read)))
