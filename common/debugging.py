"""``--debug``: what PyTorch, NCCL and Python can tell when something goes wrong, switched on before torch is imported."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Iterator, MutableMapping

from common.endings import lost_a_peer
from common.errors import RunError, complain

VARIABLES = {
    # Not DETAIL: with torch 2.13 DDP over gloo ends with a segmentation fault then, in a bare script too.
    "TORCH_DISTRIBUTED_DEBUG": "INFO",
    "TORCH_CPP_LOG_LEVEL": "INFO",
    "TORCH_SHOW_CPP_STACKTRACES": "1",
    "NCCL_DEBUG": "INFO",
    "PYTHONFAULTHANDLER": "1",  # in the processes of a data loader too
}
CHOSEN = "LAUNCHLAB_DEBUG"  # which of them are ours: the ranks find them in an environment that their launcher had from us


def switch_on(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what is not set, for this process and those that it starts; SIGUSR1 shows from here on where it is."""
    if CHOSEN not in environment:
        ours = {name: value for name, value in VARIABLES.items() if name not in environment}
        environment.update(ours | {CHOSEN: ",".join(ours)})
    listen()


def listen() -> None:
    """A crash, SIGUSR1 and the watcher's SIGTERM show where this process is (faulthandler: it needs no interpreter that runs)."""
    with contextlib.suppress(ValueError, OSError, AttributeError):  # stderr is closed or no file; Windows has no register
        import faulthandler  # here: who does not debug does not import it

        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)


def chosen(environment: MutableMapping[str, str] = os.environ) -> str:
    """What ``--debug`` has set, and what it found set and left, in one line."""
    ours = set(environment.get(CHOSEN, "").split(","))
    parts = [f"{name}={environment.get(name, '')}" for name in VARIABLES if name in ours]
    kept = [f"{name}={environment.get(name, '')}" for name in VARIABLES if name not in ours]
    return f"--debug set {', '.join(parts) or 'nothing'}" + (f"; it left {', '.join(kept)}" if kept else "")


@contextlib.contextmanager
def shown(rank: int) -> Iterator[None]:
    """Around a rank's work: rank 0 says what was set, and where a rank was when it failed or was ended is shown.

    The sentence of the watcher suffices a user, so a rank that lost another, or waited for it in vain, else prints no traceback.
    """
    listen()
    with contextlib.suppress(ValueError, OSError, AttributeError):
        import faulthandler

        faulthandler.register(signal.SIGTERM, all_threads=True, chain=True)  # which the watcher sends to those that hang
    if rank == 0:
        complain(f"{chosen()}; kill -USR1 PID shows where a rank is, and so does its end")
    try:
        yield
    except (RunError, RuntimeError) as error:
        if isinstance(error, RunError) or lost_a_peer(error):
            complain(traceback.format_exc().rstrip())
        raise
