"""Folders of SAELens (`cfg.json`, `sae_weights.safetensors`), written and read, and those of sparsify, read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save
from torch import Tensor

from devmon.errors import DataError
from devmon.features.dictionary import Activation, Dictionary, Gate, Jump, Largest, Relu
from devmon.features.scaling import unit_rows
from devmon.features.sources import MLP_IN
from devmon.files import write_whole

WEIGHTS, SETTINGS, OF_SPARSIFY = "sae_weights.safetensors", "cfg.json", "sae.safetensors"
VERSION = "6.54.12"  # of the SAELens whose form is written; without one its loader takes files for those before 6

# Sites by the names of TransformerLens, whose `{}` is the layer.
HOOKS = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "neurons": "blocks.{}.mlp.hook_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    MLP_IN: "blocks.{}.ln2.hook_normalized",
}
# The tensors of each architecture beside W_enc, W_dec and b_dec.
TENSORS = {
    "standard": {"b_enc"},
    "topk": {"b_enc"},
    "jumprelu": {"b_enc", "threshold"},
    "gated": {"b_gate", "b_mag", "r_mag"},
    "transcoder": {"b_enc"},
    "skip_transcoder": {"b_enc", "W_skip"},
    "jumprelu_transcoder": {"b_enc", "threshold"},
    "jumprelu_skip_transcoder": {"b_enc", "threshold", "W_skip"},
}

# Their names by that of the activation and whether there is a skip.
TRANSCODERS = {
    ("standard", False): "transcoder",
    ("standard", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}


class Loaded(NamedTuple):
    """A dictionary of a folder, the site that it reads (None where that is none of ours), the folder's settings."""

    dictionary: Dictionary
    site: tuple[str, int] | None
    settings: dict[str, Any]


def save_dictionary(
    dictionary: Dictionary,
    folder: Path | str,
    site: tuple[str, int] | None = None,
    *,
    model_name: str = "",
    prepend_bos: bool = False,
    context_size: int | None = None,
    **metadata: Any,
) -> None:
    """Write a folder that SAELens loads (`SAE.load_from_disk`); `metadata`, such as the step, is kept in it.

    A dictionary trained by BatchTopK is one of thresholds, as SAELens has it. Raises DataError for crosscoders, and for
    transcoders whose activation SAELens does not have.
    """
    if not isinstance(dictionary, Dictionary) or dictionary.parts != 1:
        raise DataError("save_dictionary: SAELens has no form for dictionaries of several layers or snapshots")
    activation, form = dictionary.activation, dictionary
    tensors = {"W_enc": form.W_enc, "W_dec": form.W_dec, "b_dec": form.b_dec, "b_enc": form.b_enc}
    settings: dict[str, Any] = {}
    if isinstance(activation, Largest):
        name, settings = "topk", {"k": activation.k, "rescale_acts_by_decoder_norm": False}
    elif isinstance(activation, Jump):
        # What SAELens lets through has h > θ and h > 0.
        name, tensors["threshold"] = "jumprelu", activation.threshold.clamp(min=0)
    elif isinstance(activation, Gate):
        del tensors["b_enc"]
        shift = activation.shift + form.b_enc * activation.gain
        tensors |= {"b_gate": form.b_enc, "b_mag": shift, "r_mag": activation.gain.log()}
        name = "gated"
    else:
        name = "standard"
    if form.W_skip is not None or form.inputs != form.outputs or (not form.centred and (name, False) in TRANSCODERS):
        settings["d_out"] = form.outputs
        name = TRANSCODERS.get((name, form.W_skip is not None), f"{name} transcoder")
    if form.W_skip is not None:
        tensors["W_skip"] = form.W_skip.T
    if name not in TENSORS:
        raise DataError(f"save_dictionary: SAELens has no {name}: train it with ReLU, BatchTopK or JumpReLU")

    hook = "" if site is None else HOOKS[site[0]].format(site[1])
    about = {"sae_lens_version": VERSION, "model_name": model_name, "hook_name": hook, "prepend_bos": prepend_bos}
    about |= {"context_size": context_size, **metadata}
    settings |= {
        "architecture": name,
        "d_in": form.inputs,
        "d_sae": form.latents,
        "dtype": str(form.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": form.centred,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if site is not None and site[0] == "z" else "none",
        "metadata": about,
    }
    weights = {key: each.detach().cpu().contiguous() for key, each in tensors.items()}
    write_whole(Path(folder) / WEIGHTS, save(weights))
    write_whole(Path(folder) / SETTINGS, json.dumps(settings, indent=1).encode())


def load_dictionary(folder: Path | str) -> Loaded:
    """Read a folder written by SAELens (6, or before with flat settings), by `save_dictionary` or by sparsify.

    Raises DataError where a tensor or a setting is missing, which SAELens' loader replaces by a default, and for
    activations that are to be normalised first: fold that in before (`fold_activation_norm_scaling_factor`).
    """
    folder = Path(folder)
    names = WEIGHTS if (folder / WEIGHTS).exists() else OF_SPARSIFY
    for name in (SETTINGS, names):
        if not (folder / name).exists():
            raise DataError(f"{folder} has no {name}: a dictionary is a folder with {SETTINGS} and {WEIGHTS}")
    settings = json.loads((folder / SETTINGS).read_text())
    tensors = load_file(folder / names)
    if names == OF_SPARSIFY:
        return Loaded(_of_sparsify(folder, settings, tensors), None, settings)
    return Loaded(_of_saelens(folder, settings, tensors), _site(settings), settings)


def _of_saelens(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Dictionary:
    architecture = settings.get("architecture", "standard")
    if architecture not in TENSORS:
        raise DataError(f"{folder}: architecture {architecture!r} is none of {', '.join(TENSORS)}")
    needed = TENSORS[architecture] | {"W_enc", "W_dec", "b_dec"}
    if needed != set(tensors):
        raise DataError(
            f"{folder}: a {architecture} dictionary has the tensors {', '.join(sorted(needed))}; got "
            f"{', '.join(sorted(tensors))}: say in {SETTINGS} which architecture it is"
        )
    normalised = settings.get("normalize_activations", "none")
    if normalised not in ("none", None):
        raise DataError(
            f"{folder}: its activations are normalised first ({normalised}), by numbers that are not in the folder: "
            "fold them in (fold_activation_norm_scaling_factor) and save it again"
        )
    plain = {name: tensors[name] for name in ("W_enc", "W_dec", "b_dec")}
    activation: Activation = Relu()
    if architecture == "topk":
        activation = Largest(_required(folder, settings, "k"))
    elif "threshold" in tensors:
        activation = Jump(tensors["threshold"])
    elif architecture == "gated":
        gain = tensors["r_mag"].exp()
        activation = Gate(gain, tensors["b_mag"] - tensors["b_gate"] * gain)
    bias = tensors["b_gate"] if architecture == "gated" else tensors["b_enc"]
    centred = "transcoder" not in architecture and _required(folder, settings, "apply_b_dec_to_input")
    skip = tensors["W_skip"].T.contiguous() if "W_skip" in tensors else None
    found = Dictionary(**plain, b_enc=bias, activation=activation, W_skip=skip, centred=centred)  # type: ignore[arg-type]
    # Its scores count the decoder's rows as if they had length 1.
    return unit_rows(found) if settings.get("rescale_acts_by_decoder_norm") else found  # type: ignore[return-value]


def _of_sparsify(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Dictionary:
    if settings.get("activation", "topk") != "topk":
        raise DataError(f"{folder}: activation {settings['activation']!r} of sparsify is not read, 'topk' is")
    skip = tensors["W_skip"].T.contiguous() if "W_skip" in tensors else None
    return Dictionary(
        tensors["encoder.weight"].T.contiguous(),
        tensors["encoder.bias"],
        tensors["W_dec"],
        tensors["b_dec"],
        activation=Largest(_required(folder, settings, "k")),
        W_skip=skip,
        centred=not settings.get("transcode", False),
    )


def _required(folder: Path, settings: dict[str, Any], name: str) -> Any:
    if name not in settings:
        raise DataError(f"{folder}: {SETTINGS} has no {name!r}, which is not to be guessed: add it")
    return settings[name]


def _site(settings: dict[str, Any]) -> tuple[str, int] | None:
    """The site of the settings' hook, which stand flat in files of SAELens before 6."""
    hook = str(settings.get("metadata", {}).get("hook_name") or settings.get("hook_name") or "")
    for site, form in HOOKS.items():
        before, after = form.split("{}")
        if hook.startswith(before) and hook.endswith(after) and hook[len(before) : -len(after)].isdigit():
            return site, int(hook[len(before) : -len(after)])
    return None
