"""The Hessian of the loss at the weights: trace and extreme eigenvalues, to stand beside the LLC."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, aslinearoperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

from devmon.cost import GPT2_SMALL, SWEEP, Cost, Shape
from devmon.data.rows import Rows
from devmon.errors import InstrumentError
from devmon.sampling.data import Examples, as_examples, map_tree
from devmon.sampling.flat import Flat, score_at_center
from devmon.sampling.losses import Loss, next_token_loss
from devmon.sampling.masks import as_mask
from devmon.snapshot import Snapshot, derive_seed

Array = NDArray[np.float64]

MAX_DENSE = 64  # parameters up to which the whole Hessian costs no more products than Lanczos would need
RESTARTS = 30  # of Lanczos, about 15 products each with the default `top`: with fewer, close eigenvalues become NaN
LANCZOS = 20  # vectors that ARPACK keeps: its work beside the products grows with them
POWER_STEPS = 6  # products, to know the norm of the Hessian within a small factor
MAX_SKEW = 0.05  # of that norm, between uᵀHv and vᵀHu: float32 rounding is far below it
SEEDED = "rng" in inspect.signature(eigsh).parameters  # since SciPy 1.17; before, ARPACK kept a stream of its own


@dataclass(frozen=True)
class Curvature:
    """Trace and extreme eigenvalues of the Hessian H of L at the snapshot's weights w*.

    L is the mean of `loss(model, batch) -> (batch,)` over the first `limit` examples of `data` (None: all), H its
    second derivatives in the parameters that an LLC with the same `mask` samples, met through products Hv alone.

    H gives the prefactor of the volume of {L < L(w*) + ε}, not its exponent, which is why it stands beside the LLC: at
    a regular minimum the volume is ε^(d/2) / √det H up to a constant, and λ = d/2 whatever the eigenvalues. At any
    minimum λ >= rank(H)/2, with equality where the minima form a surface that H is regular across; the flat
    directions add what only higher derivatives know, and no threshold on eigenvalues tells a flat one from a small one.

    - `eigenvalue` (rank), loss per squared weight: the `top` algebraically largest, rank 1 the largest; by Lanczos
      (ARPACK; Ghorbani et al. 2019, 1901.10159) until the residual is about `tolerance` times the norm of H; NaN where
      Lanczos does not get there: raise it.
    - `eigenvalue_error` (rank), loss per squared weight: the residual ‖Hv − λv‖, v of length 1: some eigenvalue lies
      within it (no standard error, and no proof that none was passed over).
    - `least`, loss per squared weight: the smallest; w* is no minimum where it is clearly negative.
    - `least_error`, loss per squared weight: its residual.
    - `trace`, loss per squared weight: exact on the span of those `top` eigenvectors, by Hutchinson's (1990) mean of
      zᵀHz with random signs z on the rest: Hutch++ (Meyer et al. 2021, 2010.09649) with these vectors in place of a
      sketch.
    - `trace_se`, loss per squared weight: its standard error over the `probes`, which are the same at every checkpoint:
      *changes* are sharper than the level.
    - `effective_rank`, 1: trace / largest eigenvalue, the number of directions as curved as the steepest that make up
      the trace (1 to rank(H) at a minimum; a summary of the spectrum, no estimate of the rank); NaN where that is not
      > 0.
    - `effective_rank_se`, 1: trace_se / largest eigenvalue.

    Up to 64 parameters H is assembled and all is exact. Beyond, a snapshot takes 100 to 200 products, half of that with
    tolerance=1e-2, each some four gradients of L in cost, about 30 vectors in float64 on the CPU, and the graph of one
    minibatch for two backward passes. Attention is decomposed, because fused attention has no second derivative.
    Raises InstrumentError for settings that cannot be run, a loss or second derivatives that are not finite, operations
    without a second derivative, and products that are not symmetric, which is how custom kernels show that are silent
    about it.

    >>> import torch
    >>> from devmon.sampling import regression_loss
    >>> from devmon.snapshot import Snapshot
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> result = Curvature((x, model(x).detach()), loss=regression_loss, top=2)(Snapshot(0, model))
    >>> result["eigenvalue"].values, result["trace"].item()  # H = XᵀX / n
    (array([2. , 0.5]), 2.5)
    """

    data: Any
    loss: Loss = next_token_loss
    top: int = 5
    probes: int = 32
    limit: int | None = None
    batch_size: int = 32
    tolerance: float = 1e-4
    mask: Any = None
    float64: bool = False

    def __call__(self, snapshot: Snapshot) -> xr.Dataset:
        self._check()
        examples = _first(as_examples(self.data), self.limit)
        mask = as_mask(self.mask, snapshot.model)
        dtype = torch.float64 if self.float64 else torch.float32
        flat = Flat(snapshot.model, self.loss, dtype, None if mask is None else mask.names)
        where = None if mask is None else mask.vector(flat.names, flat.shapes, flat.center)
        examples = examples.to(flat.center.device, dtype)
        score_at_center(flat, examples, torch.arange(examples.n, device=flat.center.device), self.batch_size)
        hessian = _hessian(flat, examples, self.batch_size, slice(None) if where is None else where.bool())
        size = hessian.shape[0]
        if self.top > size:
            raise InstrumentError(f"top must be from 1 to the {size} parameters, got {self.top}")
        result = Rows(["trace", "eigenvalue", "least"], "standard error over probes", kind="curvature", n=examples.n)
        result.attrs |= {"parameters": size, "mask": "" if mask is None else str(mask)}

        # a small Hessian is assembled, so that all is exact; of a large one Lanczos finds both ends of the spectrum,
        # and random probes the trace of what the largest eigenvectors leave over
        if size <= max(MAX_DENSE, self.top + 1):
            dense = hessian @ np.eye(size)
            hessian, vectors = aslinearoperator(dense), np.linalg.eigh((dense + dense.T) / 2)[1][:, ::-1]
            _scale(hessian, snapshot)
            top, error = _values(hessian, vectors[:, : self.top], self.top)
            least, least_error = _values(hessian, vectors[:, -1:], 1)
            trace, trace_se = float(dense.trace()), 0.0
        else:
            scale = _scale(hessian, snapshot)
            vectors = _extreme(hessian, self.top, 2 * scale, self.tolerance, snapshot)
            top, error = _values(hessian, vectors, self.top)
            least, least_error = _values(hessian, _extreme(hessian, 1, -2 * scale, self.tolerance, snapshot), 1)
            trace, trace_se = _trace(hessian, vectors, float(np.nansum(top)), self.probes, snapshot)

        # a residual bounds the distance to an eigenvalue, which no standard error does: it has a name of its own
        largest = top[0] if top[0] > 0 else np.nan
        units, bound = "loss per squared weight", "residual: an eigenvalue lies within it of"
        result.put("eigenvalue", "rank", top, None, "largest eigenvalues of the Hessian", units=units)
        result.put("eigenvalue_error", "rank", error, None, f"{bound} eigenvalue", units=units)
        result.put("least", (), least[0], None, "smallest eigenvalue of the Hessian", units=units)
        result.put("least_error", (), least_error[0], None, f"{bound} least", units=units)
        result.put("trace", (), trace, trace_se, "trace of the Hessian", units=units)
        rank, rank_se = trace / largest, trace_se / largest
        label = "trace of the Hessian / its largest eigenvalue"
        result.put("effective_rank", (), rank, rank_se, label, units="1", error="that of the trace")
        return result.dataset(rank=np.arange(1, self.top + 1))

    def cost(self, shape: Shape = GPT2_SMALL) -> Cost:
        """Of Hessian products, each two backward passes through one forward pass: two searches of 20 and the norm, as
        many again for a tolerance of 1e-4, and one for each of `top` and of the probes. A search keeps its vectors
        apart from 20 others, twice, in float64."""
        examples = _first(as_examples(self.data), self.limit)
        searched = round(48 + 24 * max(0.0, math.log10(1e-2 / self.tolerance)))
        products = (searched + self.top + self.probes) * examples.n
        size = shape.weights + shape.readout * (1 if shape.tied else 2)
        apart = searched * 2 * LANCZOS * size * SWEEP
        return Cost(products, 2 * products, positions=examples.positions(), operations=apart)

    def _check(self) -> None:
        for name, least in (("top", 1), ("probes", 2), ("limit", 1), ("batch_size", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise InstrumentError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.tolerance < 1:
            raise InstrumentError(
                f"tolerance, relative to the norm of the Hessian, must be in (0, 1): {self.tolerance}"
            )


def _first(examples: Examples, limit: int | None) -> Examples:
    if limit is None or limit >= examples.n:
        return examples
    return Examples(map_tree(lambda t: t[:limit], examples.tree), limit)


def _hessian(flat: Flat, examples: Examples, batch_size: int, free: torch.Tensor | slice) -> LinearOperator:
    """Products with the second derivatives of the mean loss in the `free` entries of the flat parameters, in float64
    on the CPU outside and in the model's precision and place inside."""
    parts = torch.arange(examples.n, device=flat.center.device).split(batch_size)

    def product(vector: Array) -> Array:
        direction = torch.zeros_like(flat.center)
        direction[free] = torch.tensor(vector.reshape(-1), dtype=direction.dtype, device=direction.device)
        total = torch.zeros_like(flat.center, dtype=torch.float64)
        for part in parts:
            total.add_(_second_derivative(flat, examples.batch(part), direction), alpha=len(part) / examples.n)
        if not torch.isfinite(total).all():
            raise InstrumentError(
                "the second derivatives of the loss at w* are not finite: look for a norm, root or logarithm at 0 in "
                "the model or the loss, or set float64=True"
            )
        return total[free].cpu().numpy()

    size = flat.center[free].numel()
    return LinearOperator((size, size), matvec=product, dtype=np.float64)


def _second_derivative(flat: Flat, batch: Any, direction: torch.Tensor) -> torch.Tensor:
    """∇(∇L_B · direction), (parameter,), for the mean loss of the batch."""
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            loss = flat.loss(flat.model, batch).mean()
            if not loss.requires_grad:
                raise InstrumentError("the loss does not depend on the parameters through autograd: look for no_grad")
            slopes = torch.autograd.grad(loss, flat.parameters, create_graph=True, allow_unused=True)
            pairs = zip(slopes, flat.parts(direction), strict=True)
            along = [(slope * d).sum() for slope, d in pairs if slope is not None and slope.requires_grad]
            if not along:  # the loss is linear in all parameters
                return torch.zeros_like(direction)
            second = torch.autograd.grad(torch.stack(along).sum(), flat.parameters, allow_unused=True)
    except RuntimeError as error:
        if not any(word in str(error) for word in ("derivative for", "differentiate twice")):
            raise
        raise InstrumentError(
            f"Curvature needs second derivatives, and an operation of {type(flat.model).__name__} has none: {error}; "
            f"switch to a plain implementation of it (for attention 'eager' or 'sdpa')"
        ) from error
    zipped = zip(second, flat.parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if f is None else f).reshape(-1) for f, p in zipped])


def _scale(hessian: LinearOperator, snapshot: Snapshot) -> float:
    """The norm of the Hessian, from below and within a small factor, by power iteration; 1 for a Hessian of zero.

    Raises InstrumentError where the products are not symmetric: a custom kernel whose backward pass autograd cannot see
    into counts as a constant there, without a word.
    """
    image, other = (_normal(snapshot, hessian.shape[0], "curvature", what) for what in ("power", "other"))
    for _ in range(POWER_STEPS):
        vector = image / np.linalg.norm(image)
        image = hessian @ vector
        if (size := float(np.linalg.norm(image))) == 0:
            return 1.0
    skew = abs(other @ image - vector @ (hessian @ other)) / size
    if skew > MAX_SKEW:
        raise InstrumentError(
            f"the second derivatives are not symmetric (by {skew:.0%} of their norm): an operation, such as a fused or "
            f"custom kernel, has none of its own, or the curvature drowns in rounding; switch to a plain "
            f"implementation, or set float64=True"
        )
    return size


def _extreme(hessian: LinearOperator, count: int, shift: float, tolerance: float, snapshot: Snapshot) -> Array:
    """Orthonormal eigenvectors (parameter, count) of the largest (shift > 0) or smallest (shift < 0) eigenvalues, in
    any order; none, (parameter, 0), where they cannot be had to the tolerance.

    ARPACK stops at a residual relative to each eigenvalue, which one close to 0 never meets: those of H + shift are
    away from 0, and the eigenvectors are the same.
    """
    size = hessian.shape[0]
    shifted = LinearOperator(hessian.shape, matvec=lambda v: hessian @ v + shift * v, dtype=np.float64)
    generator = np.random.default_rng(derive_seed(snapshot.seed, "curvature", "restart"))
    seeded: dict[str, Any] = {"rng": generator} if SEEDED else {}
    try:
        _, vectors = eigsh(
            shifted,
            k=count,
            which="LA" if shift > 0 else "SA",
            v0=_normal(snapshot, size, "curvature", "start"),
            tol=tolerance / 2,
            maxiter=RESTARTS,
            **seeded,
        )
    except ArpackNoConvergence:
        return np.empty((size, 0))
    return vectors


def _values(hessian: LinearOperator, vectors: Array, count: int) -> tuple[Array, Array]:
    """vᵀHv from the largest down and ‖Hv − (vᵀHv) v‖ for `count` vectors; NaN if there are none."""
    if not vectors.shape[1]:
        return np.full(count, np.nan), np.full(count, np.nan)
    images = hessian @ vectors
    values = (vectors * images).sum(0)
    order = np.argsort(-values)
    return values[order], np.linalg.norm(images - values * vectors, axis=0)[order]


def _trace(
    hessian: LinearOperator, vectors: Array, known: float, probes: int, snapshot: Snapshot
) -> tuple[float, float]:
    """The trace and its standard error: `known` on the span of orthonormal vectors, random signs on the rest."""
    rest = []
    for probe in range(probes):
        signs = torch.randint(2, (hessian.shape[0],), generator=snapshot.generator("curvature", "probe", probe))
        z = 2.0 * signs.numpy() - 1.0
        z -= vectors @ (vectors.T @ z)
        rest.append(z @ (hessian @ z))
    return known + float(np.mean(rest)), float(np.std(rest, ddof=1) / np.sqrt(probes))


def _normal(snapshot: Snapshot, size: int, *what: str) -> Array:
    return torch.randn(size, generator=snapshot.generator(*what), dtype=torch.float64).numpy()
