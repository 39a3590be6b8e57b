"""A process that has imported once what every rank needs; ranks are forked from it (multiprocessing's forkserver).

A forked rank shares the server's memory until it writes to it, and finds torch imported. The server itself runs nothing: threads
of OpenMP or autograd do not survive a fork (https://docs.pytorch.org/docs/stable/notes/multiprocessing.html#poison-fork).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from common.config import TrainConfig
from common.errors import UsageError, complain


def default_start_method() -> str:
    """The fork server on Linux while this process has no CUDA context; spawn elsewhere.

    macOS has it too, but its system libraries may start threads when they are loaded, which a fork does not survive
    (https://docs.python.org/3/library/multiprocessing.html#contexts-and-start-methods).
    """
    torch = sys.modules.get("torch")
    if sys.platform != "linux" or (torch and torch.cuda.is_initialized()):
        return "spawn"
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def check_start(launcher: str, method: str = "") -> None:
    """Refuses to start ranks where multiprocessing would fail, or hang.

    Args:
        launcher: who asks.
        method: the start method, once it is known.

    Raises:
        SystemExit: 2, in a process that is itself being started and imports the user's script for it; the first one says why.
        UsageError: a fork of a process whose threads the ranks would wait for.
    """
    process = multiprocessing.current_process()
    if getattr(process, "_inheriting", False):
        if process.name.endswith("-1"):
            frame, script = sys._getframe(), Path(sys.argv[0]).name
            while frame.f_back:
                frame = frame.f_back
                if frame.f_globals.get("__name__") == "__mp_main__":  # as multiprocessing imports it in each rank
                    script = Path(frame.f_code.co_filename).name
            complain(
                f"error: {script} starts ranks as soon as it is imported, and each rank imports it: put the call of {launcher} "
                'under if __name__ == "__main__":'
            )
        raise SystemExit(2)
    if method == "fork" and "torch" in sys.modules and _threads() > 1:
        raise UsageError(
            f"--start_method fork in a process that has imported torch and has {_threads()} threads: they do not survive a fork, "
            "and after a backward pass the ranks would wait for them for ever; give --start_method forkserver or spawn"
        )


def _threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


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
