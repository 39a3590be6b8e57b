"""A Ctrl-C that is not lost: who swallows its exception gets it again.

Compiled modules swallow it: what Cython makes clears whatever is raised while the module registers its types, so that a Ctrl-C
in the 20 ms in which NumPy imports ``numpy.random`` was gone, in all ranks at once (1 of 50 that came as training began).
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

AGAIN_S = 0.5


def _on_its_way() -> bool:
    """Whether an interrupt is being handled: what cleans up after it must not be interrupted."""
    error = sys.exc_info()[1]
    while error and not isinstance(error, (KeyboardInterrupt, GeneratorExit)):
        error = error.__context__
    return error is not None


def _first(number: int, frame: FrameType | None) -> NoReturn:
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
    raise KeyboardInterrupt


def _again(number: int, frame: FrameType | None) -> None:
    if not _on_its_way():
        raise KeyboardInterrupt


@contextmanager
def insistent() -> Iterator[None]:
    """Within it, Ctrl-C raises KeyboardInterrupt every half second until that leaves the block; afterwards all is as before.

    Where Ctrl-C does something else than Python's default, that stays; so it does on Windows and beside the main thread.
    """
    ours = (
        hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    )
    if not ours:
        yield
        return
    signal.signal(signal.SIGALRM, _again)
    signal.signal(signal.SIGINT, _first)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is _first:
            signal.signal(signal.SIGINT, signal.default_int_handler)
