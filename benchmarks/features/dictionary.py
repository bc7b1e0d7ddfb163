"""One dictionary of an MLP of a pretrained model: its cost, what the model loses by it, and what its latents fire on.

    python benchmarks/features/dictionary.py FOLDER [LAYER] [STEPS] [--text FOLDER]

FOLDER is a model and its tokenizer, saved plainly. BatchTopK, 32 latents a place, 4 times the width, STEPS of 2048
places of Python sources and documentation, 128 tokens each. The state is kept every five steps in the working folder:
the same command goes on. Prints the quality on 16 held-out sequences, and twenty latents drawn at
random with the contexts of their largest activations.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from devmon.features import BatchTopK, Dictionary, Streamed, Training, save_dictionary, train
from devmon.instruments import DictionaryQuality
from devmon.snapshot import Snapshot

LENGTH, HELD_OUT, BATCH = 128, 16, 2048


def tokens_of(folder: Path, tokenizer: object, places: int) -> torch.Tensor:
    """Rows of text of a folder's files, in an order drawn by a seed."""
    found: list[int] = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".md", ".rst", ".txt")):
        text = path.read_text(errors="ignore")[:60_000]
        if len(text) > 500:
            found += tokenizer(text)["input_ids"][:12_000]  # type: ignore[operator]
        if len(found) > places:
            break
    rows = torch.tensor(found[: len(found) // LENGTH * LENGTH]).view(-1, LENGTH)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = argparse.ArgumentParser()
    asked.add_argument("folder", type=Path)
    asked.add_argument("layer", type=int, nargs="?", default=4)
    asked.add_argument("steps", type=int, nargs="?", default=488)
    asked.add_argument("--text", type=Path, default=Path(sys.prefix) / "lib")
    options = asked.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    rows = tokens_of(options.text, tokenizer, options.steps * BATCH * 5 // 4)
    held_out, site = rows[:HELD_OUT], ("mlp_out", options.layer)

    begun, cpu = time.time(), time.process_time()
    source = Streamed(model, rows[HELD_OUT:], [site], batch=BATCH, block=2**15)
    training = Training(BatchTopK(32), width=4, steps=options.steps, lr=1e-3)
    state = Path(f"dictionary-{options.folder.name}-{options.layer}-{options.steps}.pt")
    dictionary = train(training, source, file=state, save_every=5).dictionary
    assert isinstance(dictionary, Dictionary)
    save_dictionary(dictionary, state.with_suffix(""), site, model_name=options.folder.name, context_size=LENGTH)
    spent = f"{time.time() - begun:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
    print(f"{options.steps * BATCH} places, {torch.get_num_threads()} threads: {spent}")

    found = DictionaryQuality(held_out, dictionary, site, batch_size=8)(Snapshot(0, model))
    for name in ("l0", "fvu", "loss", "loss_spliced", "kl", "loss_recovered_zero", "loss_recovered_mean"):
        print(f"{name} {float(found[name]):.3f} ± {float(found[name + '_se']):.3f}")
    for name in ("fvu_gaussian", "dead", "dense", "description_length"):
        print(f"{name} {float(found[name]):.3f}")
    density = found["density"].values
    seldom = np.flatnonzero((density > 5e-4) & (density < 0.05))
    for latent in np.random.default_rng(0).permutation(seldom)[:20]:
        print(f"latent {latent}, density {density[latent]:.4f}")
        for place in found["top_place"].values[latent, :4]:
            if place >= 0:
                row, at = divmod(int(place), LENGTH)
                before = tokenizer.decode(held_out[row, max(0, at - 9) : at])
                print(f"    {before!r} >> {tokenizer.decode(held_out[row, at : at + 1])!r}")


if __name__ == "__main__":
    main()
