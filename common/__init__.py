"""What every launcher shares. Imported first of all, so that it can note when this process began to run Python."""

import os
import time


def now() -> float:
    """Seconds on a clock that all processes of this machine share."""
    if hasattr(time, "CLOCK_BOOTTIME"):  # what /proc counts a process's start in
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time()


interpreter_up = now()
"""When this process's interpreter was up; in a forked one, when it was forked."""


def _forked() -> None:
    global interpreter_up
    interpreter_up = now()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
