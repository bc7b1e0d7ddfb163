"""Folders of SAELens and sparsify: those that the libraries wrote give what the libraries gave, and ours come back.

`written/` was made by sae-lens 6.54.12 and eai-sparsify 1.3.3, with random weights of 6 inputs and 10 latents, and
`expected.safetensors` holds 16 inputs and what each library made of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from devmon.errors import DataError
from devmon.features import Dictionary, Gate, Jump, Largest, Relu, load_dictionary, save_dictionary
from tests.features.test_dictionary import CODERS, dictionary, normal

WRITTEN = Path(__file__).parent / "written"
NAMES = sorted(path.name for path in WRITTEN.iterdir() if path.is_dir())
EXPECTED = load_file(WRITTEN / "expected.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_a_library_is_what_it_was_there(name: str) -> None:
    found = load_dictionary(WRITTEN / name)
    x = EXPECTED["x"]
    torch.testing.assert_close(found.dictionary.encode(x), EXPECTED[f"{name}.f"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.dictionary(x), EXPECTED[f"{name}.y"], rtol=1e-5, atol=1e-5)
    assert found.site == (None if name.startswith("sparsify") else ("mlp_out", 1))


@pytest.mark.parametrize("name", NAMES)
def test_the_keys_that_we_write_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    if "sparsify" in name or "rescaled" in name or "no_b_dec" in name:
        return
    found = load_dictionary(WRITTEN / name)
    save_dictionary(found.dictionary, tmp_path, found.site, model_name="tiny", context_size=24)
    assert {key: tuple(t.shape) for key, t in load_file(tmp_path / "sae_weights.safetensors").items()} == {
        key: tuple(t.shape) for key, t in load_file(WRITTEN / name / "sae_weights.safetensors").items()
    }
    ours, theirs = (json.loads((path / "cfg.json").read_text()) for path in (tmp_path, WRITTEN / name))
    theirs["metadata"].pop("sae_lens_training_version")
    assert ours == theirs


@pytest.mark.parametrize("name", [*(n for n in CODERS if n not in ("crosscoder", "cross-layer")), "topk"])
def test_ours_comes_back(name: str, tmp_path: Path) -> None:
    coder = dictionary(Largest(3)) if name == "topk" else CODERS[name]
    assert isinstance(coder, Dictionary)
    save_dictionary(coder, tmp_path / "a", ("resid_post", 3), step=700)
    again = load_dictionary(tmp_path / "a")
    x = normal(30, coder.inputs, seed=3)
    torch.testing.assert_close(again.dictionary(x), coder(x))
    torch.testing.assert_close(again.dictionary.encode(x), coder.encode(x))
    assert again.site == ("resid_post", 3)
    assert again.settings["metadata"]["step"] == 700


def test_heads_are_said_to_be_side_by_side(tmp_path: Path) -> None:
    save_dictionary(dictionary(Relu()), tmp_path, ("z", 0))
    assert json.loads((tmp_path / "cfg.json").read_text())["reshape_activations"] == "hook_z"


def test_flat_settings_of_before_are_read(tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "standard", tmp_path / "old")
    flat = {"d_in": 6, "d_sae": 10, "hook_name": "blocks.4.hook_resid_pre", "apply_b_dec_to_input": True}
    (tmp_path / "old" / "cfg.json").write_text(json.dumps(flat))
    found = load_dictionary(tmp_path / "old")
    assert found.site == ("resid_pre", 4)
    torch.testing.assert_close(found.dictionary(EXPECTED["x"]), EXPECTED["standard.y"])


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("topk", {"k": None}, "no 'k', which is not to be guessed"),
        ("standard", {"apply_b_dec_to_input": None}, "no 'apply_b_dec_to_input'"),
        ("jumprelu", {"architecture": None}, "a standard dictionary has the tensors"),
        ("gated", {"architecture": "jumprelu"}, "a jumprelu dictionary has the tensors W_dec"),
        ("standard", {"architecture": "temporal"}, "'temporal' is none of"),
        ("standard", {"normalize_activations": "expected_average_only_in"}, "fold them in"),
        ("sparsify", {"activation": "groupmax"}, "'groupmax' of sparsify is not read"),
    ],
)
def test_what_would_be_guessed_is_refused(name: str, change: dict[str, object], words: str, tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / name, tmp_path / "it")
    settings = json.loads((tmp_path / "it" / "cfg.json").read_text()) | change
    settings = {key: value for key, value in settings.items() if value is not None}
    (tmp_path / "it" / "cfg.json").write_text(json.dumps(settings))
    with pytest.raises(DataError) as error:
        load_dictionary(tmp_path / "it")
    assert words in str(error.value)


def test_a_missing_tensor_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "standard", tmp_path / "it")
    tensors = load_file(tmp_path / "it" / "sae_weights.safetensors")
    del tensors["b_enc"]
    save_file(tensors, tmp_path / "it" / "sae_weights.safetensors")
    with pytest.raises(DataError, match="b_dec, b_enc"):
        load_dictionary(tmp_path / "it")
    (tmp_path / "it" / "cfg.json").unlink()
    with pytest.raises(DataError, match="has no cfg.json"):
        load_dictionary(tmp_path / "it")


def test_what_the_library_has_no_form_for_is_refused(tmp_path: Path) -> None:
    crosscoder = CODERS["crosscoder"]
    assert isinstance(crosscoder, Dictionary)
    with pytest.raises(DataError, match="no form for dictionaries of several"):
        save_dictionary(crosscoder, tmp_path)
    with pytest.raises(DataError, match="no topk transcoder: train it with ReLU"):
        save_dictionary(dictionary(Largest(2), out=3), tmp_path)
    gate = Gate(torch.ones(7), torch.zeros(7))
    with pytest.raises(DataError, match="no gated transcoder"):
        save_dictionary(dictionary(gate, out=3), tmp_path)
    assert isinstance(CODERS["jump"].activation, Jump)
