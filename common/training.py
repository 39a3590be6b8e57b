"""What every launcher calls in every process it starts. Imports no torch: who launched it, and who watches, is settled before."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import nullcontext

import common
from common import events
from common.config import TrainConfig
from common.debugging import shown
from common.endings import watched
from common.rank import Rank


def train(config: TrainConfig, rank: Rank, fit: Callable[[TrainConfig, Rank, events.Phases], None] | None = None) -> None:
    """Trains the job of ``config`` as ``rank``; with ``--inspect`` it looks at the ranks instead.

    ``fit`` does it where the loop is not ours.

    Raises:
        UsageError: the configuration does not fit this machine or these ranks (one process on its own only).
        SystemExit: 2 after a UsageError among several ranks, 1 after any other failure; it has been told of by then.
    """
    phases = events.Phases(events.command_started(rank.launchers))
    phases.mark("interpreter_up", common.interpreter_up)
    phases.mark("ranks_known", rank.known_at)
    if config.events:
        phases.write_to(config.events, rank, clock=events.clock_id())
    with watched(rank, phases.path), shown(rank.rank) if config.debug else nullcontext():
        there = "common.loop" in sys.modules  # in a forked process
        gc.disable()  # imports make objects and no garbage: looking for it takes 7 % of their time
        from common import loop

        gc.freeze()  # nor will there be garbage among them later
        gc.enable()
        phases.mark("torch_imported", common.interpreter_up if there else None)
        if fit:
            fit(config, rank, phases)
        elif config.inspect:
            from common.inspection import inspect

            inspect(config, rank)
        else:
            loop.run(config, rank, phases)
    # The interpreter's last collections would walk all that torch has made: 0.5 s of processor time a rank, for nothing.
    gc.freeze()
