"""Every constant of the search: what it means, its unit, and where its value comes from."""

from __future__ import annotations

# What a series must have, and how it is cut into places.
# finite points; the least on which a slope, its change and a noise can all be estimated
FEWEST = 8
# places; more points are averaged in bins of equal width in log step (2^k bins a decade), see axis.py
MOST = 400

# last value over the third quartile from which a series has diverged: float32 keeps 7 digits, and a figure of such a
# value shows nothing else
DIVERGED = 1e6

# The noise (noise.py).
# places of a window in which the noise has one size: long enough to tell correlation from a smooth curve
SPAN = 24
# correlations from one checkpoint to the next that compete
PHIS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
# posterior quantile of the correlation that is used: an estimate errs towards noise, not towards events
CAUTION = 0.7
# variance of the smooth part over that of the noise, within a window
SHARES = (0.0, 1e-2, 1.0, 1e2, 1e4, 1e6, 1e8)
# tail at which a noise estimated from few degrees of freedom is widened, as a t quantile is
TAIL = 1e-2
# share of the range below which differences are rounding (float32 carries 6e-8)
EXACT = 1e-7
# series whose numbers of one window are in memory at once, 150 kB each: moves time alone
AT_ONCE = 64
# columns of a product that gives each series its own bits: as many as a processor's registers hold; moves time alone
WIDTH = 8
# noise sd by which one checkpoint must leave all four neighbours; the noise is the median of 24 changes
SPIKE = 7.0

# The windows and their null (windows.py).
# factor from one window size to the next: any size of event is met to within 15%
GROW = 1.3
# smallest p-value that is reported: a tail of 300 series says nothing further out
LEAST = 1e-6

# What counts as an event (chain.py).
# share of the range below which a change is not seen in a figure (half a millimetre in 5 cm)
SMALLEST = 0.01
# slopes that differ by less are one slope to a reader: 34 and 45 degrees. Values that scatter so many times as much as
# their errors have a jitter of their own, and a note says so
RATIO = 1.5
# decades over which a rise has half its top speed: between 1.06 (exp(-t)) and 1.53 (1 / (1 + t))
WIDEST = 1.27
# distance to a turn, in widths, from which a rise is more than its flank: .63 for a Gaussian, .75 a sine; from the end
# of its span .5 less
FLANK = 0.7
# of the range: what the flank of a turn must change to be an event of its own
SHARE = 0.1
# decades at half height up to which a rise that comes back is a bump: a factor of 4 in steps
NARROW = 0.6

# Smoothing, places and sizes (spline.py, measure.py).
# prior variances of the third derivative over a window of length 1
POWERS = tuple(10.0**k for k in range(-2, 11))
# places within a window at which the curve is evaluated, and more where its points lie closer together
GRID = 96
# points of a window that a spline follows; of more, half lie over all of it and half about the place that is looked at
MANY = 120
# draws of a curve, and of each family of drift: the ends of a 90% interval are the 10th draws
DRAWS = 200
# prior variance of the parabola within a window, for values of range 1: it is free
FREE = 1e4
# share of the range to which a curve is drawn: splines round a step between two checkpoints
RESOLVED = 1e-3

# Abruptness (abrupt.py).
# decades from t10 to t90: what takes longer is development, not a jump
LONGEST = 1.2

# What is said of an event (events.py).
# q-value up to which an event stands: about 5% of such events are expected to be false
MAX_Q = 0.05
# factor between the ends of an interval above which it is wide: it no longer places a transition
WIDE = 2.0
