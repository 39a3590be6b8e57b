"""Running torch-elastic's agent: quiet while the ranks' watcher speaks, and with one sentence for what it says in tracebacks."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common.children import in_words
from common.debugging import CHOSEN
from common.errors import RunError, complain, one_line
from common.interfaces import is_own, leads_back

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig


def meeting_place(host: str, port: int) -> str:
    """The endpoint to give the c10d rendezvous for ``host``: "localhost" where that is this machine.

    Whether to serve the store there it tells from this machine's own name only (torch 2.13). Where that is a loopback address,
    which Debian makes it, nobody would serve one that is given by its address or another name.
    """
    here = is_own(host) and (host == socket.gethostname() or not leads_back(host))
    return f"{'localhost' if here else host}:{port}"


def run_agent(launch: LaunchConfig, worker: Callable[..., int], *arguments: Any, where: str) -> int:
    """Calls ``elastic_launch(launch, worker)(*arguments)`` and returns the exit status of the run.

    That is the highest of what the workers returned, 1 after a failure that used up the restarts, 128 + N after signal N
    (https://docs.pytorch.org/docs/stable/elastic/agent.html).

    Args:
        launch: the agent's settings.
        worker: what runs in each process.
        arguments: for it.
        where: the nodes meet, as the user calls it.

    Raises:
        RunError: the nodes did not meet.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    for name in ("torch.distributed.elastic", "torch.multiprocessing") if CHOSEN not in os.environ else ():
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the ranks' watcher tells of a failure in one sentence
    try:
        statuses: dict[int, int] = elastic_launch(launch, worker)(*arguments)
        return max(statuses.values())
    except ChildFailedError as failed:
        # Whole seconds tell which came first, so several may; 1 and SIGTERM are how ranks leave once the watcher has told.
        untold = [(f.timestamp, r, f.exitcode) for r, f in failed.failures.items() if f.exitcode not in (1, -signal.SIGTERM)]
        if untold:
            _, rank, status = min(untold)
            complain(f"elastic.py: rank {rank} ended first, with {in_words(status)}.")
        return 1
    except (RendezvousError, DistError) as error:
        raise RunError(f"elastic.py: no group at {where}, where the nodes meet: {one_line(error)}") from None
    except SignalException as stopped:
        return 128 + stopped.sigval
    finally:
        gc.freeze()  # as in a rank: the interpreter's last collections would walk all of torch
