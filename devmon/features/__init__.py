"""Dictionaries of features: autoencoders, transcoders and crosscoders, their training, quality and files."""

from devmon.features.crosscoder import Crosscoded, crosscode, lengths, unembeddings
from devmon.features.dictionary import CrossLayer, Dictionary, Gate, Jump, Largest, Relu
from devmon.features.files import load_dictionary, save_dictionary
from devmon.features.objectives import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from devmon.features.sources import Held, Source, Streamed
from devmon.features.training import Trained, Training, train

__all__ = [  # noqa: RUF022 (in groups)
    # dictionaries in use
    "Dictionary",
    "CrossLayer",
    "Relu",
    "Largest",
    "Jump",
    "Gate",
    # what they are trained on
    "ReLU",
    "TopK",
    "BatchTopK",
    "JumpReLU",
    "Gated",
    "Matryoshka",
    # over snapshots
    "crosscode",
    "Crosscoded",
    "lengths",
    "unembeddings",
    # files
    "save_dictionary",
    "load_dictionary",
    # training
    "Training",
    "Trained",
    "train",
    "Source",
    "Held",
    "Streamed",
]
