"""When things happened: the phases of a run, counted from the start of the launcher's command."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

LAUNCHERS = {
    "torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate",
    "mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "prterun", "prted", "prte", "orterun", "orted",
    "srun", "slurmstepd",
}  # fmt: skip


def now() -> float:
    """Seconds on a clock that all processes of this machine share."""
    if hasattr(time, "CLOCK_BOOTTIME"):  # what /proc counts a process's start in
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the command's name; [0] is the state, [1] the parent."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def started_at(pid: int) -> float:
    """When a process started, on ``now``'s clock (10 ms resolution; proc(5), field 22). OSError where there is no /proc."""
    return int(_stat(pid)[19]) / os.sysconf("SC_CLK_TCK")


def is_launching(argv: Sequence[str]) -> bool:
    """Whether a command line starts ranks: a launcher's program, or Python running one of launchers/ or its children."""
    if not argv:
        return False
    program = Path(argv[0]).name
    if program in LAUNCHERS:
        return True
    if not program.startswith("python"):
        return False
    words = iter(argv[1:])
    for word in words:
        if word in ("-m", "-c"):  # a module's name, or a program: multiprocessing starts its children with one
            what = next(words, "")
            return what in LAUNCHERS or "multiprocessing" in what
        if word in ("-X", "-W"):
            next(words, None)
        elif not word.startswith("-"):  # the script; what follows is its own business
            path = Path(word)
            return path.name in LAUNCHERS or (path.suffix == ".py" and path.parent.name == "launchers")
    return False


def launching_ancestors(pid: int | None = None) -> list[int]:
    """The chain of processes that started this one in order to launch it, nearest first; empty where there is no /proc."""
    chain: list[int] = []
    try:
        parent = int(_stat(pid or os.getpid())[1])
        while parent > 1:
            argv = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            if not is_launching(argv):
                break
            chain.append(parent)
            parent = int(_stat(parent)[1])
    except (OSError, ValueError, IndexError):
        pass
    return chain


def command_started() -> float | None:
    """When the launcher's command started: its outermost launching ancestor's start, or this process's if it has none.

    None where the system does not tell (no /proc): better no launch time than one that leaves out the launcher.
    """
    try:
        return started_at(([os.getpid(), *launching_ancestors()])[-1])
    except OSError:
        return None


class Phases:
    """Marks of one rank, in seconds since the launcher's command started."""

    def __init__(self, started: float | None) -> None:
        """Counts from ``started`` (``now``'s clock); where that is unknown, from here."""
        self.origin = now() if started is None else started
        self.known = started is not None
        self.marks: dict[str, float] = {}

    def mark(self, name: str) -> float:
        """Notes that ``name`` has just ended; returns the seconds since the command's start."""
        self.marks[name] = now() - self.origin
        return self.marks[name]
