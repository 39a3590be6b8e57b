"""mpirun: an MPI starts the ranks; mpi4py says who is who; rank 0 tells the others where it listens.

mpirun -np 4 python launchers/mpi.py
mpirun -np 4 --hosts node1,node2 python launchers/mpi.py                    (MPICH; Open MPI: --host node1:2,node2:2)

mpirun
  `-- one helper per node (hydra_pmi_proxy or prted)
        |-- python mpi.py    rank = comm.rank, size = comm.size --.    broadcast of address and port,
        `-- python mpi.py    rank = comm.rank, size = comm.size --+--  then one process group
No RANK, no MASTER_ADDR: those are made here from the communicator.
"""

import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import parse_config
from common.config import MASTER_FLAGS, TrainConfig
from common.errors import UsageError, exit_status
from common.ports import PortReservation
from common.rank import Rank
from common.training import train

try:
    from mpi4py import MPI  # its import joins the MPI world (MPI_Init)
except (ImportError, RuntimeError) as missing:
    sys.exit(f"error: mpi4py cannot be used ({missing}); pip install mpi4py mpich, and use that environment's mpirun")

T = TypeVar("T")


def rank_from_mpi(comm: MPI.Intracomm, config: TrainConfig) -> tuple[Rank, PortReservation | None]:
    """The rank that ``comm`` says this process is, and on rank 0 its hold on the port."""
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)  # the ranks that share this node's memory
    leaders = comm.Split(0 if local.rank == 0 else 1)  # a node's index is its first rank's place among the nodes' first ranks
    node_rank = local.bcast(leaders.rank)
    port = together(comm, lambda: PortReservation(config.master_port) if comm.rank == 0 else None)
    address = config.master_addr or ("127.0.0.1" if local.size == comm.size else socket.gethostname())
    address, number = comm.bcast((address, port.port if port else 0))
    return Rank("mpi", comm.rank, comm.size, local.rank, local.size, node_rank, address, number), port


def together(comm: MPI.Intracomm, make: Callable[[], T]) -> T:
    """``make()`` on every rank; if it was refused on any, then on all, with the first rank's reason."""
    made, refusal = [], None
    try:
        made.append(make())
    except UsageError as error:
        refusal = str(error)
    if refusals := [reason for reason in comm.allgather(refusal) if reason]:
        raise UsageError(refusals[0])
    return made[0]


def main() -> None:
    """This process is one rank."""
    comm = MPI.COMM_WORLD
    config = together(comm, lambda: parse_config("mpi.py", __doc__ or "", MASTER_FLAGS))
    rank, port = rank_from_mpi(comm, config)
    with port or nullcontext():
        train(config, rank)


if __name__ == "__main__":
    status = exit_status(main, speaks=MPI.COMM_WORLD.rank == 0)
    if status not in (0, 2):
        MPI.COMM_WORLD.Abort(status)  # leaving with an exception would wait in MPI_Finalize for the others
    sys.exit(status)
