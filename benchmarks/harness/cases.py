"""What is run: one launcher with so many ranks, as the command line that a user would type."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.runner import REPOSITORY
from common.errors import UsageError

LAUNCHERS = ("plain", "spawn", "torchrun", "mpi")
PEERS = ("tutorial",)  # the same job written the tutorial's way, to measure against


@dataclass(frozen=True)
class Case:
    """A launcher, its ranks, and the threads of each."""

    launcher: str
    world_size: int
    threads: int

    @property
    def name(self) -> str:
        """In a table or a legend."""
        return f"{self.launcher}, {self.world_size} rank{'s' * (self.world_size > 1)}"


def program(name: str) -> str:
    """The program that belongs to the running Python's environment, else the first on PATH.

    Raises:
        UsageError: there is none.
    """
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    if found := beside or shutil.which(name):
        return found
    raise UsageError(f"{name} is not installed: pip install -r requirements.txt, or leave its launcher out of --launchers")


@functools.cache
def is_open_mpi() -> bool:
    """Whether mpirun is Open MPI's, which refuses root and more ranks than cores, and binds each rank to one core."""
    told = subprocess.run([program("mpirun"), "--version"], capture_output=True, text=True, timeout=30, check=False)
    return any(name in told.stdout for name in ("Open MPI", "OpenRTE", "PRTE"))


def mpirun(ranks: str) -> tuple[list[str], dict[str, str]]:
    """(command line up to the program, variables to add) for so many ranks, as root too and with more ranks than cores."""
    words = [program("mpirun"), "-np", ranks]
    if not is_open_mpi():
        return words, {}
    return [*words, "--oversubscribe", "--bind-to", "none"], {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def command(case: Case, flags: list[str]) -> tuple[list[str], dict[str, str]]:
    """(command line, variables to add) that runs ``case`` with the training ``flags``."""
    python, n = sys.executable, str(case.world_size)
    flags = [*flags, "--threads", str(case.threads)]
    script = str(Path("launchers", f"{case.launcher}.py"))
    if case.launcher in ("plain", "spawn"):
        return [python, script, "--world_size", n, "--master_port", "0", *flags], {}
    if case.launcher in ("torchrun", "tutorial"):
        if case.launcher == "tutorial":
            script = str(Path("benchmarks", "tutorial_loop.py"))
        # --standalone takes a free port; OMP_NUM_THREADS only spares torchrun's notice, --threads counts.
        return [program("torchrun"), "--standalone", f"--nproc_per_node={n}", script, *flags], {
            "OMP_NUM_THREADS": str(case.threads)
        }
    if case.launcher == "mpi":
        words, variables = mpirun(n)
        return [*words, python, script, "--master_port", "0", *flags], variables
    raise UsageError(f"--launchers {case.launcher}: no such launcher; give some of {', '.join(LAUNCHERS + PEERS)}")


def shown(words: list[str]) -> str:
    """A command line as a person would type it in the repository's root."""
    out = []
    for word in words:
        path = Path(word)
        short = path.name if path.is_absolute() and path.parent == Path(sys.executable).parent else word
        out.append(short.replace(str(REPOSITORY) + "/", ""))
    return " ".join(out)
