"""Probe data with known answers, and what instruments share to hold and average it."""

from devmon.data.jackknife import jackknife
from devmon.data.matches import nearest_tokens
from devmon.data.probe import (
    ByContent,
    clustered_groups,
    clustered_mean,
    minibatches,
    places_of,
    probe_inputs,
    probe_tokens,
    random_tokens,
)
from devmon.data.prompt_pairs import PromptPairs, broken_repeats
from devmon.data.repeats import RepeatProbe, best_fixed_offset, repeats
from devmon.data.symbol_tasks import TaskPrompts, symbol_tasks

__all__ = [
    "ByContent",
    "PromptPairs",
    "RepeatProbe",
    "TaskPrompts",
    "best_fixed_offset",
    "broken_repeats",
    "clustered_groups",
    "clustered_mean",
    "jackknife",
    "minibatches",
    "nearest_tokens",
    "places_of",
    "probe_inputs",
    "probe_tokens",
    "random_tokens",
    "repeats",
    "symbol_tasks",
]
