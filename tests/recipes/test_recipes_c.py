"""The recipes on exact references, grammar, causal abstraction and contacts: fast forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.fast_form import check_fast_form


@pytest.mark.parametrize("name", ["markov_chains", "grammar", "hierarchical_equality", "protein_contacts"])
def test_the_fast_form_hits_its_numbers(name: str, tmp_path: Path) -> None:
    check_fast_form(name, tmp_path)
