"""Two launchers, one within the other: each of the outer one's processes starts a run of its own. Noticed before anyone waits."""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import UsageError
from common.node_list import expand_nodes, expand_tasks
from common.rank import on_this_machine

_SPECIAL_STEPS = 0xFFFFFFF0  # no srun's: salloc's shell, sbatch's script (slurm/slurm.h)
_MPIRUNS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_RANK")  # MPICH's and Open MPI's mpirun set them, srun does not


def under_srun(environment: Mapping[str, str], launcher: str, nodes: int | None = None, world_size: int | None = None) -> str:
    """The sentence about a launcher that each of several tasks of srun's starts for itself; empty if all is well.

    Args:
        environment: this process's.
        launcher: its launcher: plain, spawn, torchrun, elastic, mpi or slurm.
        nodes: how many its launcher was told of (--nnodes); torchrun's variables tell that by themselves.
        world_size: ranks that it is among, as far as it knows (mpi: the communicator's size; plain: --world_size).
    """
    step, tasks = environment.get("SLURM_STEP_ID", ""), environment.get("SLURM_STEP_NUM_TASKS", "")
    if not step.isdigit() or not tasks.isdigit() or int(step) >= _SPECIAL_STEPS:
        return ""
    several, here = int(tasks), _tasks_here(environment)
    program = launcher if launcher == "torchrun" else f"{launcher}.py"
    agent, mpirun = environment.get("TORCHELASTIC_RUN_ID"), any(environment.get(name) for name in _MPIRUNS)
    unless = f"; if {several} runs are meant: srun … env -u SLURM_STEP_ID …"
    if launcher == "slurm":
        if agent or mpirun:
            inner = "torchrun" if agent else "mpirun"
            return (
                f"srun starts {inner}, which starts slurm.py: its ranks would all take the number of srun's task; type srun python "
                f"launchers/slurm.py, or srun --ntasks-per-node=1 torchrun … launchers/torchrun.py"
            )
        return ""
    if launcher == "mpi":
        if several > 1 and world_size == 1:
            return (
                f"srun started {several} tasks, and each is a world of one to its MPI, which does not understand srun: type mpirun "
                f"within the allocation, or srun --mpi=pmi2 (srun --mpi=list shows what there is){unless}"
            )
        if here > 1 and mpirun:
            return f"srun started {here} tasks on this node, and each an mpirun of its own: type mpirun without srun{unless}"
        return ""
    if launcher in ("torchrun", "plain") and environment.get("RANK") and not agent:
        return ""  # a rank of a group that was set by hand
    if launcher == "torchrun":
        # One node is all that an agent with --standalone, or with no flags, knows; with others it may be the first of several.
        alone = environment.get("GROUP_WORLD_SIZE") == "1" and (
            on_this_machine(environment.get("MASTER_ADDR")) or len(agent or "") >= 32  # --standalone's name is a UUID
        )
        nodes = 1 if alone else None
    if here > 1 and not (launcher == "plain" and world_size == 1):
        return (
            f"srun started {here} tasks on this node, and each a {program} of its own, with ranks of its own: type srun "
            f"--ntasks-per-node=1 for one {program} per node, or srun python launchers/slurm.py{unless}"
        )
    if several > 1 and launcher == "plain" and world_size == 1:
        return f"srun started plain.py {several} times, and each trains alone: type srun python launchers/slurm.py{unless}"
    if several > 1 and nodes == 1:
        return (
            f"srun started {several} tasks, and each a {program} that was told of one node only: give --nnodes {several} and where "
            f"they meet (launchers/slurm_job.sh shows it), or type srun python launchers/slurm.py{unless}"
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
