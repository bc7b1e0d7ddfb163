"""BibTeX of references written as references.py writes them: "Authors (year), Title. Venue or arXiv number"."""

from __future__ import annotations

import re
from collections.abc import Iterable

_FORM = re.compile(r"(?P<authors>.+?) \((?P<year>\d{4})\), (?P<title>.+?)\. (?P<venue>.+)")
_SPECIAL = {"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "R̂": r"$\hat{R}$"}


def bibtex(references: Iterable[str]) -> str:
    """One entry a reference, in their order, with keys like lau2023local.

    >>> print(bibtex(["Lau et al. (2023), The local learning coefficient: a measure. arXiv:2308.12108"]))
    @misc{lau2023local,
      author = {Lau and others},
      title = {{The local learning coefficient: a measure}},
      year = {2023},
      eprint = {2308.12108},
      archivePrefix = {arXiv},
    }
    <BLANKLINE>
    """
    entries: dict[str, str] = {}
    for reference in references:
        parts = _FORM.fullmatch(reference)
        if parts is None:
            raise ValueError(f'a reference reads "Authors (year), Title. Venue", got {reference!r}')
        key = base = _key(parts)
        while key in entries:
            key = f"{base}{chr(ord('a') + sum(known.startswith(base) for known in entries))}"
        fields = {"author": _authors(parts["authors"]), "title": f"{{{_tex(parts['title'])}}}", "year": parts["year"]}
        kind = "misc"
        if parts["venue"].startswith("arXiv:"):
            fields |= {"eprint": parts["venue"].removeprefix("arXiv:"), "archivePrefix": "arXiv"}
        elif "University Press" in parts["venue"]:
            kind, fields["publisher"] = "book", _tex(parts["venue"])
        elif volume := re.fullmatch(r"(.+?) (\d+)(?:\((\d+)\))?", parts["venue"]):
            kind = "article"
            fields |= {"journal": _tex(volume[1]), "volume": volume[2]} | ({"number": volume[3]} if volume[3] else {})
        else:
            fields["howpublished"] = _tex(parts["venue"])
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
        entries[key] = "\n".join([f"@{kind}{{{key},", *lines, "}\n"])
    return "\n".join(entries.values())


def _key(parts: re.Match[str]) -> str:
    words = [word for word in re.findall(r"[a-z]+", parts["title"].lower()) if len(word) > 3]
    author = re.sub(r"[^a-z]", "", re.split(r"[ ,&]", parts["authors"])[0].lower())
    return f"{author}{parts['year']}{words[0] if words else ''}"


def _authors(text: str) -> str:
    names = re.split(r",? & |, ", text.removesuffix(" et al."))
    return _tex(" and ".join([*names, *(["others"] if text.endswith(" et al.") else [])]))


def _tex(text: str) -> str:
    for plain, code in _SPECIAL.items():
        text = text.replace(plain, code)
    return text
