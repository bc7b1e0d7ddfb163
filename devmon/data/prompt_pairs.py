"""Pairs of prompts that differ in what the answer hangs on: the data of patching and of circuits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from devmon.data.probe import ByContent, probe_tokens
from devmon.errors import DataError


@dataclass(frozen=True, eq=False)
class PromptPairs(ByContent):
    """Clean and corrupt prompts (batch, pos), all of one length, and the two tokens (batch,) that are compared after
    the last place: `answer`, right after the clean prompt, and `foil`, as good a guess without what was corrupted.

    Raises DataError where the shapes do not fit, for fewer than two prompts, or where answer and foil are the same.
    """

    clean: Tensor
    corrupt: Tensor
    answer: Tensor
    foil: Tensor

    def __post_init__(self) -> None:
        for name in ("clean", "corrupt"):
            object.__setattr__(self, name, probe_tokens(getattr(self, name), "PromptPairs", name, shortest=1))
        for name in ("answer", "foil"):
            given = torch.as_tensor(getattr(self, name))
            if given.shape != (len(self.clean),) or given.is_floating_point():
                raise DataError(
                    f"PromptPairs needs {name} (batch,) of integers, one for each of the {len(self.clean)} prompts, "
                    f"got {tuple(given.shape)} of {given.dtype}"
                )
            object.__setattr__(self, name, given.detach().to("cpu", torch.int64, copy=True))
        if self.clean.shape != self.corrupt.shape or len(self.clean) < 2:
            raise DataError(
                "PromptPairs needs at least two clean and corrupt prompts of one shape (batch, pos), got "
                f"{tuple(self.clean.shape)} and {tuple(self.corrupt.shape)}"
            )
        if bool((self.answer == self.foil).any()):
            raise DataError("PromptPairs: answer and foil are the same token in some pairs")


def broken_repeats(
    vocab_size: int,
    prompts: int = 32,
    period: int = 8,
    seed: int = 0,
    bos: int | None = None,
    exclude: Sequence[int] = (),
) -> PromptPairs:
    """Random tokens that repeat, and the same with the repeat broken where the last token had come before.

    A clean prompt is x_0 … x_{p-1} x_0 … x_j (after `bos`, if given), p = `period` different random tokens, j = p // 2;
    its answer is x_{j+1}, as an induction head says. In the corrupt prompt x_j of the first copy is replaced by a token
    that stands nowhere else: nothing there matches the last token, and the answer is no better than the foil, which
    is drawn from the other tokens of the first copy. What looks at places alone does not tell the two prompts apart.

    >>> pairs = broken_repeats(100, prompts=2, period=4, seed=1)
    >>> pairs.clean[0].tolist(), pairs.corrupt[0].tolist(), int(pairs.answer[0]), int(pairs.foil[0])
    ([45, 15, 90, 32, 45, 15, 90], [45, 15, 35, 32, 45, 15, 90], 32, 15)
    """
    allowed = torch.tensor(sorted(set(range(vocab_size)) - {*exclude, bos}))
    if period < 4 or len(allowed) < period + 1:
        raise DataError(
            f"broken_repeats needs a period of at least 4 and more tokens to draw from than that, got {period} and "
            f"{len(allowed)}"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(len(allowed), generator=generator)[: period + 1] for _ in range(prompts)])
    first, new, j = allowed[drawn[:, :period]], allowed[drawn[:, period]], period // 2
    broken = first.clone()
    broken[:, j] = new
    others = torch.tensor([i for i in range(period) if i not in (j, j + 1)])
    foil = first.gather(1, others[torch.randint(len(others), (prompts, 1), generator=generator)])[:, 0]
    start = torch.full((prompts, 0 if bos is None else 1), 0 if bos is None else bos)
    clean, corrupt = (torch.cat([start, copy, first[:, : j + 1]], 1) for copy in (first, broken))
    return PromptPairs(clean, corrupt, first[:, j + 1], foil)
