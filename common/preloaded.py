"""What the forkserver imports before it forks a rank: all that the first step needs."""

import encodings.idna  # noqa: F401  for the names of hosts
import gc

import numpy.random  # noqa: F401  which NumPy and torch import when they are first asked for it

import common.training  # noqa: F401

# Collections in a rank would write into every object made here, and so copy the pages that ranks share.
gc.collect()
gc.freeze()
