"""Probe data: tokens as they lie in files, and those that a tokenizer of the series makes of texts and datasets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from devmon import DataError, Trajectory
from devmon.checkpoints.series import Series
from devmon.monitoring.fingerprint import describe
from devmon.offline.plan import Plan
from devmon.offline.probe_text import PIECE_CHARACTERS, Probe, read_probe
from devmon.offline.study import Study
from tests.anatomy.test_anatomy_sites import VOCAB, family
from tests.support.offline_toys import measure, text_of

TOKENS = torch.arange(40).reshape(4, 10)


def test_arrays_are_taken_as_they_are_or_their_first_part(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", TOKENS.numpy().astype(np.uint16))
    torch.save(TOKENS.int(), tmp_path / "b.pt")
    save_file({"anything": TOKENS}, tmp_path / "c.safetensors")
    for name in ("a.npy", "b.pt", "c.safetensors"):
        probe = read_probe(tmp_path / name, None)
        assert torch.equal(probe.tokens, TOKENS)
        assert torch.equal(probe.examples, TOKENS)
        assert probe.tokens.dtype == torch.int64
        assert torch.equal(read_probe(tmp_path / name, None, 2, 3).tokens, TOKENS[:2, :3])
    save_file({"one": TOKENS, "two": TOKENS.clone()}, tmp_path / "d.safetensors")
    with pytest.raises(DataError, match="one array"):
        read_probe(tmp_path / "d.safetensors", None)


def test_what_is_saved_is_read_again_under_the_name_of_its_content(tmp_path: Path) -> None:
    one, other = Probe(TOKENS, TOKENS[:1]), Probe(TOKENS, TOKENS[1:2])
    file = one.save(tmp_path / "probe")
    assert file == one.save(tmp_path / "probe")
    assert file != other.save(tmp_path / "probe")
    found = read_probe(file, None)
    assert torch.equal(found.tokens, one.tokens)
    assert torch.equal(found.examples, one.examples)


def test_text_becomes_tokens_in_an_order_that_is_always_the_same(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "texts").mkdir()
    for n in range(30):
        (tmp_path / "texts" / f"{n:02}.txt").write_text(text_of(range(n, n + 7)))
    place = (tokenizer, None)
    probe = read_probe(tmp_path / "texts", place, 5, 16, examples=6)
    assert (probe.tokens.shape, probe.examples.shape) == ((5, 16), (6, 16))
    stream = torch.cat([probe.tokens, probe.examples]).flatten().tolist()
    for start in range(0, len(stream) - 8, 8):  # documents of seven words, each with an end
        first = stream[start]
        assert stream[start : start + 8] == [*[(first + i) % (VOCAB - 1) for i in range(7)], VOCAB - 1]
    assert stream[::8] != sorted(stream[::8]), "the documents are not shuffled"
    assert not {*map(tuple, probe.tokens.tolist())} & {*map(tuple, probe.examples.tolist())}
    again = read_probe(tmp_path / "texts", place, 5, 16, examples=6)
    assert torch.equal(again.tokens, probe.tokens)
    assert torch.equal(read_probe(tmp_path / "texts", place, 5, 16).examples, probe.tokens)
    with pytest.raises(DataError, match=r"gives 240 tokens, 64 \+ 0 sequences of 256 need 16384"):
        read_probe(tmp_path / "texts", place)


def test_one_long_text_is_cut_into_pieces(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "text.md").write_text(text_of(range(2000)))
    probe = read_probe(tmp_path / "text.md", (tokenizer, None), 10, 8)
    starts = probe.tokens[:, 0].tolist()
    assert all((np.diff(row[1:].numpy()) % (VOCAB - 1) == 1).all() for row in probe.tokens), "a row is of one piece"
    assert len(set(starts)) > 5, "rows are of different pieces"
    pieces = len(text_of(range(2000))) // (PIECE_CHARACTERS * 8) + 1
    most = read_probe(tmp_path / "text.md", (tokenizer, None), 2 * pieces, 8).tokens
    assert most.shape == (2 * pieces, 8), "what is left of the pieces serves where there are too few"


def test_datasets_on_disk_give_their_tokens_or_their_text(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = [list(range(n, n + 8)) for n in range(20)]
    datasets.Dataset.from_dict({"other": ["x"] * 20, "input_ids": rows}).save_to_disk(str(tmp_path / "ready"))
    found = read_probe(tmp_path / "ready", None, 3, 8)
    assert sorted(map(int, found.tokens[:, 0])) != [0, 1, 2]
    assert all((np.diff(row.numpy()) == 1).all() for row in found.tokens)
    parts = {"train": ["w1 w1"] * 9, "validation": ["w2 w2 w2"] * 9}
    named = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
    datasets.DatasetDict(named).save_to_disk(str(tmp_path / "parts"))
    tokens = read_probe(tmp_path / "parts", (tokenizer, None), 2, 8).tokens
    assert tokens.flatten().tolist() == [2, 2, 2, VOCAB - 1] * 4
    datasets.Dataset.from_dict({"text": ["w3 " * 500] * 9}).save_to_disk(str(tmp_path / "long"))
    tokens = read_probe(tmp_path / "long", (tokenizer, None), 8, 16).tokens
    assert tokens.flatten().tolist() == [3] * 128, "each sequence is of another row"
    tokens = read_probe(tmp_path / "long", (tokenizer, None), 12, 16).tokens.flatten().tolist()
    assert tokens[: 9 * 16] == [3] * 144
    assert VOCAB - 1 in read_probe(tmp_path / "long", (tokenizer, None), 40, 16).tokens.flatten().tolist()
    datasets.Dataset.from_dict({"label": [1]}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(DataError, match="has the columns label"):
        read_probe(tmp_path / "none", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_probe(tmp_path / "ready", None)


def test_what_makes_no_tokens_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words " * 100)
    with pytest.raises(DataError, match="no tokenizer lies with the series: give --tokenizer"):
        read_probe(tmp_path / "text.txt", None)
    with pytest.raises(DataError, match="the tokenizer .*nowhere cannot be had"):
        read_probe(tmp_path / "text.txt", (str(tmp_path / "nowhere"), None))
    with pytest.raises(DataError, match="there is no text at"):
        read_probe(tmp_path / "none.txt", None)


def test_the_tokenizer_of_a_series_lies_beside_its_checkpoints_or_in_them(tmp_path: Path, tokenizer: str) -> None:
    for step in (0, 10, 20):
        family("gpt_neox", step).save_pretrained(tmp_path / f"step{step}")
    assert Series.open(tmp_path).tokenizer() is None
    for folder in (tmp_path / "step10", tmp_path):
        (folder / "tokenizer.json").write_bytes(Path(tokenizer, "tokenizer.json").read_bytes())
        assert Series.open(tmp_path).tokenizer() == (str(folder), None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    """A series with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("saved")
    for seed, step in enumerate((0, 100)):
        family("gpt_neox", seed).save_pretrained(folder / "hf" / f"step{step}")
    for file in Path(tokenizer).iterdir():
        (folder / "hf" / file.name).write_bytes(file.read_bytes())
    (folder / "text.txt").write_text(text_of(range(3000)))
    return folder


def given(saved: Path, run: Path) -> list[Any]:
    return [saved / "hf", "--into", run, "--preset", "economy", "--tokens", saved / "text.txt", "--sequences", 4,
            "--length", 12, "--watch", "loss", "--watch", "llc", "--llc", "nbeta=30", "--llc", "gamma=300", "--llc",
            "lr=1e-5", "--llc", "draws=3", "--llc", "burn_in=0", "--llc", "chains=2", "--llc", "batch_size=4",
            "--llc", "examples=6"]  # fmt: skip


def test_a_run_is_measured_on_text_that_is_frozen_and_hashed_into_it(saved: Path, tmp_path: Path) -> None:
    result = measure(*given(saved, tmp_path / "one.zarr"))
    assert result.exit_code == 0, result.output
    run = Trajectory(tmp_path / "one.zarr", "r")
    probe = read_probe(saved / "text.txt", (str(saved / "hf"), None), 4, 12, 6)
    (kept,) = run.attrs["measured"]
    assert (kept["tokens_held"], kept["examples_held"]) == (describe(probe.tokens), describe(probe.examples))
    assert kept["llc"][0] == "nbeta=30"
    assert run.steps("loss") == run.steps("llc") == [0, 100]
    assert run["llc"].sizes["chain"] == 2
    assert run["llc"].attrs["fields"]["data"] == describe(probe.examples)
    with pytest.raises(DataError, match="its settings are nbeta"):
        raise measure(*given(saved, tmp_path / "two.zarr"), "--llc", "gama=3").exception  # type: ignore[misc]
    probe_of = {"preset": "economy", "tokens": str(saved / "text.txt"), "sequences": 4, "length": 12}
    places = {"series": str(saved / "hf"), "into": str(tmp_path / "one.zarr")}
    plan = Plan.read(None, places | probe_of | {"watch": ["loss"]})
    frozen = Study(plan).frozen()
    assert Path(str(frozen.tokens)).parent == tmp_path / "one.zarr" / "_probe"
    assert Study(frozen).missing() == {}, "of another identity"
    assert sorted(Trajectory(tmp_path / "one.zarr", "r")) == ["llc", "loss"], "taken for a watch"
