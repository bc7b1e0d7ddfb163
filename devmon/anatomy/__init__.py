"""How to read the inside of a model that declares nothing about itself: logits, attention patterns, residual stream."""

from devmon.anatomy.attention import attention_patterns, stack_heads
from devmon.anatomy.forward import logits, next_token
from devmon.anatomy.residual import find_blocks, residual_stream

__all__ = ["attention_patterns", "find_blocks", "logits", "next_token", "residual_stream", "stack_heads"]
