"""The last that a fork server imports before it forks ranks: what the first step would import, and the end of the preparations."""

import encodings.idna  # noqa: F401  for the names of hosts
import gc
import signal

import common.children  # noqa: F401  what a launcher file imports, which each rank runs once more
import common.loop  # noqa: F401
import common.ports  # noqa: F401
import common.training  # noqa: F401
import common.warm  # noqa: F401
from common.preloading import before

gc.freeze()  # a collection in a rank would write into every object made here, and so copy the pages that ranks share
gc.enable()
signal.signal(signal.SIGINT, before)
