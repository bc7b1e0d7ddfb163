"""What a user's own instrument can be tested with: a contract to subclass, and models whose numbers are known."""

from devmon.testing.contract import InstrumentContract
from devmon.testing.handbuilt import AttentionOnly, Bigram, Readable, even, fixed_offset, induction

__all__ = ["AttentionOnly", "Bigram", "InstrumentContract", "Readable", "even", "fixed_offset", "induction"]
