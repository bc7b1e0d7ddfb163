"""Reading and writing the inside of a transformer, site by site, whatever family it is of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from devmon.anatomy.attention import Patterns
from devmon.anatomy.find import candidates
from devmon.anatomy.fit import mlp_site, rebuilt_logits, rebuilt_stream, try_layout
from devmon.anatomy.forward import check_causal, forward, last_place, logits, original, scores_in
from devmon.anatomy.layout import Layout
from devmon.anatomy.parts import Parts
from devmon.anatomy.proposing.propose import corrected
from devmon.anatomy.sites import ENDS, SITES, Reads, Site, Write
from devmon.anatomy.taps import Taps
from devmon.anatomy.variants.outputs import declared
from devmon.errors import InstrumentError
from devmon.snapshot import Snapshot


class Anatomy(Parts):
    """Where things are in one model, and their reading and writing.

    The sites of each layer, as tensors (batch, pos, …) in the order of a forward pass:

    - `resid_pre`, `resid_mid`, `resid_post` (…, d): the residual stream before the layer, between attention and MLP
      (layers whose parts are in sequence) and after the layer; `resid_pre` of layer 0 is the embedding
    - `q`, `k`, `v` (…, head, d_head): queries, keys, values as the linear maps give them, before rotation and query or
      key norms; with grouped attention `k` and `v` have `kv_heads`
    - `pattern` (batch, head, q, k): attention after softmax
    - `z` (…, head, d_head): what the heads read, before `W_O`
    - `attn_out`, `mlp_out` (…, d): what is added to the stream
    - `neurons` (…, neuron): the MLP's activations, before the last linear map

    and once a model `normed` (…, d), what the unembedding reads, and `unembedded` (…, vocab), what it writes (logits
    before any cap). A site is named "z" for all layers or ("z", 3) for one.

    Raises InstrumentError, with the declaration to write, where the parts of the model are not found.

    `layout` tells where they are; without it a class attribute `anatomy` of a module does, or the family of
    transformers that it belongs to, or any known layout whose paths all exist. None of them is trusted: each is tried
    on the first of `inputs`, or on tokens or images made up (`devmon.anatomy.fit`), and the first that gives what the
    model computes is taken. Raises InstrumentError, with the line to change, where none does. Where no input is known
    that the model runs on, it is tried at the first `run`; `tried` says whether it was.
    """

    def __init__(
        self, model: nn.Module, layout: Layout | None = None, who: str = "Anatomy", inputs: Any = None
    ) -> None:
        refused: InstrumentError | None = None
        fitting = candidates(original(model), layout, who)
        towers = {body for _, body, _ in fitting}
        for found in fitting:
            try:
                super().__init__(model, layout, who, found)
                self.tried = try_layout(self, inputs, alone=len(towers) == 1)
            except InstrumentError as error:
                refused = refused or _with_remedy(error, original(model), layout, inputs)
            else:
                if self.tried or len(towers) == 1:
                    return
        if refused is None:
            paths = ", ".join(path for path, module in self.model.named_modules() if module in towers)
            refused = InstrumentError(
                f"{who}: {type(self.model).__name__} holds several transformers ({paths}), and no input is known that "
                "shows which of them runs: hand over one (Monitor(model=...) takes such a path)"
            )
        raise refused

    @classmethod
    def of(cls, snapshot: Snapshot, layout: Layout | None, who: str, model: nn.Module | None = None) -> Anatomy:
        """The anatomy of the snapshot's model, or of a copy of it; what was found to fit is tried once a step."""
        model = original(snapshot.model if model is None else model)
        key = ("anatomy", layout)
        # All copies of a step have the same weights: the layout that fits one fits them all.
        if key in snapshot.memo:
            fitting, path, guessed, tried = snapshot.memo[key]
            anatomy = cls.__new__(cls)
            Parts.__init__(anatomy, model, layout, who, (fitting, model.get_submodule(path), guessed))
            anatomy.tried = tried
            return anatomy
        anatomy = cls(model, layout, who)
        path = next(path for path, module in model.named_modules() if module is anatomy.body)
        snapshot.memo[key] = anatomy.layout, path, anatomy.guessed, anatomy.tried
        return anatomy

    @property
    def trust(self) -> dict[str, str]:
        """For the attributes of what was read off weights alone: that the layout was not tried, where it was not."""
        untried = "not tried: no input is known that the model runs on (no `embed`, no image size in a config)"
        return {} if self.tried else {"layout": untried}

    def need_causal(self, tokens: Tensor) -> None:
        """Raises InstrumentError for a model that sees the tokens (batch, pos) which it should predict."""
        with suppress(IndexError, TypeError, ValueError):  # what it cannot take is told by the pass that measures
            check_causal(self.model, tokens, self.who, watched=False)

    # -- activations -------------------------------------------------------------------------------------------------

    @contextmanager
    def tapped(
        self, read: Iterable[Site] = (), write: Mapping[Any, Write] | None = None, *, grad: bool = False
    ) -> Iterator[Reads]:
        """Reads and writes sites in every forward pass inside, and leaves no hook behind.

        `write` maps sites to a tensor, or to a function of the value that is there; what is read is what has been
        written. With `grad` what is read is part of the graph, else a detached copy. Raises InstrumentError where a
        site does not exist, or was not reached by a forward pass that ended well: hooks that do not fire (a compiled
        module, a part the model skips) would otherwise go unseen.
        """
        with self.hooked(read, write, grad=grad) as taps, ExitStack() as stack:
            if any(name == "pattern" for name, _ in taps.wanted | set(taps.writes)):
                stack.enter_context(Patterns.of(self.model, taps.pattern))
            yield taps.reads

    @contextmanager
    def hooked(
        self, read: Iterable[Site] = (), write: Mapping[Any, Write] | None = None, *, grad: bool = False
    ) -> Iterator[Taps]:
        """As `tapped`, where who calls shows the attention patterns to `Taps.pattern`."""
        writes = {at: value for site, value in (write or {}).items() for at in self.expand(site)}
        wanted = {at for site in read for at in self.expand(site)}
        taps = Taps(self, wanted, writes, grad)
        with ExitStack() as stack:
            for handle in taps.attach():
                stack.callback(handle.remove)
            yield taps
        taps.refuse_missing()

    def run(
        self,
        inputs: Any,
        read: Iterable[Site] = (),
        write: Mapping[Any, Write] | None = None,
        *,
        grad: bool = False,
        last: bool = False,
    ) -> tuple[Tensor, Reads]:
        """One forward pass: the logits (batch, pos, vocab), or the last hidden state of a model without them, and
        what was read. With `last` the logits may be those of the last place alone, (batch, 1, vocab)."""
        if not self.tried:
            self.tried = try_layout(self, inputs)
        if last and self.has_logits and isinstance(inputs, Tensor) and inputs.ndim == 2:
            # What comes after the unembedding may want all places: then it has them.
            with suppress(Exception), last_place(self.unembedding, tuple(inputs.shape)):
                return self._run(inputs, read, write, grad, narrow=True)
        return self._run(inputs, read, write, grad)

    def _run(
        self, inputs: Any, read: Iterable[Site], write: Mapping[Any, Write] | None, grad: bool, narrow: bool = False
    ) -> tuple[Tensor, Reads]:
        with self.tapped(read, write, grad=grad) as reads:
            output = forward(self.model, inputs, self.who, grad=grad, layout=self.layout)
        if self.has_logits:
            scores = scores_in(output)
            narrow = narrow and isinstance(scores, Tensor) and scores.ndim == 3 and scores.shape[1] == 1
            return logits(self.model, inputs[:, -1:] if narrow else inputs, self.who, output=output), reads
        return next(iter(output.values())) if isinstance(output, Mapping) else output, reads

    def read_up_to(self, inputs: Any, sites: Iterable[Site]) -> Reads:
        """What `run` reads at sites of layers, without what comes after the last of them: the pass ends at the next
        layer's first module, or at the unembedding."""
        wanted = [at for site in sites for at in self.expand(site)]
        if not self.tried:
            self.tried = try_layout(self, inputs)
        # The first module that is entered when all was read: of this layer itself where only its input is read.
        last = max(layer for _, layer in wanted)
        later = last if {name for name, layer in wanted if layer == last} == {"resid_pre"} else last + 1
        if any(name in ENDS for name, _ in wanted):
            end = None
        elif later < self.layers:
            end = self.ends(later)[0]
        else:
            end = self.unembedding if self.has_logits else None
        with self.tapped(wanted) as reads, suppress(_Enough), ExitStack() as stack:
            if end is not None:
                stack.callback(end.register_forward_pre_hook(_stop).remove)
            forward(self.model, inputs, self.who, layout=self.layout)
        return reads

    def rebuild(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """The logits, or the final stream of a model without direct ones, and the same put together from the parts:
        embedding, heads times `W_O`, neurons times `W_out`, norms, unembedding. If the layout is right the two are
        equal up to rounding."""
        # The parts are taken from one pass, layer by layer, so that an error in one layer shows as that and not as its
        # consequences further up.
        last = ("resid_post", self.layers - 1)
        output, reads = self.run(inputs, [("resid_pre", 0), last, "z", *mlp_site(self)])
        stream = reads["resid_pre", 0]
        with torch.no_grad():
            for layer in range(self.layers):
                stream = rebuilt_stream(self, reads, layer, stream)

            # Where more layers stand between the stream and the logits (BERT), the stream itself is compared.
            if not (self.has_logits and self.layout.direct):
                return reads[last], stream
            return output, rebuilt_logits(self, stream)

    def expand(self, site: Site) -> list[tuple[str, int]]:
        """The site layer by layer: "z" is [("z", 0), ("z", 1), …]. Raises InstrumentError where it does not exist."""
        name, layers = (site, range(self.layers)) if isinstance(site, str) else (site[0], [site[1]])
        if name in ENDS:
            return [(name, 0)]
        if name not in SITES:
            raise InstrumentError(f"{self.who}: {name!r} is no site; those are {', '.join((*SITES, *ENDS))}")
        if any(not -self.layers <= layer < self.layers for layer in layers):
            raise InstrumentError(f"{self.who}: the model has layers 0 to {self.layers - 1}, got {site!r}")
        if name == "neurons" and self.has_mlp and not self.layout.neurons:
            raise InstrumentError(
                f"{self.who}: the MLP of {type(self.model).__name__} is one of experts, whose neurons are not those of "
                "one map: read 'mlp_out'"
            )
        if name in ("neurons", "mlp_out") and not self.has_mlp:
            raise InstrumentError(f"{self.who}: {type(self.model).__name__} has no MLP that its layout declares")
        if name == "resid_mid" and (self.parallel or self.layout.post_norm or not self.has_mlp):
            raise InstrumentError(
                f"{self.who}: {type(self.model).__name__} has no stream between attention and MLP that both add to; "
                "read 'resid_pre' and 'attn_out'"
            )
        return [(name, layer % self.layers) for layer in layers]


class _Enough(Exception):
    """All that is asked for was read."""


def _stop(*_: Any) -> None:
    raise _Enough


def _with_remedy(error: InstrumentError, model: nn.Module, layout: Layout | None, inputs: Any) -> InstrumentError:
    """The refusal of a declared layout, with the layout that fits where one is found."""
    own = declared(model) if layout is None else layout
    better = "" if own is None else corrected(model, own, inputs)
    return InstrumentError(f"{error}; {better}") if better else error
