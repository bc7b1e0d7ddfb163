"""The step in the name of a checkpoint: `step-100.ckpt`, `checkpoint-20k`, or what a pattern finds. Never a guess."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal

from devmon.errors import DataError

STEP = r"(?i)(?:^|[^a-z])(?:global_?step|step|(?P<epochs>checkpoint)|iter(?:ation)?)[-_=]?(?P<step>\d[\w.]*)"
NUMBER = r"(?i)(?P<digits>\d{1,3}(?:_\d{3})+|\d+)(?P<part>\.\d+)?(?:e(?P<zeros>\d{1,2}))?(?P<unit>[kmbt]?)"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
COUNTED = r"(?i)(?:^|[^a-z])ckpt[-_=]?\d"  # a number of something: steps, saves or thousands of them
# Words of a name that do not tell one phase or seed of a training from another; what is not here does.
COMMON = {
    *("checkpoint", "checkpoints", "ckpt", "dict", "ep", "epoch", "global", "intermediate", "main", "model", "net"),
    *("network", "pytorch", "state", "v", "weights"),
}


def steps_in(names: Iterable[str], where: str, pattern: str | None = None) -> dict[int, str]:
    """Step to name, of the names that hold one; the others are left out.

    By default the step follows the word step, checkpoint, global_step or iter; `pattern` is a regular expression that
    finds it as its one group. Units are read: 20k, 1M, 1_000, 1e3. Raises DataError for a number that is none of these,
    for two names of one step, and (without a pattern) for names of several phases, stages or seeds, whose steps may
    count anew.
    """
    rule = _rule(pattern)
    found: dict[int, str] = {}
    starts: dict[str, str] = {}  # what stands before the step, as a pattern, by name
    for name in sorted(names):
        if not (match := rule.search(name)):
            if pattern is None and re.search(COUNTED, name):
                starts[name] = ""
            continue
        step = _step(name, match, where, pattern)
        if step in found:
            raise DataError(
                f"{where} has two checkpoints of step {step}, {found[step]} and {name}: tell those that "
                "belong to the series by a pattern, as in --pattern '^stage1-step(\\d+)'"
            )
        found[step] = name
        starts[name] = "^" + re.escape(name[: match.start("step")]).replace("\\-", "-") if pattern is None else ""
    if pattern is None and found:
        _refuse_phases(where, starts, [name for name in starts if not starts[name]])
    return found


def number(text: str) -> int | None:
    """The whole number that a text is, with its unit; None where it is none.

    >>> [number(text) for text in ("0100", "20k", "1_000", "1e3", "2.5T", "1.5", "3f", "12_3", "")]
    [100, 20000, 1000, 1000, 2500000000000, None, None, None, None]
    """
    if not (match := re.fullmatch(NUMBER, text)):
        return None
    value = Decimal(match["digits"].replace("_", "") + (match["part"] or ""))
    value *= 10 ** int(match["zeros"] or 0) * UNITS[match["unit"].lower()]
    return int(value) if value == int(value) else None


def _step(name: str, match: re.Match[str], where: str, pattern: str | None) -> int:
    if pattern is None:
        # of what follows the word, the number ends where a suffix or another part of the name begins
        whole = match["step"]
        text = re.split(r"\.(?!\d)|_(?!\d)|(?<=\d)(?=step)", whole, maxsplit=1)[0]
        text = re.sub(r"\.\d+(?=\D)\w+$", "", text) if number(text) is None else text
        if match["epochs"] and "_" in text:  # checkpoint_1_1000 is an epoch and a step
            text = ""
    else:
        text = match[1] or ""
        rest = name[match.end(1) :]
        if text and match.end(1) == match.end() and re.match(r"(?i)[kmbt](?![a-z])|[_.]?\d|e\d", rest):
            text += rest
    if (step := number(text)) is None:
        shown = match["step"] if pattern is None else match[1]
        raise DataError(
            f"{name} in {where} holds {shown!r} where its step should be: expected a whole number such as 100, 20k or "
            "1e3. Say which digits are the step by a pattern with one group of digits, as in "
            "--pattern 'checkpoint_\\d+_(\\d+)'"
        )
    return step


def _refuse_phases(where: str, starts: dict[str, str], counted: list[str]) -> None:
    """Raise DataError where names tell several phases or seeds, or count something else beside the steps."""
    phases: dict[tuple[str, ...], list[str]] = {}
    for name in starts:
        if name not in counted:
            phases.setdefault(_phase(name), []).append(name)
    hint = Counter({starts[held[0]]: len(held) for held in phases.values()}).most_common(1)[0][0]
    if len(phases) > 1:
        few = ", ".join(f"{held[0]} ({len(held)})" for held in list(phases.values())[:4])
        raise DataError(
            f"the names in {where} are of several phases or runs ({few}), whose steps may count anew: measure one at a "
            f"time, as in --pattern '{hint}(\\d+)', or all with --pattern 'step[-_=]?(\\d+)' where the steps go on"
        )
    if counted:
        raise DataError(
            f"{where} has {counted[0]} beside checkpoints that name their step, and does not say what it counts: name "
            f"those that belong to the series by a pattern, as in --pattern '{hint}(\\d+)'"
        )


def _phase(name: str) -> tuple[str, ...]:
    """The words that tell phases apart: those before the step, and a seed anywhere."""
    match = re.search(STEP, name)
    assert match is not None
    before = re.findall(r"[a-z]+\d*", name[: match.start()].lower())
    words = [word for word in before if word.rstrip("0123456789") not in COMMON]
    return (*words, *re.findall(r"seed[-_=]?[a-z0-9]+", name.lower()))


def _rule(pattern: str | None) -> re.Pattern[str]:
    try:
        rule = re.compile(STEP if pattern is None else pattern)
    except re.error as error:
        raise DataError(f"the pattern {pattern!r} is no regular expression ({error})") from None
    if pattern is not None and rule.groups != 1:
        raise DataError(f"the pattern {pattern!r} needs one group, the digits of the step, as in 'model_(\\d+)'")
    return rule
