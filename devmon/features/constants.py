"""The numbers of training a dictionary, with where they come from and what moves when they move."""

from __future__ import annotations

# λ of an L1 penalty over √d, with activations of mean norm √d: 5 at d = 768 (Anthropic, April 2024), 1 at d = 32.
# Larger is sparser, and shrinks what fires more.
L1_PER_ROOT_WIDTH = 0.18

# Weight of what dead latents explain of the error, beside the error itself (SAELens; OpenAI 1/32 of a normalised one).
AUXILIARY = 1.0

# Weight of the pull on dead latents while the learning rate falls: they come to fire seldom, and nothing else moves. On
# the planted dictionary 2% are dead instead of 49%, at the same error; from half of the steps on it costs 7% of it.
PULL = 0.1

# Of JumpReLU, without and with a target of L0: thresholds at the start and widths ε of the kernels, in units of scores
# (Anthropic, January 2025: .1 and 2; SAELens: .01 and .05). Narrower kernels are less biased and noisier.
JUMP_START = (0.1, 0.01)
JUMP_WIDTH = (2.0, 0.05)
TANH_SLOPE = 4.0  # of the count tanh(4 s), which is .96 at s = ½
REVIVAL = 3e-6  # of the pull on dead latents there

# Learning rate of Adam: 2e-4 at 16,384 latents and as 1 / √latents (2406.04093, Fig. 3), no more than 2e-3. Smaller
# ones want more steps.
RATE, RATE_LATENTS, MOST_RATE = 2e-4, 2**14, 2e-3
CLIP = 1.0  # norm of the gradient of all tensors together (SAELens, dictionary_learning)
WARM_UP = 0.05  # share of the steps over which a penalty grows to its full strength
DECAY = 0.2  # share of the steps, the last, over which the rate falls to 0
START_NORM = 1.0  # of the decoder's rows: at .1 (SAELens) BatchTopK finds 92% of 64 planted features, at 1 all

# Share of the steps without firing from which a latent counts as dead. Windows of libraries are 1e3 steps or 1e7
# tokens, which a short run hardly reaches.
DEAD_AFTER = 0.05
KEEP = 0.99  # of the least score at each step, when its mean is moved on (dictionary_learning: .999; SAELens: .99)

# What is told of a dictionary.
DENSE = 0.1  # share of places in which a dense latent fires (Gao et al. 2024 use .1 and .01)
TOP_PLACES = 10  # places of the largest activations that are kept of each latent
TOP_TOKENS = 10  # tokens of a latent's lens
BINS = (2, 4, 8, 16, 32, 64, 128, 256)  # of an activation, for its description length
BITS_TOLERANCE = 0.01  # share of the variance that bins may move
ANTIPODAL = -0.7  # cosine of two decoder rows that make a pair of opposites (Elhage et al. 2022: an ideal one is -1)
MOST_PAIRS = 4096  # latents of which pairs are counted
