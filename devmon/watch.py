"""What is measured, and when: `Watch(name, instrument, steps)`."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from devmon.errors import DevmonError

# What answers `step in steps`. Who fills a watch from a file of settings finds here that it may be text too, which
# `Watch` turns into steps; mypy, which takes MYPY for true, sees what a watch has then.
MYPY = False
if MYPY:
    Schedule = Container[int]
else:
    Schedule = Container[int] | str

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Steps:
    """A set of optimizer steps given by a rule; `a | b` is the union with any other container of steps.

    Rules of this module can be pickled, so that watches travel to the processes of `strategy="ddp_spawn"`.
    """

    rule: Callable[[int], bool]
    text: str

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and step >= 0 and self.rule(step)

    def __or__(self, other: Container[int]) -> Steps:
        return Steps(partial(_in_either, self, other), f"{self.text} | {other!r}")

    __ror__ = __or__

    def __repr__(self) -> str:
        return self.text


def every(n: int, *, start: int = 0, stop: int | None = None) -> Steps:
    """Every `n` steps from `start` (0 by default: the initialisation is measured) up to and including `stop`."""
    if n < 1 or start < 0:
        raise DevmonError(f"every(n, start=...) needs n >= 1 and start >= 0, got n={n}, start={start}")
    text = f"every({n}" + (f", start={start}" if start else "") + (f", stop={stop})" if stop is not None else ")")
    return Steps(partial(_periodic, n, start, stop), text)


def log_spaced(count: int, last: int, *, first: int = 1) -> Steps:
    """Step 0 and about `count` steps spaced evenly in log(step) from `first` to `last`, both included.

    Steps that round to the same integer count once, so there are fewer than `count` where `last` is small.

    >>> steps = log_spaced(5, 10_000)
    >>> [s for s in range(10_001) if s in steps]
    [0, 1, 10, 100, 1000, 10000]
    """
    if count < 2 or not 1 <= first < last:
        raise DevmonError(
            f"log_spaced(count, last, first=...) needs count >= 2 and 1 <= first < last, "
            f"got count={count}, first={first}, last={last}"
        )
    ratio = math.log(last / first) / (count - 1)
    chosen = frozenset({0, *(round(first * math.exp(i * ratio)) for i in range(count))})
    text = f"log_spaced({count}, {last})" if first == 1 else f"log_spaced({count}, {last}, first={first})"
    return Steps(chosen.__contains__, text)


RULES: dict[str, Callable[..., Steps]] = {"every": every, "log_spaced": log_spaced}


def written(steps: Container[int] | str) -> Container[int]:
    """Steps, also as files of settings write them: `every(...)` and `log_spaced(...)` with numbers, joined by `|`.

    >>> written("log_spaced(60, 2000) | every(100)")
    log_spaced(60, 2000) | every(100)
    """
    if not isinstance(steps, str):
        return steps
    found: Steps | None = None
    for part in steps.split("|"):
        try:
            call = ast.parse(part.strip(), mode="eval").body
            assert isinstance(call, ast.Call)
            assert isinstance(call.func, ast.Name)
            given = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
            one = RULES[call.func.id](*map(ast.literal_eval, call.args), **given)
        except (SyntaxError, AssertionError, KeyError, ValueError, TypeError) as error:
            raise DevmonError(
                f"steps are written as every(100), log_spaced(60, 2000) or both joined by |, got {steps!r}"
            ) from error
        found = one if found is None else found | one
    assert found is not None
    return found


def _periodic(n: int, start: int, stop: int | None, step: int) -> bool:
    return step >= start and (step - start) % n == 0 and (stop is None or step <= stop)


def _in_either(one: Container[int], other: Container[int], step: int) -> bool:
    return step in one or step in other


@dataclass(frozen=True)
class Watch:
    """One instrument, followed under one name at the steps that answer `step in steps`.

    In a file of settings steps may be text, such as `"log_spaced(60, 2000)"` (`written`).
    """

    name: str
    instrument: Callable[..., Any]
    steps: Schedule

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", written(self.steps))
        if not NAME.fullmatch(self.name):
            raise DevmonError(
                f"a watch's name is made of letters, digits, '_', '.' and '-' (it names a folder), got {self.name!r}"
            )
        if not callable(self.instrument):
            raise DevmonError(f"watch {self.name!r} needs an instrument to call, got {type(self.instrument).__name__}")
        if isinstance(self.steps, int) or not hasattr(self.steps, "__contains__"):
            raise DevmonError(
                f"watch {self.name!r} needs steps that answer 'step in steps', such as every(100), "
                f"log_spaced(60, 10_000) or range(0, 1000, 50); got {self.steps!r}"
            )


def unique_names(watches: Iterable[Watch]) -> tuple[Watch, ...]:
    """The watches as a tuple; refuses two of one name."""
    watches = tuple(watches)
    names = [watch.name for watch in watches]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise DevmonError(f"two watches are named {double[0]!r}: give each its own name")
    return watches
