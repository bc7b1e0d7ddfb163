"""Log-probabilities over a large vocabulary, a few places at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from devmon.data.probe import minibatches

# Bytes of the logits of one minibatch at most (or one sequence, where that has more): small beside the memory of any
# device, and the 1,300 places that a vocabulary of 50,000 leaves keep a processor busy. Numbers move by roundings.
LOGITS = 2**28
# Places of one product with the unembedding, with a fifth of these bytes of logits at most: BLAS takes half as long
# again for each of 128 places as for each of 256, and no less for more. Memory and time, not numbers, like the next.
PRODUCT = 512
# Bytes of the logits that are worked on together: they stay in a processor's cache, and the C allocator hands buffers
# below 32 MiB out again without new pages.
CHUNK = 2**23


def products(scores: Tensor) -> Iterator[slice]:
    """Slices that cover the places of logits (place, vocab), each good for a product with the unembedding."""
    return _slices(len(scores), min(PRODUCT, LOGITS // 5 // max(scores.shape[1] * scores.element_size(), 1)))


def few_enough(size: int) -> bool:
    """Whether so many bytes of probabilities may be held beside the logits of a minibatch: a sixteenth of them."""
    return size <= LOGITS // 16


def chunks(scores: Tensor) -> Iterator[slice]:
    """Slices that cover the places of logits (place, vocab), each with about `CHUNK` bytes of them; on a GPU, which has
    no such cache and waits for every start of a kernel, with a fifth of `LOGITS`."""
    size = CHUNK if scores.device.type == "cpu" else LOGITS // 5
    return _slices(len(scores), size // max(scores.shape[1] * scores.element_size(), 1))


def _slices(places: int, size: int) -> Iterator[slice]:
    return minibatches(places, max(1, size))


def log_softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in float32, or in float64 where the scores are."""
    return F.log_softmax(scores if scores.dtype == torch.float64 else scores.float(), -1)


def log_softmax_(model: nn.Module, scores: Tensor) -> Tensor:
    """`log_softmax` of the logits (batch, pos, vocab) that a model returned, in their own memory where it is theirs."""
    # A model may return a tensor that it keeps: a part of a larger one, or of a parameter.
    storage = scores.untyped_storage()
    kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alone = storage.nbytes() == scores.nbytes and storage.data_ptr() not in kept and scores.is_contiguous()
    in_place = alone and not scores.requires_grad and scores.dtype in (torch.float32, torch.float64)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    result = scores if in_place else torch.empty(scores.shape, dtype=dtype, device=scores.device)

    # a chunk at a time: log_softmax takes as much memory again as what it is given
    flat, given = result.view(-1, result.shape[-1]), scores.reshape(-1, scores.shape[-1])
    for at in chunks(flat):
        flat[at] = log_softmax(given[at])
    return result
