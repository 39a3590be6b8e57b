"""What is run: one launcher with so many ranks, as the command line that a user would type."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import machine, mpis
from benchmarks.harness.mpis import Mpi, program
from benchmarks.harness.runner import REPOSITORY
from common.command_line import parse_config
from common.errors import UsageError
from common.values import AS_SHIPPED

LAUNCHERS = ("plain", "spawn", "torchrun", "mpi")
ALL_LAUNCHERS = (*LAUNCHERS, "elastic", "slurm")
PEERS = ("tutorial", "hf_trainer")  # the same job in another loop, to measure against; torchrun starts it
FLOOR = "floor"  # no launcher: one interpreter makes one step
START_METHODS = ("spawn", "forkserver", "fork")


@dataclass(frozen=True)
class Case:
    """A launcher, its ranks, and the threads of each."""

    launcher: str
    world_size: int
    threads: int
    """AS_SHIPPED: what the launcher leaves; it may bind ranks to cores, too."""
    variant: str = ""
    """spawn's start method, or the MPI; empty: the default one."""

    @property
    def title(self) -> str:
        """The launcher with its variant: ``spawn (forkserver)``."""
        return f"{self.launcher} ({self.variant})" if self.variant else self.launcher

    @property
    def name(self) -> str:
        """In a table or a legend."""
        as_shipped = ", as shipped" if self.threads == AS_SHIPPED else ""
        return f"{self.title}, {self.world_size} rank{'s' * (self.world_size > 1)}{as_shipped}"


def variants(launcher: str) -> list[str]:
    """The variants of a launcher that are told apart, whether or not they are here."""
    if launcher == "spawn":
        return list(START_METHODS)
    if launcher == "mpi":
        return list(dict.fromkeys([*mpis.found(), *mpis.TESTED]))
    return [""]


def script_of(folder: str, name: str) -> str:
    """The path of a file that is run.

    Raises:
        UsageError: it is not there.
    """
    path = REPOSITORY / folder / f"{name}.py"
    if not path.is_file():
        raise UsageError(f"{folder}/{name}.py does not exist here: leave it out of --launchers")
    return str(path)


@functools.cache
def _srun() -> str:
    """The path of srun.

    Raises:
        UsageError: it is not installed, or no SLURM answers.
    """
    srun = program("srun")
    asked = subprocess.run([program("sinfo"), "--noheader"], capture_output=True, text=True, timeout=30, check=False)
    if asked.returncode:
        said = (asked.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UsageError(
            f"srun is here, but no SLURM ({said}): go to a cluster's login node, or type python -m common.virtual_cluster --slurm, "
            "or leave slurm out of --launchers"
        )
    return srun


def mpirun(ranks: str, mpi: Mpi | None = None, as_shipped: bool = False) -> tuple[list[str], dict[str, str]]:
    """(command line up to the program, variables to add) for so many ranks, as root too and with more ranks than cores.

    Args:
        ranks: how many.
        mpi: by default the one that a user of this environment gets.
        as_shipped: let it bind ranks to cores as it likes.
    """
    mpi = mpi or mpis.default()
    words, variables = [mpi.mpirun, "-np", ranks], {}
    if mpi.name == "Open MPI":  # it refuses root and more ranks than cores, and binds each rank to one core
        variables = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        if not as_shipped:
            words += ["--oversubscribe", "--bind-to", "none"]
        elif int(ranks) > machine.usable_cores():
            words += ["--oversubscribe"]
    return words, variables


def command(case: Case, flags: list[str]) -> tuple[list[str], dict[str, str | None]]:
    """(command line, variables to set, or to take away where None) that runs ``case`` with the training ``flags``.

    Raises:
        UsageError: the launcher, or a program that it needs, is not here.
    """
    python, n = sys.executable, str(case.world_size)
    shipped = case.threads == AS_SHIPPED
    variables: dict[str, str | None] = {"OMP_NUM_THREADS": None} if shipped else {}
    if case.launcher == FLOOR:
        config = dataclasses.replace(parse_config(FLOOR, argv=flags), threads=case.threads)
        return [python, script_of("benchmarks", FLOOR), json.dumps(dataclasses.asdict(config))], variables
    flags = [*flags, "--threads", "as_shipped" if shipped else str(case.threads)]
    if case.launcher not in ALL_LAUNCHERS + PEERS:
        raise UsageError(f"--launchers {case.launcher}: no such launcher; give some of {', '.join(ALL_LAUNCHERS + PEERS)}")
    if case.launcher == "hf_trainer" and importlib.util.find_spec("transformers") is None:
        raise UsageError("--launchers hf_trainer: transformers is missing; pip install -e '.[hf]' in this project's folder")
    script = script_of("benchmarks", "tutorial_loop") if case.launcher == "tutorial" else script_of("launchers", case.launcher)
    if case.launcher in ("plain", "spawn"):
        if case.variant:
            if case.variant not in multiprocessing.get_all_start_methods():
                raise UsageError(f"this system's Python has no start method {case.variant}: leave it out of --launchers")
            flags = ["--start_method", case.variant, *flags]
        return [python, script, "--world_size", n, "--master_port", "0", *flags], variables
    if case.launcher in ("torchrun", *PEERS):
        if not shipped:
            variables = {"OMP_NUM_THREADS": str(case.threads)}  # only spares torchrun's notice, --threads counts
        # --standalone takes a free port.
        return [program("torchrun"), "--standalone", f"--nproc_per_node={n}", script, *flags], variables
    if case.launcher == "elastic":
        return [python, script, "--nproc_per_node", n, *flags], variables
    if case.launcher == "slurm":
        return [_srun(), f"--ntasks={n}", python, script, *flags], variables
    mpi = mpis.named(case.variant)
    words, more = mpirun(n, mpi, shipped)
    return [*words, mpi.python, script, "--master_port", "0", *flags], variables | more


def shown(words: list[str]) -> str:
    """A command line as a person would type it in the repository's root."""
    out = []
    for word in words:
        path = Path(word)
        short = path.name if path.is_absolute() and path.parent == Path(sys.executable).parent else word
        out.append(short.replace(str(REPOSITORY) + "/", ""))
    return " ".join(out)
