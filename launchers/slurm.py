"""SLURM: srun starts the tasks on the nodes that it is granted; its variables say who is who.

srun -N2 -n4 python launchers/slurm.py
srun -K -N2 --ntasks-per-node=2 --cpus-per-task=4 python launchers/slurm.py    (-K: SLURM too ends all tasks when one fails)
sbatch launchers/slurm_job.sh                                                  (the same as a job that waits for its turn)

srun
  `-- slurmstepd, one per node
        |-- python slurm.py    SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NODELIST=lab[1-2] ... --.
        `-- python slurm.py    SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_STEP_NODELIST=lab[1-2] ... --+-- one process group
No RANK, no MASTER_ADDR: ranks meet on the first node of the list, at a port that all make from the numbers of job and step.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import parse_config
from common.config import MASTER_FLAGS, TrainConfig
from common.errors import UsageError, exit_status
from common.names import check_known
from common.nesting_srun import in_a_step, under_srun
from common.node_list import expand_nodes, expand_tasks
from common.ports import step_port
from common.rank import Rank, on_this_machine, rank_number
from common.training import train

NEEDED = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURMD_NODENAME")


def rank_from_slurm(environment: Mapping[str, str], config: TrainConfig) -> Rank:
    """The rank that srun's variables describe: https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES."""
    missing = [name for name in NEEDED if not environment.get(name)]
    if missing or not in_a_step(environment):
        if environment.get("SLURM_JOB_ID"):
            within = f"within job {environment['SLURM_JOB_ID']}"
            raise UsageError(f"not started by srun, though {within}: type srun python launchers/slurm.py")
        raise UsageError(f"{missing[0]} is not set: srun sets it; type srun -N2 -n4 python launchers/slurm.py")
    nodes = expand_nodes(environment.get("SLURM_STEP_NODELIST", ""), "SLURM_STEP_NODELIST")
    tasks = expand_tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", ""), "SLURM_STEP_TASKS_PER_NODE")
    here, world_size = environment["SLURMD_NODENAME"], rank_number(environment, "SLURM_STEP_NUM_TASKS")
    if here not in nodes or len(tasks) != len(nodes) or sum(tasks) != world_size:
        raise UsageError(
            f"{world_size} tasks, {environment['SLURM_STEP_TASKS_PER_NODE']} of them on {environment['SLURM_STEP_NODELIST']}, "
            f"and this on {here}: SLURM's variables do not belong to one step; start this with srun, and set none of them"
        )
    if len(nodes) > 1 and on_this_machine(config.master_addr):
        raise UsageError(
            f"--master_addr {config.master_addr} (or MASTER_ADDR) with {len(nodes)} nodes: to each node that is the node itself; "
            "leave it out: ranks then meet on the first node"
        )
    node_rank = nodes.index(here)  # SLURM_NODEID counts heterogeneous steps' nodes in another order than the lists have
    job, step = rank_number(environment, "SLURM_JOB_ID"), rank_number(environment, "SLURM_STEP_ID")
    local_rank, master = rank_number(environment, "SLURM_LOCALID"), config.master_addr or nodes[0]
    cpus_here = rank_number(environment, "SLURM_CPUS_ON_NODE", 0) // max(1, tasks[node_rank])
    return Rank(
        "slurm",
        rank=rank_number(environment, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=tasks[node_rank],
        node_rank=node_rank,
        master_addr=config.master_addr or (nodes[0] if len(nodes) > 1 else "127.0.0.1"),
        master_port=config.master_port or step_port(job, step),
        # Rank 0 may be on any node (--distribution=arbitrary), and only itself knows on which.
        serves_store=local_rank == 0 and here == (master if master in nodes else nodes[0]),
        store_prefix=f"{job}.{step}",
        cpus=rank_number(environment, "SLURM_CPUS_PER_TASK", max(1, cpus_here)),
    )


def main() -> None:
    """This process is one rank."""
    config = parse_config("slurm.py", __doc__ or "", MASTER_FLAGS)
    if nested := under_srun("slurm", os.environ)[0]:
        raise UsageError(nested)
    rank = rank_from_slurm(os.environ, config)
    check_known(rank.master_addr or "", "MASTER_ADDR" if config.master_addr else "the first node of SLURM_STEP_NODELIST")
    train(config, rank)


if __name__ == "__main__":
    sys.exit(exit_status(main, speaks=os.environ.get("SLURM_PROCID", "0") == "0"))
