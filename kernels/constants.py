"""Numbers that the kernels share with what prepares their inputs and bounds their errors."""

from __future__ import annotations

# a vector shorter than this is divided by it, and not by its length, when it is normalized
LEAST_NORM = 1e-12
# the same for the gradient of a rotation, as its authors have it
LEAST_LENGTH = 1e-6
# codes in a group, whose scores are reduced together; and those of more than so many dimensions,
# where the dot product takes longer than comparisons, so that a finish may read fewer codes
GROUP = 8
WIDE_GROUP = 4
MAX_NARROW_DIM = 128
# codes are padded to a multiple of this many, which every tile divides
PAD_CODES = 256
# max |e_kd| is in [2⁹, 2¹⁰): the low planes stay above fp16's subnormals, and rows may be 64 times
# as far from the mean as codes before they overflow
EXPONENT = 10
# fp16's smallest normal number. What is smaller is set to zero, so that it does not matter whether
# the hardware flushes it.
MIN_NORMAL = 2.0**-14
# a bias in three inner columns: its parts are multiplied by these, each 2⁻¹¹ of the one before
BIAS_WEIGHTS = (2.0**15, 2.0**4, 2.0**-7)
# minus the score of padding: negative scores never win
PAD_OFFSET = 1.0
# factor over the first-order bound: second-order terms and the rounding of the bound itself
SLACK = 1.05
# codes whose mean is the centre: any point near the codes would do
SAMPLE = 128
# E² is rounded up to so many bits
NORM_BITS = 10
# rows of `CodePlanes.norms`, at most; a power of two
MOST_NORMS = 64
# parts that a large codebook is looked at in, at most; a power of two
MOST_PARTS = 256
