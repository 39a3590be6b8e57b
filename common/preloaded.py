"""What the forkserver imports before it forks a rank: all that the first step needs."""

import gc

import common.training  # noqa: F401

# Collections in a rank would write into every object made here, and so copy the pages that ranks share.
gc.collect()
gc.freeze()
