"""Every tuned number of the sampling part: its unit, its reason, and what moves when it moves.

What the calibration reaches with these is measured by `benchmarks/llc_accuracy.py` (the table at the end of
`docs/llc.md`): run that after a change of anything under "trials" or "decisions".
"""

# -- chains: cost, and the streams of random numbers -----------------------------------------------------------------

# Standard normals drawn in one call for one chain of a small model, to spare calls. It decides how a chain's stream is
# cut into calls, and with it the noise itself: another value gives other traces from the same seed.
NOISE_BLOCK = 8192

# Parameters whose noise, displacement and sums are in memory at once, for each chain: 4 MiB in float32. A multiple of
# 16, so that blocks of normals on the CPU are those of one call; on CUDA another value gives other traces from the same
# seed for models that are larger. Smaller saves memory, and on CUDA costs launches.
BLOCK = 2**20

# Parameters times numbers in a batch, by device. Below it time goes to dispatch and chains are stacked; above it to
# sums, and they take turns, with fused attention. Measured on one CPU core; on CUDA by arithmetic: a pass has 6
# operations for each, 1e11 at the limit, some 2 ms at 5e13 a second, which is what its launches take. Moves cost alone.
STACK_BELOW = {"cpu": 3e7, "cuda": 2e10}

# Share of an accelerator's free memory that chains may take with their weights, gradients and velocities: the rest is
# for activations. Where it is too much after all the group is halved, and starts again.
MEMORY_SHARE = 0.5

# Share of an accelerator's free memory that the examples may take. Larger data stay in main memory, and every minibatch
# is copied as it is met.
EXAMPLES_SHARE = 0.05

# Steps a chain of the paired trial that says how far the precision of passes moves λ̂, once in each precision; and the
# share of λ̂ from which that is worth a warning. More steps see rounding in the drift, beside that of the score.
PRECISION_STEPS, PRECISION_SHARE = 20, 0.05

# Standard deviations of the count of different numbers in a list, by which a list for one batch is longer than it must
# be in the mean: a list is too short in 1 of 1e9 batches, which is then drawn as a permutation. Moves the batches.
SPARE_SIGMAS = 6

# -- scales at w* ----------------------------------------------------------------------------------------------------

# Power iterations for the largest curvature, which comes out too low by a share of (second / first eigenvalue)^(2
# rounds); the first step size is then too large by the same share.
POWER_ROUNDS = 12

# Relative to the root mean square weight: half the distance of the two gradients of a central difference. In float64
# rounding enters below 1e-10 and the third derivative at 1e-8.
DIFFERENCE_STEP = 1e-4

# Examples that stand for the data in the curvature: at least the first, more while parameters times numbers in them
# stay below the second. Moves cost and the sampling error of the curvature.
CURVATURE_EXAMPLES, CURVATURE_WORK = 512, 1e8

# Examples of one pass where gradients over many are summed. Moves memory, and the last digit by rounding.
GRADIENT_CHUNK = 256

# Minibatches whose spread is the gradient noise at w*: its trace is known to about √(2 / (7 · effective directions)).
NOISE_BATCHES = 8

# Relative bias of λ̂ from which `estimate_llc` takes control variates unasked. They double the cost of a step.
NOISE_MATTERS = 0.01

# Draws of the localising Gaussian alone, for the scale inside the logarithm of a multiplicity: its logarithm is then
# known to about ±½, which moves a multiplicity of 2 by less than a fifth.
REACH_DRAWS = 8

# -- a choice without trials -----------------------------------------------------------------------------------------

# By how much the largest curvature may grow until lr is as large for it as it would be without a margin. Along a small
# language model it went up and down by 8. Larger is safer, and localises λ̂ in proportion.
CHOICE_MARGIN = 10.0

# Power iterations, and draws of each of two chains of a trial.
CHOICE_ROUNDS, CHOICE_TRIAL = 6, 50

# Relaxation times of the flattest direction in a burn-in: e^(−2·2) = 2% of the way is left for the spread then.
CHOICE_RELAXATIONS = 2.0

# Of λ̂: bias by minibatch noise from which control variates are taken. Half of what makes an estimate no level.
CHOICE_NOISE = 0.05

# -- trials of a calibration -----------------------------------------------------------------------------------------

# Draws kept, draws of burn-in, and the least number of chains of a trial. More draws make smaller moves visible.
TRIAL_DRAWS, TRIAL_BURN_IN, TRIAL_CHAINS = 100, 100, 4

# Steps a chain: the longest trial, however large `max_steps` is. It bounds the cost of a calibration.
LONGEST_TRIAL = 2000

# Configurational temperature (1 in the law asked for): below the first the chains have not filled their flat
# directions, above the second steps or minibatch noise have widened the law. Wider limits let smaller gammas count.
MIN_TRIAL_TEMPERATURE, MAX_TRIAL_TEMPERATURE = 0.8, 1.15

# E[∇L·δ] / 2 E[ΔL] (1 where the loss is quadratic): below it the chains have left the basin of w*. Lower lets smaller
# gammas count.
MIN_ANHARMONICITY = 0.75

# Standard errors of a paired difference below which two λ̂ are the same: the 90% interval.
SAME_SIGMAS = 1.645

# -- decisions of a calibration --------------------------------------------------------------------------------------

# Between the step sizes and the gammas that are compared: half a decade. A finer ratio makes moves smaller, so plateaus
# are found that are none; where the error is proportional to gamma, 1 / (ratio − 1) of the last move is left.
RATIO = 10**0.5

# gamma in units of the largest curvature of nbeta L: that of the trials for lr, and those tried for the localisation,
# from a third down to 3e-4.
GAMMA_FOR_LR = 0.1
GAMMAS = tuple(1 / RATIO**k for k in range(1, 8))

# Step sizes that are compared with the next smaller one before the smallest is taken as it is: three decades.
STEP_SIZES = 6

# Of the first step size: how far the trials of gamma may lower lr on account of minibatch noise.
LOWEST_LR = 0.1

# How often the error (or the tolerance, where that is larger) of the first gamma a later one may have, before the score
# of weights far from w* counts as noise.
ERROR_GROWTH = 2.5

# Times the least move of λ̂: the search for gamma ends at a move larger than the first, and the choice is the largest
# gamma whose move is below the second. Larger values search longer, and prefer larger gammas.
MOVE_TOO_FAR, MOVE_AS_GOOD = 1.5, 1.25

# Share of the tolerance, or of the error to come, that may be bias by minibatch noise: half of it leaves
# √(1 + ½²) = 1.12 times the error.
BIAS_SHARE = 0.5
