"""A process that has imported once what every rank needs; ranks are forked from it (multiprocessing's forkserver).

A forked rank shares the server's memory until it writes to it, and finds torch imported. The server itself runs nothing: threads
of OpenMP or autograd do not survive a fork (https://docs.pytorch.org/docs/stable/notes/multiprocessing.html#poison-fork).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from common.config import TrainConfig


def default_start_method() -> str:
    """The fork server on Linux while this process has no CUDA context; spawn elsewhere.

    macOS has it too, but its system libraries may start threads when they are loaded, which a fork does not survive
    (https://docs.python.org/3/library/multiprocessing.html#contexts-and-start-methods).
    """
    torch = sys.modules.get("torch")
    if sys.platform != "linux" or (torch and torch.cuda.is_initialized()):
        return "spawn"
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def start_server(config: TrainConfig, *modules: str) -> None:
    """Starts the server and returns at once: it imports, and loads the data of ``config``, while this process goes on.

    Args:
        config: what the ranks will be told.
        modules: more than every rank needs: what the ranks of this launcher else would import, each of them.
    """
    folder = Path.cwd()
    data = ["common.preload_digits"] if config.dataset == "digits" else []
    forkserver.set_forkserver_preload(["common.preloading", *modules, *data, "common.preloaded"])
    # The server looks for modules in its current folder only (before Python 3.14); the ranks go back to this one.
    os.chdir(Path(__file__).resolve().parents[1])
    resource_tracker.ensure_running()  # first: it unblocks SIGINT
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # in the server until it can ignore it
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.chdir(folder)
