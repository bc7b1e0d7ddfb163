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

# Random vectors and Lanczos steps a vector for the density of the Hessian, and the most parameters that are taken one
# by one instead. A trace over k directions is known to √(2 / (k · probes)), and a function 1 / (a + gamma) of it to
# exp(−4 steps √(gamma / largest)). More moves cost.
PROBES, LANCZOS_STEPS, DENSE = 3, 32, 64

# Power iterations for the curvature at a distance from w*, each two gradients, and the most distances that are tried.
POWER_ROUNDS, SCALE_ROUNDS = 4, 8

# Of the largest curvature: below it a direction counts as flat. The third derivative enters a difference of gradients
# at 1e-8 of it.
ZERO_CURVATURE = 1e-7

# Relative to the root mean square weight: half the distance of the two gradients of a central difference. In float64
# rounding enters below 1e-10 and the third derivative at 1e-8.
DIFFERENCE_STEP = 1e-4

# Examples that stand for the data in the curvature, at most and at least, within a share of the calibration's budget. A
# part of the data has curvature of both signs in flat directions, by label noise: scales below that are lost.
CURVATURE_EXAMPLES, FEWEST_EXAMPLES, CURVATURE_SHARE = 2048, 64, 0.15

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

# A calibration's cost in examples' gradients over that of the estimate it is for. The estimate is made as long as that
# takes, so more means longer estimates of easy problems; less means larger gammas on hard ones.
BUDGET = 3.0

# Draws kept, draws of burn-in, and the least number of chains of a trial. More draws make smaller moves visible.
TRIAL_DRAWS, TRIAL_BURN_IN, TRIAL_CHAINS = 100, 100, 4

# How far the configurational temperature (1 in the law asked for) may be from 1, or its error where that is larger:
# below, the chains have not filled their flat directions; above, steps or minibatch noise have widened the law. Wider
# limits let smaller gammas count.
AT_REST = 0.15

# What the temperature exceeds 1 and its error by, from which lr is lowered on the way down: about the share that
# minibatch noise adds to λ̂ in a quadratic loss.
HEATED = 0.04

# How often lr and gamma are planned anew where trials are heated: each costs a long trial.
REPLANS = 2

# E[∇L·δ] / 2 E[ΔL] (1 where the loss is quadratic), its error given: below it the chains leave the basin of w*. Above
# the .75 at which a verdict says so: a refused estimate costs more than a gamma somewhat larger.
MIN_ANHARMONICITY = 0.8

# Standard errors of a paired difference below which two λ̂ are the same. A false alarm costs a factor √10 in lr.
SAME_SIGMAS = 3.0

# -- decisions of a calibration --------------------------------------------------------------------------------------

# Between the step sizes that are compared: half a decade. A finer ratio makes the moves of λ̂ smaller.
RATIO = 10**0.5

# gamma in units of the largest curvature of nbeta L: that of the trials for lr, where the search downwards begins, and
# where it ends. At the first, all directions relax in a few steps.
FIRST_GAMMA, LAST_GAMMA = 1 / RATIO, 1e-6

# Step sizes that are compared with the next smaller one before the smallest is taken as it is: three decades.
STEP_SIZES = 6

# Relaxation times of the slowest direction in the burn-in, and in the draws, of a trial for lr: fewer know their own
# error badly, and call a step too large by chance.
RELAXED = 10.0

# Of what is left of the budget: the most that the trials of the noise bias may take.
NOISE_SHARE = 0.25

# Step sizes, half a decade apart, that are considered from the largest sound one down where minibatch noise biases λ̂.
LOWER_LR = 5

# The temperature that the spectrum must promise for the longest estimate at a gamma, above the .9 that a verdict asks.
FILLED = 0.95

# Share of λ̂ that may be missing, as far as the spectrum and the fit can tell, where λ̂ counts as flat in gamma. What is
# missing is in the interval; beyond, λ̂ is a lower bound alone.
FLAT_WITHIN = 0.1

# Share of λ̂ that a scale may add that the Hessian does not have, a standard deviation: smaller trusts the Hessian more
# than the trials.
DEPARTURE = 0.3

# Resamplings of the trials for the interval of the fit.
RESAMPLINGS = 200

# Share of the tolerance, or of the error to come, that may be bias by minibatch noise: half of it leaves
# √(1 + ½²) = 1.12 times the error.
BIAS_SHARE = 0.5
