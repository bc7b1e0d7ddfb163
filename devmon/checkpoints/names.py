"""What the name of a checkpoint says: its step, and its stage, branch and tokens where it names them. Never a guess."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from devmon.errors import DataError

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")  # of files of weights
STEP = r"(?i)(?:^|[^a-z])(?:global_?step|step|checkpoint(?=[-_=])|iter(?:ation)?)[-_=]?(?P<step>\d[\w.]*)"
NUMBER = r"(?i)(?P<digits>\d{1,3}(?:_\d{3})+|\d+)(?P<part>\.\d+)?(?:e(?P<zeros>\d{1,2}))?(?P<unit>[kmbt]?)"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
TOKENS = r"(?i)(?:^|[-_])(?:tokens?[-_=]?)?(?P<tokens>\d[\d.]*[kmbt])t?(?=$|[-_.])"  # tokens210B, token-2T, 2BT, 105b
BRANCH = r"(?i)ingredient[-_]?\d+|seed[-_=]?[a-z0-9]+"
# Words of a name that do not tell one stage of a training from another; what is not here does.
COMMON = {
    *("checkpoint", "checkpoints", "ckpt", "dict", "ep", "epoch", "global", "intermediate", "main", "model", "net"),
    *("network", "pytorch", "state", "v", "weights"),
}


@dataclass(frozen=True)
class Name:
    """What the name `text` says. `stage` and `branch` (an ingredient, a seed) are "" where it names none; `step` counts
    from the start of its stage, where the stages of a suite count anew, and `tokens` too."""

    text: str
    step: int
    stage: str = ""
    branch: str = ""
    tokens: int | None = None


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


def tells_step(name: str) -> bool:
    """Whether a name has the word step, checkpoint, global_step or iter before a number."""
    return re.search(STEP, stem(name)) is not None


def read_plain(names: Iterable[str], where: str) -> dict[str, Name]:
    """The names in which a number follows the word step, checkpoint, global_step or iter.

    What stands before the word is the stage, as far as names differ in it; a seed or an ingredient is the branch.
    Raises DataError where what follows is no whole number with a unit.
    """
    found: dict[str, Name] = {}
    words: dict[str, list[str]] = {}
    for name in sorted(names):
        if (match := re.search(STEP, stem(name))) is None:
            continue
        text, rest = _number_in(match, stem(name))
        step = number(text)
        if step is None:
            raise no_number(name, where, match["step"])
        # a branch may stand on either side; the tokens follow the step
        before = stem(name)[: match.start()]
        told = re.search(TOKENS, rest)
        after = re.sub(TOKENS, "", rest)
        seed = re.search(r"(?i)seed(?:[-_=]?[a-z0-9]+)+", after)
        branch = "-".join([*re.findall(BRANCH, before), *([seed[0]] if seed else re.findall(BRANCH, after))])
        tokens = None if told is None else number(told["tokens"])
        found[name] = Name(name, step, "", branch, tokens)
        tried = re.findall(r"\d+[a-z]+|[a-z]+\d*", re.sub(BRANCH, "", before).lower())
        words[name] = [word for word in tried if word.rstrip("0123456789") not in COMMON]
    # words that all names have are the model's; a size that all have is no number of tokens
    shared = set[str].intersection(*map(set, words.values())) if words else set()
    shared = {word for word in shared if not re.fullmatch(r"(?:stage|phase)\d+", word)}
    sizes = {name.tokens for name in found.values()}
    same = len(found) > 1 and len(sizes) == 1
    return {
        text: Name(
            text,
            name.step,
            "-".join(word for word in words[text] if word not in shared),
            name.branch,
            None if same else name.tokens,
        )
        for text, name in found.items()
    }


def read_form(names: Iterable[str], where: str, form: str, whole: bool = True) -> dict[str, Name]:
    """The names that a regular expression matches, wholly (but for their suffix) or anywhere.

    Its group `step` (or its only group) is the step; `stage`, `branch` and `tokens` are groups that it may have. A name
    whose step the expression leaves out is left out. Raises DataError where a step is no whole number with a unit.
    """
    try:
        rule = re.compile(form if not whole else f"(?i:{form})")
    except re.error as error:
        raise DataError(f"the pattern {form!r} is no regular expression ({error})") from None
    if "step" not in rule.groupindex and rule.groups != 1:
        raise DataError(
            f"the pattern {form!r} needs one group, the digits of the step, as in 'model_(\\d+)'; or groups named "
            "step, stage, branch and tokens, as in '(?P<stage>\\w+)-step(?P<step>\\d+)'"
        )
    group = "step" if "step" in rule.groupindex else 1
    found = {}
    for name in sorted(names):
        match = rule.fullmatch(stem(name)) if whole else rule.search(name)
        if match is None or (whole and match[group] is None):
            continue
        # a group that ends where its match does may have cut a unit, or more digits, off
        text, rest = match[group] or "", name[match.end(group) :]
        at_end = match.end(group) == match.end()
        if text and at_end and re.match(r"(?i)[kmbt](?![a-z])|[_.]?\d|e\d", rest):
            text += rest
        if (step := number(text)) is None:
            raise no_number(name, where, match[group])
        said = match.groupdict(default="")
        tokens = number(re.sub(r"(?i)(?<=[kmb])t$", "", said.get("tokens", "")))
        found[name] = Name(name, step, said.get("stage", "").lower(), said.get("branch", ""), tokens)
    return found


def no_number(name: str, where: str, shown: str | None) -> DataError:
    return DataError(
        f"{name} in {where} holds {shown!r} where its step should be: expected a whole number such as 100, 20k or "
        "1e3. Say which digits are the step by a pattern with one group of digits, as in "
        "--pattern 'checkpoint_\\d+_(\\d+)'"
    )


def stem(name: str) -> str:
    """The name without the suffix of a file of weights."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def _number_in(match: re.Match[str], name: str) -> tuple[str, str]:
    """The number that follows the word, which ends where a suffix or another part of the name begins, and the rest."""
    whole = match["step"]
    text = re.split(r"\.(?!\d)|_(?!\d)|(?<=\d)(?=step)", whole, maxsplit=1)[0]
    text = re.sub(r"\.\d+(?=\D)\w+$", "", text) if number(text) is None else text
    if re.search(r"(?i)checkpoint[-_=]?$", name[: match.start("step")]) and "_" in text:
        text = ""  # checkpoint_1_1000 is an epoch and a step
    return text, name[match.start("step") + len(text) :]
