"""Steering a real language model of 135 million weights along a direction of sentiment, against random directions.

    python benchmarks/features/steering.py FOLDER --json steering.json     # 3 minutes on a core

FOLDER holds a causal language model and its tokenizer as `save_pretrained` writes them; the committed numbers are of
SmolLM2-135M-Instruct, which `benchmarks/real_model.py FOLDER prepare` makes. The direction is read from sentences that
praise and the same that blame (`ConceptDirection`, mean difference), and steers what follows "… was so", good or bad
(`Steering`), at one layer. The text of the side effect is docstrings of Python's standard library.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import platform
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from devmon.data.prompt_pairs import PromptPairs
from devmon.instruments import ConceptDirection, Steering
from devmon.snapshot import Snapshot

NOUNS = ("movie", "book", "food", "meal", "hotel", "day", "trip", "story", "music", "game")
GOOD = ("great", "wonderful", "excellent", "good", "lovely", "amazing", "perfect", "beautiful")
BAD = ("terrible", "awful", "horrible", "bad", "ugly", "poor", "sad", "boring")
LAYER = 15  # the middle of 30


def same_length(tokenizer: Any, *sides: list[str]) -> list[Tensor]:
    """The sentences of all sides whose tokens are as many as most have, (sentence, pos) each."""
    ids = [[tokenizer(text)["input_ids"] for text in side] for side in sides]
    lengths = [len(each) for side in ids for each in side]
    most = max(set(lengths), key=lengths.count)
    kept = [row for row in zip(*ids, strict=True) if all(len(each) == most for each in row)]
    return [torch.tensor(side) for side in zip(*kept, strict=True)]


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    snapshot = Snapshot(0, AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval())

    # the concept, from sentences that praise and that blame
    words = list(zip(cycle(GOOD), cycle(BAD), [noun for noun in NOUNS for _ in range(4)], strict=False))
    positive, negative = same_length(
        tokenizer,
        [f"I think that the {noun} is {good}." for good, _, noun in words],
        [f"I think that the {noun} is {bad}." for _, bad, noun in words],
    )
    began = time.perf_counter()
    concept = ConceptDirection(positive, negative)(snapshot)
    read_in = time.perf_counter() - began

    # the answer that it should move, and text that it should not
    (prompts,) = same_length(tokenizer, [f"Everybody says that the {noun} was so" for noun in NOUNS])
    answer, foil = (torch.full((len(prompts),), tokenizer(word)["input_ids"][0]) for word in (" good", " bad"))
    docs = "\n\n".join(
        inspect.cleandoc(ast.get_docstring(ast.parse(inspect.getsource(m))) or "") for m in (ast, inspect, json)
    )
    ids = torch.tensor(tokenizer(docs)["input_ids"])
    text = ids[: len(ids) // 32 * 32].view(-1, 32)[:4]
    direction = torch.from_numpy(concept["direction"].sel(estimator="mean", layer=LAYER).values)
    instrument = Steering(
        PromptPairs(prompts, prompts, answer, foil), text, ("resid_post", LAYER), direction[None], strengths=(1.0, 2.0)
    )
    began = time.perf_counter()
    found = instrument(snapshot)
    numbers = {
        "machine": f"{platform.machine()}, one core",
        "pairs": len(positive),
        "auc": {name: concept["auc"].sel(estimator=name, layer=LAYER).item() for name in concept["estimator"].values},
        "auc_shuffled": {
            n: concept["auc_shuffled"].sel(estimator=n, layer=LAYER).item() for n in concept["estimator"].values
        },
        "cosine_halves": concept["cosine_halves"].sel(estimator="mean", layer=LAYER).item(),
        "cosine_random": concept["cosine_random"].item(),
        "seconds": {"concept": read_in, "steering": time.perf_counter() - began},
        "steering": {name: found[name].values.tolist() for name in found.data_vars if not name.endswith("_replicates")},
    }
    told = json.dumps(numbers, indent=1)
    print(told)
    if options.json:
        options.json.write_text(told + "\n")


if __name__ == "__main__":
    main()
