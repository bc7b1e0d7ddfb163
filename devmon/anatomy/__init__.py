"""How to read and write the inside of a model: sites by name, weights by head, attention patterns, residual stream."""

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.attention import attention_patterns, layer_patterns, stack_heads
from devmon.anatomy.forward import forward, logits, next_token
from devmon.anatomy.frozen_norm import FrozenNorm
from devmon.anatomy.layout import Layout
from devmon.anatomy.passes.kept import activations, predictions, stream
from devmon.anatomy.proposing.propose import Proposal, anatomy_of
from devmon.anatomy.residual import find_blocks, residual_stream
from devmon.anatomy.sites import Reads

__all__ = [
    # models whose parts are known or declared
    "Anatomy",
    "FrozenNorm",
    "Layout",
    "Proposal",
    "Reads",
    "activations",
    "anatomy_of",
    # any model
    "attention_patterns",
    "find_blocks",
    "forward",
    "layer_patterns",
    "logits",
    "next_token",
    "predictions",
    "residual_stream",
    "stack_heads",
    "stream",
]
