"""What a tokenizer tells: real tokens, padding, and inflections of common words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from devmon.data.words import case_map, unpadded, vocabulary, word_tasks
from devmon.errors import DataError
from tests.support.tokenizers import STEMS, Words


def test_special_padding_and_missing_tokens_are_not_real() -> None:
    tokenizer = Words()
    known = vocabulary(tokenizer)
    assert (known.bos, known.pad) == (1, 2)
    assert {0, 2, 3} <= set(known.exclude)
    assert 1 not in known.exclude
    assert known.size == max(tokenizer.get_vocab().values()) + 1
    assert tokenizer.hole in known.exclude, "an id that no token has"
    with pytest.raises(DataError, match="expected a tokenizer of transformers"):
        vocabulary("gpt2")


def test_a_tokenizer_of_transformers() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", "Ġcat", "Ġcats", "ĠCat"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<unk>")), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    known = vocabulary(tokenizer)
    assert (known.size, known.bos, known.pad, known.exclude) == (7, 1, 6, (0, 2, 6))
    assert case_map(tokenizer).tolist() == [-1, -1, -1, 5, -1, -1, -1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_cut_off(side: str) -> None:
    rows = [[5] * n + [0] * (8 - n) for n in (8, 6, 6, 7, 2)]
    rows = [row[::-1] for row in rows] if side == "left" else rows
    cut = unpadded(torch.tensor(rows), 0)
    assert cut.shape == (4, 6)
    assert (cut == 5).all()
    inside = torch.tensor([[5, 0, 5, 5], [5, 5, 0, 5]])
    assert torch.equal(unpadded(inside, 0), inside), "a pad token within the text is text"
    assert torch.equal(unpadded(torch.tensor(rows), None), torch.tensor(rows))
    with pytest.raises(DataError, match="padding"):
        unpadded(torch.tensor([[5] * n + [0] * (100 - n) for n in (100, 50, 33, 25, 20, 16, 14, 12)]), 0)


def test_word_tasks_are_inflections_and_their_shuffled_twins() -> None:
    tokenizer = Words()
    made = word_tasks(tokenizer, prompts=6, shots=3, seed=1, bos=1)
    text = {token: name for name, token in tokenizer.get_vocab().items()}
    forms: dict[int, set[str]] = {}
    for row, other, answer, task in zip(
        made.prompts.tolist(), made.shuffled.tolist(), made.answer.tolist(), made.task.tolist(), strict=True
    ):
        words = [text[token] for token in row]
        assert words[0] == "<s>"
        assert words[2::4] == [":"] * 4
        assert words[4::4] == ["\n"] * 3
        assert words[1::4] == [text[token] for token in other[1::4]]
        assert sorted(words[3::4]) == sorted(text[token] for token in other[3::4])
        assert all(a != b for a, b in zip(row[3::4], other[3::4], strict=True))
        assert words[-2] not in words[1:-2]
        for word, form in [*zip(words[1:-2:4], words[3::4], strict=True), (words[-2], text[answer])]:
            stem = word.removeprefix("Ġ")
            assert stem in STEMS
            forms.setdefault(task, set()).add(form.removeprefix("Ġ").lower().removeprefix(stem) or "capital")
    assert sorted(map(sorted, forms.values())) == [["capital"], ["ed"], ["s"]]
    assert made == word_tasks(tokenizer, prompts=6, shots=3, seed=1, bos=1) != word_tasks(tokenizer, prompts=6, shots=3)
    with pytest.raises(DataError, match="word_tasks needs two of capital, plural"):
        word_tasks(tokenizer, shots=30)


def test_common_words_come_first_and_have_single_tokens() -> None:
    tokenizer: Any = Words()
    mapping = case_map(tokenizer)
    known = tokenizer.get_vocab()
    for stem in STEMS:
        assert int(mapping[known[f"Ġ{stem}"]]) == known[f"Ġ{stem.capitalize()}"]
    assert int((mapping >= 0).sum()) == len(STEMS)
