"""The card of a run as a dataset of the hub: what it is, what happened, what it holds, how it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from devmon.analysis.reports.findings import Findings
from devmon.analysis.reports.prose.story import tell
from devmon.analysis.run import has_rows
from devmon.analysis.wording import count

CARD = """---
pretty_name: {title}
tags: [devmon, interpretability, training-dynamics]
---

# {title}

{lead}

What devmon measured of a network while it trained, {watches}. `report.html` is its report: open it in a browser.

| watch | instrument | observations | steps |
|---|---|---|---|
{rows}

## How to read it

```
devmon pull {repository} -o runs/{name}
devmon report runs/{name}
```

`trajectory.zarr` is plain Zarr v3, a group a watch: `xarray.open_zarr("trajectory.zarr", group="{first}")`. Units,
errors and settings are attributes of each group.

## Where it comes from

{origin}
"""


def card(findings: Findings, repository: str) -> str:
    """Markdown with the front matter that the hub reads."""
    attrs = findings.run.attrs
    watches = findings.watches
    rows = []
    for name, data in watches.items():
        steps: Sequence[int] = data["step"].values.tolist() if has_rows(data) else []
        kind = str(data.attrs.get("instrument", "")).rpartition(".")[2]
        reach = f"{min(steps)} to {max(steps)}" if len(steps) else "–"
        rows.append(f"| `{name}` | {kind} | {len(steps)} | {reach} |")
    known = ("run_id", "created", "model", "data", "parameters", "seed", "device", "versions", "command")
    origin = [f"- {key.replace('_', ' ')}: {told(attrs[key])}" for key in known if key in attrs]
    return CARD.format(
        title=json.dumps(str(attrs.get("title") or f"Training run {attrs.get('run_id', '')}".strip()))[1:-1],
        lead=tell(findings).lead,
        watches=count(len(watches), "watch", "watches"),
        rows="\n".join(rows),
        repository=repository,
        name=repository.rpartition("/")[2],
        first=next(iter(watches), "loss"),
        origin="\n".join(origin) or "The run says nothing of it.",
    )


def told(value: object) -> str:
    """A value of the run's attributes in one line."""
    text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
