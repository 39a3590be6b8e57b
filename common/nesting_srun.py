"""A launcher that each of several tasks of srun's starts for itself: noticed before anyone waits. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import UsageError
from common.node_list import expand_tasks
from common.rank import on_this_machine

SPECIAL_STEPS = 0xFFFFFFF0  # step numbers from here on are no srun's: salloc's shell, sbatch's script (slurm/slurm.h)
_MPIRUNS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_RANK")  # MPICH's and Open MPI's mpirun set them, srun does not


def in_a_step(environment: Mapping[str, str]) -> bool:
    """Whether srun has started this process, or one above it."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < SPECIAL_STEPS


def under_srun(launcher: str, environment: Mapping[str, str], nodes: int = 1, alone: bool = False) -> tuple[str, int]:
    """(the sentence, 0 in the one process that is to say it) about such a launcher; "" if all is well.

    Args:
        launcher: plain, spawn, torchrun, elastic, mpi or slurm.
        environment: this process's.
        nodes: how many it was told of (--nnodes); torchrun's variables tell that by themselves.
        alone: whether the communicator has this process only (mpi).
    """
    number = environment.get("SLURM_STEP_NUM_TASKS", "")
    if not in_a_step(environment) or not number.isdigit():
        return "", 0
    tasks, per_node = int(number), _tasks_per_node(environment)
    agent, mpirun = environment.get("TORCHELASTIC_RUN_ID"), any(environment.get(name) for name in _MPIRUNS)
    speaks = sum(int(environment.get(name) or 0) for name in ("SLURM_PROCID", *(["LOCAL_RANK"] if agent else [])))
    if launcher == "slurm":
        sentence = _instead_of_srun("torchrun" if agent else "mpirun" if mpirun else "")
    elif launcher == "mpi":
        sentence = _mpi(tasks, max(per_node), mpirun, alone)
    elif launcher in ("torchrun", "plain") and environment.get("RANK") and not agent:
        sentence = ""  # a rank of a group that was numbered by hand
    else:
        if launcher == "torchrun":
            nodes = _agents(environment, tasks)
        sentence = _starts_its_own(launcher, per_node, nodes)
    if sentence and launcher != "slurm":
        sentence += f" (or, if {tasks} runs are meant, srun … env -u SLURM_STEP_ID python …)"
    return sentence, speaks


def _instead_of_srun(inner: str) -> str:
    if not inner:
        return ""
    return (
        f"slurm.py under {inner}, which srun started: all of its ranks would take the number of srun's task; type srun python "
        "launchers/slurm.py, or srun with one task a node and torchrun … launchers/torchrun.py"
    )


def _mpi(tasks: int, on_one: int, mpirun: bool, alone: bool) -> str:
    if tasks > 1 and alone:
        return (
            f"srun started {tasks} tasks, and each is a world of its own to this MPI, to which srun has told nothing: type mpirun "
            "without srun, or srun --mpi=pmi2 (srun --mpi=list shows what there is)"
        )
    if on_one > 1 and mpirun:
        return f"srun started {tasks} tasks, several of them on one node, and each an mpirun of its own: type mpirun without srun"
    return ""


def _agents(environment: Mapping[str, str], tasks: int) -> int:
    """How many nodes torchrun was told of, where it is certain that it was one; else as many as there are tasks."""
    # --standalone names the run by a UUID, no flags at all meet at 127.0.0.1; an agent of several may be the first for a while.
    standalone = len(environment.get("TORCHELASTIC_RUN_ID", "")) >= 32 or on_this_machine(environment.get("MASTER_ADDR"))
    return 1 if standalone and environment.get("GROUP_WORLD_SIZE") == "1" else tasks


def _starts_its_own(launcher: str, per_node: list[int], nodes: int) -> str:
    tasks, there = sum(per_node), len(per_node)
    program = launcher if launcher == "torchrun" else f"{launcher}.py"
    each = "would train alone, or start ranks of its own" if launcher == "plain" else "would start ranks of its own"
    if max(per_node) > 1:
        return (
            f"srun started {program} {tasks} times, several of them on one node, and each {each}: type srun python "
            f"launchers/slurm.py, or srun -N{there} -n{there} for one {program} a node"
        )
    if tasks > 1 and nodes == 1:
        return (
            f"srun started {program} on {tasks} nodes, and each was told of one node only, and {each}: type srun python "
            f"launchers/slurm.py, or give --nnodes={tasks} and where they meet (launchers/slurm_job.sh shows how)"
        )
    return ""


def _tasks_per_node(environment: Mapping[str, str]) -> list[int]:
    """The tasks of this step on each node; one 0 where its variables do not tell."""
    try:
        return expand_tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    except UsageError:
        return [0]
