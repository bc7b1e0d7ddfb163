from __future__ import annotations

from pathlib import Path

import pytest
import torch

from devmon import DataError
from devmon.data.text import read_text


def test_a_text_becomes_symbols_and_back(tmp_path: Path) -> None:
    words = "Über naïve café: 100%\tdone…\n" * 1000
    (tmp_path / "a.txt").write_text(words, encoding="utf-8")
    text = read_text(tmp_path / "a.txt")
    symbols = torch.cat([text.train, text.held_out])
    assert "".join(text.alphabet[i] for i in symbols) == words.replace("\t", "    ")
    assert len(text.held_out) == pytest.approx(len(symbols) / 10, abs=1)


def test_rare_characters_share_the_last_symbol(tmp_path: Path) -> None:
    common = "".join(chr(0x4E00 + i) for i in range(95)) * 300
    (tmp_path / "a.txt").write_text(common + "äöü", encoding="utf-8")
    text = read_text(tmp_path / "a.txt")
    assert len(text.alphabet) == 96
    assert text.held_out[-3:].tolist() == [95, 95, 95]
    assert 95 not in text.train


def test_a_folder_is_read_in_order_and_binaries_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("b" * 15_000)
    (tmp_path / "a.txt").write_text("a" * 15_000)
    (tmp_path / "c.bin").write_bytes(bytes(range(128, 256)) * 100)
    text = read_text(tmp_path)
    assert "".join(text.alphabet[i] for i in text.train[:1].tolist() + text.held_out[-2:-1].tolist()) == "ab"


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: p.write_text(""), lambda p: p.mkdir(), lambda p: p.write_bytes(b"\xff" * 99_999)]
)
def test_no_text_is_an_error_that_says_what_to_give(tmp_path: Path, make: object) -> None:
    path = tmp_path / "input.txt"
    make(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=r"input\.txt.*give a"):
        read_text(path)


def test_windows_are_pieces_of_their_part(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij" * 5000)
    text = read_text(tmp_path / "a.txt")
    windows = text.windows(50, 8, generator=torch.Generator().manual_seed(0), held_out=True)
    assert windows.shape == (50, 8)
    assert torch.equal((windows[:, 1:] - windows[:, :-1]) % 10, torch.ones(50, 7, dtype=torch.int64))
    again = text.windows(50, 8, generator=torch.Generator().manual_seed(0), held_out=True)
    assert torch.equal(windows, again)
