"""A launcher that each of several tasks of srun's starts for itself: noticed before anyone waits. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import UsageError
from common.node_list import expand_nodes, expand_tasks
from common.rank import on_this_machine

SPECIAL_STEPS = 0xFFFFFFF0  # step numbers from here on are no srun's: salloc's shell, sbatch's script (slurm/slurm.h)
_MPIRUNS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_RANK")  # MPICH's and Open MPI's mpirun set them, srun does not


def in_a_step(environment: Mapping[str, str]) -> bool:
    """Whether srun has started this process, or one above it."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < SPECIAL_STEPS


def under_srun(launcher: str, environment: Mapping[str, str], nodes: int = 1, world_size: int | None = None) -> tuple[str, int]:
    """(the sentence, 0 in the one process that is to say it) about such a launcher; "" if all is well.

    Args:
        launcher: plain, spawn, torchrun, elastic, mpi or slurm.
        environment: this process's.
        nodes: how many it was told of (--nnodes); torchrun's variables tell that by themselves.
        world_size: how many ranks it was told of, as far as that is known: mpi: the communicator's size; plain: 1 if it is alone.
    """
    number = environment.get("SLURM_STEP_NUM_TASKS", "")
    if not in_a_step(environment) or not number.isdigit():
        return "", 0
    tasks, here = int(number), _tasks_here(environment)
    agent, mpirun = environment.get("TORCHELASTIC_RUN_ID"), any(environment.get(name) for name in _MPIRUNS)
    speaks = sum(int(environment.get(name) or 0) for name in ("SLURM_PROCID", *(["LOCAL_RANK"] if agent else [])))
    if launcher == "slurm":
        sentence = _instead_of_srun("torchrun" if agent else "mpirun" if mpirun else "")
    elif launcher == "mpi":
        sentence = _mpi(tasks, here, mpirun, world_size)
    elif launcher in ("torchrun", "plain") and environment.get("RANK") and not agent:
        sentence = ""  # a rank of a group that was numbered by hand
    else:
        if launcher == "torchrun":
            nodes = _agents(environment, tasks)
        sentence = _starts_its_own(launcher, tasks, here, nodes, world_size)
    if sentence and launcher != "slurm":
        sentence += f" (or, if {tasks} runs are meant, srun … env -u SLURM_STEP_ID python …)"
    return sentence, speaks


def _instead_of_srun(inner: str) -> str:
    if not inner:
        return ""
    return (
        f"slurm.py under {inner}, which srun started: all of its ranks would take the number of srun's task; type srun python "
        "launchers/slurm.py, or srun --ntasks-per-node=1 torchrun … launchers/torchrun.py"
    )


def _mpi(tasks: int, here: int, mpirun: bool, world_size: int | None) -> str:
    if tasks > 1 and world_size == 1:
        return (
            f"srun started {tasks} tasks, and each is a world of its own to this MPI, to which srun has told nothing: type mpirun "
            "without srun, or srun --mpi=pmi2 (srun --mpi=list shows what there is)"
        )
    if here > 1 and mpirun:
        return f"srun started {here} tasks on this node, and each an mpirun of its own: type mpirun without srun"
    return ""


def _agents(environment: Mapping[str, str], tasks: int) -> int:
    """How many nodes torchrun was told of, where it is certain that it was one; else as many as there are tasks."""
    # --standalone names the run by a UUID, no flags at all meet at 127.0.0.1; an agent of several may be the first for a while.
    standalone = len(environment.get("TORCHELASTIC_RUN_ID", "")) >= 32 or on_this_machine(environment.get("MASTER_ADDR"))
    return 1 if standalone and environment.get("GROUP_WORLD_SIZE") == "1" else tasks


def _starts_its_own(launcher: str, tasks: int, here: int, nodes: int, world_size: int | None) -> str:
    program = launcher if launcher == "torchrun" else f"{launcher}.py"
    if tasks > 1 and launcher == "plain" and world_size == 1:
        return f"srun started plain.py {tasks} times, and each would train alone: type srun python launchers/slurm.py"
    if here > 1:
        return (
            f"srun started {program} {here} times on this node, and each would start ranks of its own: type srun "
            f"--ntasks-per-node=1 for one {program} a node, or srun python launchers/slurm.py"
        )
    if tasks > 1 and nodes == 1:
        return (
            f"srun started {program} {tasks} times, and each was told of one node only: give --nnodes={tasks} and where they meet "
            "(launchers/slurm_job.sh shows how), or type srun python launchers/slurm.py"
        )
    return ""


def _tasks_here(environment: Mapping[str, str]) -> int:
    """The tasks of this step on this node; 0 where its variables do not tell."""
    try:
        nodes = expand_nodes(environment.get("SLURM_STEP_NODELIST", ""))
        tasks = expand_tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        return dict(zip(nodes, tasks, strict=False)).get(environment.get("SLURMD_NODENAME", ""), 0)
    except UsageError:
        return 0
