"""In-context tasks: prompts that show a map of symbols by examples, and the same with the examples' labels shuffled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from devmon.data.probe import ByContent, probe_tokens
from devmon.errors import DataError


@dataclass(frozen=True, eq=False)
class TaskPrompts(ByContent):
    """Prompts (prompt, pos) of one length, the same prompts `shuffled` so that they no longer show the task, the token
    `answer` (prompt,) that is right after the last place, and the number of the `task` (prompt,).

    Raises DataError where the shapes do not fit, or for a task with fewer than four prompts.
    """

    prompts: Tensor
    shuffled: Tensor
    answer: Tensor
    task: Tensor

    def __post_init__(self) -> None:
        for name in ("prompts", "shuffled"):
            object.__setattr__(self, name, probe_tokens(getattr(self, name), "TaskPrompts", name, shortest=1))
        if self.prompts.shape != self.shuffled.shape:
            raise DataError(
                f"TaskPrompts needs prompts and shuffled of one shape, got {tuple(self.prompts.shape)} and "
                f"{tuple(self.shuffled.shape)}"
            )
        for name in ("answer", "task"):
            given = torch.as_tensor(getattr(self, name))
            if given.shape != (len(self.prompts),) or given.is_floating_point():
                raise DataError(
                    f"TaskPrompts needs {name} (prompt,) of integers, one for each of the {len(self.prompts)} prompts, "
                    f"got {tuple(given.shape)} of {given.dtype}"
                )
            object.__setattr__(self, name, given.detach().to("cpu", torch.int64, copy=True))
        if int(self.task.unique(return_counts=True)[1].min()) < 4:
            raise DataError("TaskPrompts needs at least four prompts of each task: half of them make its mean")


def symbol_tasks(
    vocab_size: int,
    tasks: int = 4,
    prompts: int = 32,
    shots: int = 5,
    symbols: int = 8,
    query: Literal["new", "shown"] = "new",
    seed: int = 0,
    bos: int | None = None,
    exclude: tuple[int, ...] = (),
    plain: bool = False,
) -> TaskPrompts:
    """Random one-to-one maps of symbols, shown by examples: x_1 → y_1 , x_2 → y_2 , … x_q →, `prompts` for each task.

    The arrow, the comma, `symbols` inputs and `symbols` outputs are drawn by `seed` from the tokens below `vocab_size`
    without `bos` and `exclude`: tasks share them and differ in the map alone. The x of a prompt are different; x_q is a
    `new` one, so that only a model that knows the maps can answer, or one of those `shown`, which looking back in the
    prompt answers. In the shuffled prompt each x has the y of another example. `plain` leaves out arrows and commas, so
    that a `shown` x is followed by its y, as an induction head says.

    >>> made = symbol_tasks(100, tasks=1, prompts=4, shots=3, symbols=4, seed=1)
    >>> made.prompts[0].tolist(), int(made.answer[0])
    ([63, 45, 79, 15, 35, 45, 72, 15, 32, 45, 17, 15, 90, 45], 96)
    >>> made.shuffled[0].tolist()
    [63, 45, 17, 15, 35, 45, 79, 15, 32, 45, 72, 15, 90, 45]
    """
    allowed = [token for token in range(vocab_size) if token != bos and token not in exclude]
    if len(allowed) < 2 + 2 * symbols or not 2 <= shots <= symbols - (query == "new") or min(tasks, prompts) < 1:
        raise DataError(
            f"symbol_tasks needs {2 + 2 * symbols} tokens for {symbols} symbols and 2 to {symbols - (query == 'new')} "
            f"shots, got {len(allowed)} tokens and {shots} shots"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.tensor(allowed)[torch.randperm(len(allowed), generator=generator)[: 2 + 2 * symbols]]
    arrow, comma = ([], []) if plain else ([int(drawn[0])], [int(drawn[1])])
    inputs, outputs = drawn[2:].split(symbols)
    right: list[list[int]] = []
    wrong: list[list[int]] = []
    answers: list[int] = []
    start = [] if bos is None else [bos]
    for _ in range(tasks):
        made = outputs[torch.randperm(symbols, generator=generator)]
        for _ in range(prompts):
            order = torch.randperm(symbols, generator=generator)
            shown, y = inputs[order[:shots]], made[order[:shots]]
            asked = order[shots] if query == "new" else order[torch.randint(shots, (1,), generator=generator)[0]]
            other = y.roll(int(torch.randint(1, shots, (1,), generator=generator)))
            for labels, rows in ((y, right), (other, wrong)):
                pairs = [[int(a), *arrow, int(b), *comma] for a, b in zip(shown, labels, strict=True)]
                rows.append([*start, *(token for pair in pairs for token in pair), int(inputs[asked]), *arrow])
            answers.append(int(made[asked]))
    task = torch.arange(tasks).repeat_interleave(prompts)
    return TaskPrompts(torch.tensor(right), torch.tensor(wrong), torch.tensor(answers), task)
