"""Measuring a series of checkpoints: what is still to do, and doing it, with the instruments and `observe` of training.

    plan = Plan(series="runs/mine/checkpoints", into="runs/mine/trajectory.zarr", source="script.py:study")
    Study(plan).measure(tell=print)

`devmon.offline.engines.processes` deals the checkpoints to several processes; `devmon measure` is the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from devmon import presets
from devmon.checkpoints.pretrained import causal_lm
from devmon.checkpoints.selection import select
from devmon.checkpoints.series import Checkpoint, Series
from devmon.checkpoints.weights import fitting
from devmon.errors import DataError, IdentityError, InstrumentError
from devmon.instruments import LLC
from devmon.monitoring.choices import keep
from devmon.monitoring.fingerprint import identity
from devmon.monitoring.isolation import isolated, private_copy
from devmon.monitoring.layouts import layout_of
from devmon.monitoring.observe import observe
from devmon.offline import kept
from devmon.offline.in_parts import OUT_OF_MEMORY, in_parts
from devmon.offline.plan import NO_LLC, Plan, pairs
from devmon.offline.probe_text import Home, Probe, load_tokenizer, read_probe
from devmon.offline.source import late_and_middle, load_study
from devmon.snapshot import Choosing, derive_seed
from devmon.store.place import store_path
from devmon.store.trajectory import Trajectory
from devmon.watch import Watch, unique_names


@dataclass(frozen=True)
class Progress:
    """News of a step: its row of `watch` (None: its whole checkpoint) was measured, failed, skipped, or is retried."""

    kind: str
    step: int
    watch: str | None = None
    reason: str = ""


class Study:
    """A plan with everything that it names opened: the `series`, the chosen `steps`, the `watches`, the `trajectory`.

    `assumed` says what had to be taken for granted, "" for nothing. `read_only` leaves the run as it is (there may be
    none). Raises DevmonError where something is missing, and where
    the run holds another configuration of a watch.
    """

    def __init__(self, plan: Plan, *, read_only: bool = False) -> None:
        self.plan = plan
        if plan.threads is not None:
            _limit_threads(plan.threads)
        self.series = Series.open(
            plan.series, pattern=plan.pattern, stage=plan.stage, branch=plan.branch,
            allow_pickle=plan.allow_pickle, forget=plan.forget,
        )  # fmt: skip
        self.steps = select(self.series.steps, plan.steps)
        self.config = self.series.config()
        self.model, watches = (None, None) if plan.source is None else load_study(plan.source)
        if self.model is None and not self.series.pretrained:
            raise DataError(
                f"the checkpoints of {plan.series} bring no config.json: give the model they are of, --source "
                "script.py:name of a function that returns it, or returns (model, watches)"
            )
        if watches is None and plan.preset is None:
            raise DataError(
                f"{plan.source} gives no watches: return (model, watches) there, or add --preset standard --tokens FILE"
            )
        if watches is not None and plan.preset is not None:
            raise DataError(f"{plan.source} gives its own watches: leave --preset out")
        self.probe: Probe | None = None
        self.assumed = ""
        self.settings = self._settings()
        self.watches = self._chosen(self._preset() if watches is None else watches)
        if not plan.schedule:
            self.watches = tuple(dataclasses.replace(each, steps=frozenset(self.steps)) for each in self.watches)
        self.device = torch.device(plan.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.model is not None:
            self.model = private_copy(self.model).to(self.device)
        self.trajectory = self._open(read_only)
        self.series.kinds = kept.formats(self.trajectory)
        self._begun: set[str] = set()  # the watches that were measured before

    def _shard(self) -> list[int]:
        """The chosen steps of this shard, dealt in turn."""
        shard, shards = map(int, self.plan.shard.split("/"))
        return self.steps[shard - 1 :: shards]

    def missing(self) -> dict[int, list[Watch]]:
        """Of every step of this shard the watches that the trajectory lacks; of other steps nothing will be loaded."""
        rows = {watch.name for watch in self._with_rows()}
        held = {w.name: set(self.trajectory.steps(w.name)) if w.name in rows else set() for w in self.watches}
        work = {}
        for step in self._shard():
            due = [watch for watch in self.watches if step in watch.steps and step not in held[watch.name]]
            if due:
                work[step] = due
        return work

    def _with_rows(self) -> list[Watch]:
        """The watches that were measured, of those whose layout was not corrected since."""
        known = [watch for watch in self.watches if watch.name in self.known]
        return [
            watch
            for watch in known
            if self.trajectory.steps(watch.name)
            and not self.trajectory.corrects(
                watch.name, identity(watch.instrument), layout_of(watch.instrument, self.model)
            )
        ]

    def choose(self) -> None:
        """Choose what instruments leave open, at the last checkpoint and a middle one, and keep it in the run.

        Where it cannot be done there, `observe` tries at each.
        """
        held = self.trajectory.attrs.get("chosen", {})
        for watch in self.watches:
            instrument = watch.instrument
            if not isinstance(instrument, Choosing) or instrument.settled or watch.name in held:
                continue
            steps = late_and_middle([step for step in self.steps if step in watch.steps])
            models = []
            for _, checkpoint in self.series.stream(steps):
                if isinstance(checkpoint, DataError):
                    raise checkpoint
                models.append(private_copy(self._filled(checkpoint)))
            seed = derive_seed(self.trajectory.seed, watch.name)
            with isolated(), contextlib.suppress(InstrumentError):
                made = instrument.choose(models, seed, later=False)
                keep(self.trajectory, "chosen", watch.name, {"step": max(steps), "steps": steps} | made)

    def measure(self, steps: Iterable[int] | None = None, tell: Callable[[Progress], None] = lambda news: None) -> None:
        """Do what is missing at `steps` (all, by default); checkpoints are prefetched, one ahead of what is measured.

        `tell` hears of every row and of every checkpoint that was skipped. A checkpoint that cannot be read, or does
        not fit, is recorded as a failure of its watches with the reason, and so is an instrument that fails: the others
        go on, and the next time both are tried again. Raises InstrumentError where an instrument does not fit the
        model: a watch of which the run has no row yet, at weights that are finite.
        """
        work = self.missing()
        self._begun = {watch.name for watch in self._with_rows()}
        wanted = work if steps is None else (step for step in steps if step in work)
        for step, checkpoint in self.series.stream(wanted):
            try:
                if isinstance(checkpoint, DataError):
                    raise checkpoint
                model = self._filled(checkpoint)
                self.trajectory.note("checkpoints", str(step), kept.checkpoint(self.series, checkpoint))
                del checkpoint  # the next is being read: two are in memory at most
                self._observe(step, model, work[step], tell)
            except (DataError, IdentityError) as error:
                for watch in work[step]:
                    if not self.trajectory.holds(watch.name, step):
                        self.trajectory.fail(watch.name, step, f"checkpoint skipped: {error}")
                tell(Progress("skipped", step, None, str(error)))
            except InstrumentError as error:
                raise InstrumentError(f"step {step}: {error}") from error

    def _observe(self, step: int, model: nn.Module, due: Iterable[Watch], tell: Callable[[Progress], None]) -> None:
        """`observe`, and again in a half and a quarter of the memory for those for which it was too small."""
        failures: dict[str, dict[int, str]] = {}
        todo = {watch.name: watch for watch in due}
        for parts in (1, 2, 4):
            failures.clear()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* failed at step", UserWarning)  # `tell` says it
                done = observe(
                    step, model, _in_parts(todo.values(), parts), self.trajectory, strict=False, failures=failures,
                    begun=self._begun,
                )  # fmt: skip
            self._begun.update(done)
            for name, watch in list(todo.items()):
                reason = failures.get(name, {}).get(step)
                if reason is None:
                    tell(Progress("measured", step, name))
                elif parts < 4 and OUT_OF_MEMORY.search(reason) and in_parts(watch.instrument, 2 * parts):
                    tell(Progress("retried", step, name, f"out of memory: again in {2 * parts} parts"))
                    continue
                else:
                    tell(Progress("failed", step, name, reason))
                del todo[name]
            if not todo:
                return
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _filled(self, checkpoint: Checkpoint) -> nn.Module:
        """The model with the weights of a checkpoint."""
        if self.model is None:
            return causal_lm(checkpoint, self.config, getattr(torch, self.plan.dtype)).to(self.device)
        state = fitting(self.model, checkpoint.state, checkpoint.name, self.plan.prefix)
        self.model.load_state_dict(state, strict=False)  # fitting is strict
        return self.model

    def _preset(self) -> list[Watch]:
        assert self.plan.preset is not None
        self.probe = self._probe()
        tokens, size = self.probe.tokens, self.plan.vocab_size
        if size is None:
            size = getattr(getattr(self.model, "config", None), "vocab_size", None) or self.config.get("vocab_size")
        if size is None:
            raise DataError("the model tells no vocabulary size: give --vocab-size")
        low, high = int(tokens.min()), int(tokens.max())
        if high >= size or low < 0:
            raise DataError(
                f"{self.plan.tokens} holds tokens {low} to {high}, the vocabulary is 0 to {size - 1}: give tokens of "
                "this model's tokenizer"
            )
        make = getattr(presets, self.plan.preset)
        given = {"vocab_size": size, "last": max(2, self.steps[-1]), "bos": self.plan.bos, "llc": self._llc()}
        given["tokenizer"] = self._vocabulary()
        return make(tokens, **given)

    def _probe(self) -> Probe:
        assert self.plan.tokens is not None
        examples = self.settings.get("examples", 16 * self.settings.get("batch_size", 32)) if self.settings else 0
        return read_probe(Path(self.plan.tokens), self._tokenizer(), self.plan.sequences, self.plan.length, examples)

    def _settings(self) -> dict[str, Any]:
        """Those of the preset's LLC: the plan's, else the published ones for the model; empty for no LLC."""
        suite = self.series.axis.suite
        if self.plan.llc == NO_LLC or self.plan.preset is None:
            return {}
        if self.plan.llc or suite is None:
            return pairs(self.plan.llc, "llc")
        return suite.settings(self.series.name)

    def _vocabulary(self) -> Any:
        """The tokenizer that tells the preset which tokens are real; None, and what is assumed, where there is none."""
        home = self._tokenizer()
        reason = "no tokenizer lies with the series"
        if home is not None:
            try:
                return load_tokenizer(home)
            except DataError as error:
                if self.plan.tokenizer is not None:
                    raise
                reason = str(error).partition(":")[0]
        first = "no token starts a text" if self.plan.bos is None else f"token {self.plan.bos} starts a text"
        self.assumed = f"{reason}: all tokens of the vocabulary are taken for real, none for padding, and {first}"
        return None

    def _tokenizer(self) -> Home | None:
        return (self.plan.tokenizer, None) if self.plan.tokenizer is not None else self.series.tokenizer()

    def _llc(self) -> LLC | None:
        """The LLC of the plan's settings, on the examples of its probe; `examples` among them is their number."""
        if self.probe is None or not self.settings:
            return None
        settings = {name: value for name, value in self.settings.items() if name != "examples"}
        try:
            return LLC(self.probe.examples, **settings)
        except TypeError as error:
            known = ", ".join(field.name for field in dataclasses.fields(LLC) if field.name not in ("data", "loss"))
            raise DataError(f"--llc: {error}: its settings are {known}") from None

    def _chosen(self, watches: Iterable[Watch]) -> tuple[Watch, ...]:
        watches = unique_names(watches)
        names = [watch.name for watch in watches]
        if unknown := sorted(set(self.plan.watch).difference(names)):
            raise DataError(f"there is no watch {unknown[0]!r}: those are {', '.join(names)}")
        return tuple(watch for watch in watches if not self.plan.watch or watch.name in self.plan.watch)

    def _open(self, read_only: bool) -> Any:
        place = store_path(self.plan.into)
        if read_only and "://" not in str(place) and not Path(place).exists():
            self.known: set[str] = set()
            return None
        trajectory = Trajectory(place, "r" if read_only else "a", seed=self.plan.seed)
        for watch in self.watches:
            if not read_only or watch.name in trajectory:  # then nothing is written
                trajectory.redeclare(watch.name, identity(watch.instrument))
        self.known = set(trajectory.names())
        return trajectory

    def frozen(self) -> Plan:
        """The plan for other processes: whole paths, and the probe data as they are, in a file of the run's folder."""
        plan, folder = self.plan.absolute(), Path(str(self.trajectory.path))
        if self.probe is None or "://" in str(self.trajectory.path):
            return plan
        file = self.probe.save(folder.resolve() / "_probe")
        return dataclasses.replace(plan, tokens=str(file), sequences=None, length=None)


def _in_parts(watches: Iterable[Watch], parts: int) -> list[Watch]:
    if parts == 1:
        return list(watches)
    return [
        dataclasses.replace(watch, instrument=in_parts(watch.instrument, parts) or watch.instrument)
        for watch in watches
    ]


def _limit_threads(count: int) -> None:
    """Of torch and of the linear algebra of NumPy and SciPy: a sum's last bits depend on how many threads share it."""
    import scipy.linalg  # noqa: F401  # what is loaded later would not be limited
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(count)
    threadpool_limits(count)
