"""The checkpoints of one training on one axis of steps: branches chosen, stages one after another, the rest named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from devmon.checkpoints.names import STEP, Name, read_form, read_plain, tells_step
from devmon.checkpoints.suites import SUITES, Suite
from devmon.errors import DataError

SHOWN = 6  # names of one reason that are spelt out


@dataclass(frozen=True)
class Axis:
    """Step on the axis to what the checkpoint's name says, ascending.

    A stage that counts anew begins at the last step of the stage before it: `offsets` says where (0 for the first).
    `tokens` are those of the whole training, `left_out` the other names with the reason, `unit` what is counted.
    """

    names: dict[int, Name]
    tokens: dict[int, int | None] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    unit: str = "steps"
    suite: Suite | None = None

    def said(self) -> list[str]:
        """What a user should know of it, in lines: how names were read, offsets, and what is left out."""
        lines = []
        if self.suite is not None:
            note = f": {self.suite.note}" if self.suite.note else ""
            lines.append(f"names of {self.suite.name}{note}")
        if self.unit != "steps":
            lines.append(f"the names count {self.unit}, and so do the steps here")
        for stage, offset in self.offsets.items():
            if offset:
                lines.append(f"{stage} counts anew: its steps begin at {offset}, the end of the stage before")
        first = next(iter(self.offsets), "")
        if re.fullmatch(r"(?:stage|phase)(?:[2-9]|\d\d+)", first):
            lines.append(f"steps count from the start of {first}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"left out: {', '.join(names[:SHOWN])}{more} ({reason})")
        return lines


def axis(
    names: Iterable[str],
    where: str,
    *,
    pattern: str | None = None,
    suite: Suite | None = None,
    stage: str | None = None,
    branch: str | None = None,
) -> Axis:
    """The names on one axis.

    `suite` says how they are read; without one, the form that reads all of them. `pattern` is a regular expression in
    its place (`read_form`). `branch` is an ingredient or a seed, together with the stages before it that have none;
    `stage` takes one stage, by its own count. Raises DataError for a number that cannot be read, several branches of
    which none is chosen, stages whose order or count the names do not tell, and two checkpoints of one step.
    """
    names = sorted(set(names))

    def arranged(found: dict[str, Name], row: Suite | None, reason: str) -> Axis:
        left = {name: reason for name in names if name not in found}
        if row is not None and row.stages:
            found = {text: replace(name, stage=name.stage or row.stages[0]) for text, name in found.items()}
        return _of_stages(_of_branch(found, where, branch, stage, row, left), where, stage, row, left)

    if pattern is not None:
        return arranged(read_form(names, where, pattern, whole=False), None, "not of the pattern")
    if suite is not None:
        held = read_form(names, where, suite.form) if suite.form else read_plain(names, where)
        return arranged(held, suite, f"no step as {suite.name} writes it")

    # words first: most names say step, or checkpoint, before the number
    plain: dict[str, Name] = {}
    refusal: DataError | None = None
    try:
        plain = read_plain(names, where)
        by_words = arranged(plain, None, "no step in the name")
    except DataError as error:
        refusal = error

    # a form of the table in their place, where it reads all that words do, and more names or what they leave open
    needed = {name for name in names if tells_step(name)}
    others: list[str] = []
    for row in sorted(SUITES, key=lambda row: bool(row.repository)):
        try:
            held = read_form(names, where, row.form) if row.form else {}
        except DataError:
            continue
        more = len(held) > len(plain)
        tells = row.distinct or any(name.branch for name in held.values())
        if held and needed <= held.keys() and (more or (refusal and tells)):
            try:
                return arranged(held, row, "no step in the name")
            except DataError as error:
                refusal = error
        others += [name for name in held if name not in needed]
    if refusal is not None:
        raise refusal
    if plain and others:
        example = next(iter(plain))
        raise DataError(
            f"{where} has {others[0]} beside checkpoints that name their step, such as {example}: two kinds in one "
            f"place. Name those that belong to the series by a pattern, as in --pattern '{_hint(example)}'"
        )
    return by_words


def _of_branch(
    found: dict[str, Name],
    where: str,
    branch: str | None,
    stage: str | None,
    suite: Suite | None,
    left: dict[str, str],
) -> list[Name]:
    """The names of a branch with the stages before it; without one those of no branch, or of the only one."""
    counts: dict[str, int] = {}
    for name in found.values():
        counts[name.branch] = counts.get(name.branch, 0) + 1
    named = {key: count for key, count in counts.items() if key}
    shown = ", ".join(f"{key} ({count})" for key, count in sorted(named.items()))
    if branch is None and not named:
        return [*found.values()]
    if branch is None and "" not in counts and len(named) > 1:
        raise DataError(
            f"{where} has checkpoints of several branches or seeds ({shown}): choose one, as in --branch {min(named)}"
        )
    if branch is None:
        branch = "" if "" in counts else next(iter(named))
    own = [name for name in found.values() if name.branch.lower() == branch.lower()]
    if not own:
        raise DataError(f"{where} has no branch {branch!r}: those are {shown or 'none'}")
    # a branch goes on from the stages before its own; where it has a stage, the others' checkpoints of it are not its
    before: list[Name] = []
    if branch and stage is None and not (suite is not None and suite.apart):
        order = _ordered({name.stage for name in found.values()}, suite)
        if order is None:
            raise _no_order(found.values(), where)
        first = min(order.index(name.stage) for name in own)
        before = [name for name in found.values() if not name.branch and name.stage in order[:first]]
    kept = [*before, *own]
    for name in found.values():
        if name not in kept:
            left[name.text] = f"of {name.branch}: --branch {name.branch}" if name.branch else "not of the branch"
    return kept


def _of_stages(names: list[Name], where: str, stage: str | None, suite: Suite | None, left: dict[str, str]) -> Axis:
    """The stages one after another, or one by its own count."""
    stages: dict[str, list[Name]] = {}
    for name in names:
        stages.setdefault(name.stage, []).append(name)
    if stage is not None:
        wanted = "" if stage == "main" else stage.lower()
        if wanted not in stages:
            raise DataError(f"{where} has no stage {stage!r}: those are {_shown(names) or 'none'}")
        left |= {n.text: f"of {key or 'no stage'}" for key, held in stages.items() if key != wanted for n in held}
        stages = {wanted: stages[wanted]}
    order = _ordered(set(stages), suite)
    if order is None:
        raise _no_order(names, where)

    # each stage begins where the one before it ended, in steps and in tokens
    placed: dict[int, Name] = {}
    tokens: dict[int, int | None] = {}
    offsets: dict[str, int] = {}
    last = own = used = 0
    for key in order:
        held = sorted(stages[key], key=lambda name: name.step)
        anew = bool(placed) and _anew(held, key, own, last, where, suite)
        offsets[key] = last if anew else 0
        counts = [name.tokens for name in held if name.tokens is not None]
        spent = used if anew and counts and min(counts) < used else 0
        for name in held:
            step = offsets[key] + name.step
            if anew and name.step == 0:
                left[name.text] = f"the start of {key}, which is the end of the stage before"
                continue
            if step in placed:
                raise DataError(
                    f"{where} has two checkpoints of step {step}, {placed[step].text} and {name.text}: tell those that "
                    "belong to the series by a pattern, as in --pattern '^stage1-step(\\d+)'"
                )
            placed[step] = name
            tokens[step] = None if name.tokens is None else name.tokens + spent
        own, last = held[-1].step, max(placed)
        used = max((count for count in tokens.values() if count is not None), default=0)
    unit = "steps" if suite is None else suite.unit
    if unit == "tokens":
        tokens = {step: step for step in placed}
    return Axis(placed, tokens, offsets, left, unit, suite)


def _anew(held: list[Name], key: str, own: int, last: int, where: str, suite: Suite | None) -> bool:
    """Whether the counter of a stage begins at 0 again, after a stage that ended at `own` of its count."""
    begins = held[0].step
    known = None if suite is None else False if key in suite.goes_on else True if suite.anew else None
    if known is not None and (known or begins > last):
        return known
    if begins <= own:
        return True
    raise DataError(
        f"{key} in {where} begins at step {begins}, past step {own} where the stage before it ends: whether it goes on "
        f"or counts anew the names do not say. Measure one stage (--stage {key}), or all with --pattern "
        "'step[-_=]?(\\d+)' where the steps go on"
    )


def _shown(names: Iterable[Name]) -> str:
    """The stages, each with its first checkpoint."""
    first: dict[str, Name] = {}
    for name in sorted(names, key=lambda name: name.step):
        first.setdefault(name.stage, name)
    return ", ".join(f"{stage or 'of no stage'} ({name.text})" for stage, name in sorted(first.items()))


def _no_order(names: Iterable[Name], where: str) -> DataError:
    names = [*names]
    example = min((name.stage for name in names if name.stage), default="main")
    return DataError(
        f"the names in {where} are of several stages or runs ({_shown(names)}), and do not tell their order: measure "
        f"one, as in --stage {example}, or all with --pattern 'step[-_=]?(\\d+)' where the steps go on"
    )


def _ordered(stages: set[str], suite: Suite | None) -> list[str] | None:
    """The stages in the order of training; None where it is not known."""
    if suite is not None and suite.stages and stages <= {*suite.stages}:
        return [key for key in suite.stages if key in stages]
    if len(stages) < 2:
        return [*stages]
    # stage1, stage2: alike but for one number
    numbers = {key: re.findall(r"\d+", key) for key in stages}
    alike = {re.sub(r"\d+", "#", key) for key in stages}
    if len(alike) == 1 and all(len(held) == 1 for held in numbers.values()):
        return sorted(stages, key=lambda key: int(numbers[key][0]))
    return None


def _hint(name: str) -> str:
    """A pattern that finds the step in names like this one."""
    start = re.search(STEP, name)
    assert start is not None
    return "^" + re.escape(name[: start.start("step")]).replace("\\-", "-") + "(\\d+)"
