"""Estimates of λ that are hard to calibrate, with the exact answer: a yardstick of `estimate_llc` without settings.

    python benchmarks/llc_hard.py [NAMES…] [--label now] [--json benchmarks/llc_hard.json] [--seconds 170] [--missing]

NAMES are beginnings of case names, which `--list` prints (none: all). Rows of a label are kept in the file and replaced
case by case, so that the whole may be run in parts: `--seconds` starts no further case after that time, `--missing`
runs those alone that the label lacks. `benchmarks/llc_accuracy.py hard` runs all. A verdict of "localised" is a lower
bound and is right where the bound holds; "ok" with the truth outside the interval by more than 10% of it is the fault
that counts.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llc_hard_cases import CASES, Case
from torch import Tensor, nn

from devmon.errors import DevmonError
from devmon.sampling import estimate_llc
from devmon.testing import exact

TOO_FAR = 0.10  # of the truth, beyond the interval's nearer end


class Counted:
    """A loss that counts the examples whose gradient it was asked for, also where chains are stacked."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.gradients = loss, 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        losses = inner = self.loss(model, batch)
        while torch._C._functorch.is_batchedtensor(inner):
            inner = torch._C._functorch.get_unwrapped(inner)
        if torch.is_grad_enabled():
            self.gradients += inner.numel()
        return losses


def run(case: Case) -> dict[str, Any]:
    """One row: the estimate without any settings, beside the truth and the Gibbs law of the Hessian at its gamma."""
    model, loss, data = case.make()
    counted, start = Counted(loss), time.perf_counter()
    torch.manual_seed(0)
    row: dict[str, Any] = {"case": case.name, "group": case.group}
    try:
        result = estimate_llc(model, counted, data, seed=case.seed)
    except DevmonError as error:
        nbeta = len(data[0]) / math.log(len(data[0]))
        row |= {"truth": case.truth(model, data, nbeta, 1.0), "verdict": "refused", "why": str(error)}
        return row | {"gradients": counted.gradients, "seconds": time.perf_counter() - start}
    attrs = result.attrs
    nbeta, gamma = attrs["nbeta"], attrs["gamma"]
    row |= {"truth": case.truth(model, data, nbeta, gamma)}
    row |= {name: float(result[name]) for name in ("llc", "se", "low", "high", "temperature", "anharmonicity", "rhat")}
    row["verdict"] = result["verdict"].item()
    # What an exact sampler would find at this gamma if the loss were its quadratic part.
    row["quadratic_at_gamma"] = exact.gibbs_quadratic(case.curvatures(model, loss, data).clip(0), nbeta, gamma)
    chains, draws = result.sizes["chain"], result.sizes["draw"]
    own = chains * draws * attrs["steps_per_draw"] * attrs["batch_size"] * (2 if attrs["control_variate"] else 1)
    own += len(data[0]) if attrs["control_variate"] else 0
    row |= {"gradients": own, "calibration_over_estimate": (counted.gradients - own) / own}
    row |= {name: attrs[name] for name in ("nbeta", "gamma", "lr", "steps_per_draw", "control_variate")}
    row |= {name: attrs[name] for name in ("flat", "systematic") if name in attrs}
    row |= judged(row)
    row["high"] = row["high"] if math.isfinite(row["high"]) else None  # JSON has no infinity
    return row | {"seconds": time.perf_counter() - start}


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """How far λ̂ lies from the truth, and how far the truth lies outside the interval, relative to the truth."""
    truth, low, high = row["truth"], row["low"], row["high"]
    localised = row["verdict"] == "localised"
    outside = max(low - truth, 0.0 if localised else truth - high, 0.0) / truth
    return {"error": row["llc"] / truth - 1, "outside": outside}


def right(row: dict[str, Any]) -> bool:
    """Within 10% of the truth and called ok, or called localised with a bound that holds."""
    if row["verdict"] == "localised":
        return bool(row["outside"] <= 0)
    return row["verdict"] == "ok" and abs(row["error"]) <= TOO_FAR


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the table in docs/llc.md shows: all cases, group by group, and the numbers on deep linear networks."""
    measured = [row for row in rows if "error" in row]
    fooled = [row["case"] for row in measured if row["verdict"] == "ok" and row["outside"] > TOO_FAR]
    ratios = [row["calibration_over_estimate"] for row in measured]
    found: dict[str, Any] = {
        "cases": len(rows),
        "ok with the truth outside by more than 10%": len(fooled),
        "which": fooled,
        "calibration over estimate, median and largest": [float(np.median(ratios)), max(ratios)] if ratios else None,
    }
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        verdicts = [row["verdict"] for row in own]
        counts = {word: verdicts.count(word) for word in sorted(set(verdicts))}
        errors = [abs(row["error"]) for row in own if "error" in row and row["verdict"] == "ok"]
        found[group] = {
            "cases": len(own),
            "verdicts": counts,
            "within 10%, or localised with a bound that holds": sum("error" in row and right(row) for row in own),
            "interval holds the truth": sum(row.get("outside", 1) <= 0 for row in own),
            "median |error|, ok": float(np.median(errors)) if errors else None,
            "p90 |error|, ok": float(np.quantile(errors, 0.9)) if errors else None,
        }
    return found


def run_all(
    names: Sequence[str], label: str, path: str | None, seconds: float, missing: bool = False
) -> dict[str, Any]:
    """What the file holds, with the rows of the cases whose names begin with one of `names` under `label`."""
    unknown = [name for name in names if not any(case.name.startswith(name) for case in CASES)]
    if unknown:
        raise SystemExit(f"no case begins with {', '.join(unknown)}: see --list")
    stored = json.loads(Path(path).read_text()) if path and Path(path).exists() else {}
    rows = {row["case"]: row for row in stored.get(label, {}).get("rows", [])}
    start = time.perf_counter()
    for case in CASES:
        if names and not any(case.name.startswith(name) for name in names):
            continue
        if missing and case.name in rows:
            continue
        if time.perf_counter() - start > seconds:
            print(f"stopped before {case.name}: go on from there", flush=True)
            break
        rows[case.name] = run(case)
        print(json.dumps(rows[case.name]), flush=True)
        ordered = [rows[each.name] for each in CASES if each.name in rows]
        machine = {"platform": platform.platform(), "torch": torch.__version__, "python": platform.python_version()}
        stored[label] = {"machine": machine, "summary": summary(ordered), "rows": ordered}
        if path:
            Path(path).write_text(json.dumps(stored, indent=1) + "\n")
    return stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAMES")
    parser.add_argument("--label", default="now")
    parser.add_argument("--json", default=None)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    args = parser.parse_args()
    if args.list:
        print("\n".join(case.name for case in CASES))
        return
    torch.set_num_threads(1)
    found = run_all(args.names, args.label, args.json, args.seconds, args.missing)
    print(json.dumps(found.get(args.label, {}).get("summary", {}), indent=1))


if __name__ == "__main__":
    main()
