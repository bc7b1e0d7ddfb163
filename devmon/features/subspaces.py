"""Subspaces of a site that are exchanged between two runs of a model, and the search for one by what the runs say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.forward import forward, original, scores_in
from devmon.anatomy.layout import Layout
from devmon.data.probe import minibatches
from devmon.errors import InstrumentError
from devmon.snapshot import Snapshot

RANK = 1e-5  # of the largest singular value, or of a unit vector: below is rounding of float32, and not seen


@dataclass(frozen=True)
class Search:
    """Adam's `steps` at `rate` on batches of `batch` pairs."""

    steps: int
    batch: int
    rate: float


@dataclass
class Exchange:
    """A site of a model: its states, and the model's outputs for `inputs` (pair, …) where these are exchanged.

    `named` is the path of a module, whose output (or the first of its outputs) is the state, or a site of `Anatomy`,
    such as ("resid_post", 1). Of states (batch, pos, d), and of heads (batch, pos, head, d_head), it is that at
    `place`. Raises InstrumentError for what the model lacks, or a module that does not run once in a pass.
    """

    snapshot: Snapshot
    inputs: Tensor
    named: str | tuple[str, int]
    place: int = -1
    layout: Layout | None = None
    batch_size: int = 1024
    who: str = "Exchange"

    def __post_init__(self) -> None:
        self.model = original(self.snapshot.model)
        self.anatomy = None if isinstance(self.named, str) else Anatomy.of(self.snapshot, self.layout, self.who)
        paths = [path for path, _ in self.model.named_modules() if path]
        if isinstance(self.named, str) and self.named not in paths:
            raise InstrumentError(
                f"{self.who}: {type(self.model).__name__} has no module {self.named!r}: name one of {', '.join(paths)}"
            )

    def states(self, inputs: Tensor) -> Tensor:
        """(pair, d) in float32, or the model's float64."""
        held: list[Tensor] = []

        def look(value: Tensor) -> Tensor:
            held.append(_wide(self._at_place(value).detach()))
            return value

        for part in minibatches(len(inputs), self.batch_size):
            with self._written(look):
                forward(self.model, inputs[part], self.who, layout=self.layout)
        return torch.cat(held)

    def outputs(self, rows: Tensor, source: Tensor | None, subspace: Tensor | None = None) -> Tensor:
        """Logits (pair, class) in float32 at least, on the CPU, of these pairs' bases: as they are without `source`
        (all pairs, d), else with the subspace (d, k), or the whole state, of the source."""
        parts = []
        for part in minibatches(len(rows), self.batch_size):
            wanted = None if source is None else source[rows[part]]
            parts.append(self._run(rows[part], wanted, subspace).detach().cpu())
        return torch.cat(parts)

    def fit(
        self, search: Search, source: Tensor, start: Tensor, goal: Tensor, rows: Tensor, draw: torch.Generator
    ) -> Tensor:
        """The orthonormal (d, k) that Adam finds from `start` so that the outputs are the `goal` (all pairs,), on pairs
        drawn from `rows`; `source` are the states of all pairs' sources. The model is left as it is."""
        free = start.to(source).clone().requires_grad_()
        optimizer = torch.optim.Adam([free], lr=search.rate)
        for _ in range(search.steps):
            at = rows[torch.randint(len(rows), (search.batch,), generator=draw)]
            with torch.enable_grad():
                scores = self._run(at, source[at], orthonormal(free), grad=True)
                loss = nn.functional.cross_entropy(scores, goal[at].to(scores.device))
                [free.grad] = torch.autograd.grad(loss, [free])
            optimizer.step()
        return orthonormal(free.detach())

    def _run(self, rows: Tensor, source: Tensor | None, subspace: Tensor | None, *, grad: bool = False) -> Tensor:
        def exchange(value: Tensor) -> Tensor:
            if source is None:
                return value
            state = _wide(self._at_place(value))
            apart = source - state
            if subspace is not None:
                basis = subspace.to(state)
                apart = apart @ basis @ basis.T
            return self._with_place(value, (state + apart).to(value.dtype))

        with self._written(exchange):
            output = forward(self.model, self.inputs[rows], self.who, grad=grad, layout=self.layout)
        scores = scores_in(output)
        if (
            not isinstance(scores, Tensor)
            or scores.ndim not in (2, 3)
            or (self.anatomy and not self.anatomy.has_logits)
        ):
            raise InstrumentError(
                f"{self.who} needs logits (batch, class) or (batch, pos, vocab), {type(self.model).__name__} gives "
                f"{tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__}: wrap it"
            )
        return _wide(scores if scores.ndim == 2 else scores[:, -1])

    @contextmanager
    def _written(self, write: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Forward passes inside have at the site what `write` makes of it."""
        if self.anatomy is not None:
            with self.anatomy.tapped(write={self.named: write}):
                yield
            return
        calls = 0

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            many = isinstance(output, tuple)
            new = write(output[0] if many else output)
            return (new, *output[1:]) if many else new

        handle = self.model.get_submodule(str(self.named)).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
        if calls != 1:
            raise InstrumentError(f"{self.who}: {self.named!r} ran {calls} times in a pass: name a site that runs once")

    def _at_place(self, value: Tensor) -> Tensor:
        """(batch, d) of a state (batch, d), (batch, pos, d) or (batch, pos, head, d_head)."""
        if value.ndim == 2:
            return value
        if value.ndim not in (3, 4) or (value.ndim == 4 and self.anatomy is None):
            raise InstrumentError(
                f"{self.who}: {self.named!r} gives {tuple(value.shape)}: name a site of states (batch, d) or "
                "(batch, pos, d)"
            )
        return value[:, self.place].flatten(1)

    def _with_place(self, value: Tensor, state: Tensor) -> Tensor:
        if value.ndim == 2:
            return state
        new = value.clone()
        new[:, self.place] = state.reshape(new[:, self.place].shape)
        return new


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def orthonormal(free: Tensor) -> Tensor:
    return torch.linalg.qr(free).Q


def row_space(model: nn.Module, path: str, width: int, who: str) -> Tensor:
    """An orthonormal basis (rank, d) of the row space of the linear map at a path, in float64."""
    module = dict(original(model).named_modules()).get(path)
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or weight is None or weight.shape[1] != width:
        raise InstrumentError(
            f"{who}: the reader {path!r} of {type(original(model)).__name__} is "
            f"{'nothing' if module is None else type(module).__name__}, not an nn.Linear of {width} inputs: name the "
            "map that reads the site, or ''"
        )
    _, size, axes = torch.linalg.svd(weight.detach().double().cpu(), full_matrices=False)
    return axes[size > RANK * size[0]]


def split(subspace: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the projections of a subspace (d, k) on the span of `seen` (rank, d), and on the rest.

    Made orthonormal, as the plain projection would write the very same where it is read.
    """
    whole = subspace.double().cpu()
    inside = seen.T @ (seen @ whole)
    parts = []
    for part in (inside, whole - inside):
        axes, size, _ = torch.linalg.svd(part, full_matrices=False)
        parts.append(axes[:, size > RANK].to(subspace))
    return parts[0], parts[1]
