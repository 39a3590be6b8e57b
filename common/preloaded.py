"""What the fork server imports before it forks a rank: all that the first step needs."""

import gc

gc.disable()  # as common.training does
import common.loop  # noqa: E402, F401

gc.freeze()  # a collection in a rank would write into every object made here, and so copy the pages that ranks share
gc.enable()
