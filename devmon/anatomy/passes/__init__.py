"""One pass of the model for all that is read of the same inputs: what is asked, what is shown, who shares."""

from devmon.anatomy.passes.plan import Plan, need_causal, read, read_one
from devmon.anatomy.passes.reads import TOGETHER, Read, Seen
from devmon.anatomy.vocabulary import chunks, log_softmax, products

__all__ = ["TOGETHER", "Plan", "Read", "Seen", "chunks", "log_softmax", "need_causal", "products", "read", "read_one"]
