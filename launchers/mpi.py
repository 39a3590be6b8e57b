"""mpirun: an MPI starts the ranks; mpi4py says who is who; rank 0 tells the others where it listens.

mpirun -np 4 python launchers/mpi.py
mpirun -np 4 --hosts node1,node2 python launchers/mpi.py                    (MPICH; Open MPI: --host node1:2,node2:2)

mpirun
  `-- one helper per node (hydra_pmi_proxy or prted)
        |-- python mpi.py    rank = comm.rank, size = comm.size --.    broadcast of address and port,
        `-- python mpi.py    rank = comm.rank, size = comm.size --+--  then one process group
No RANK, no MASTER_ADDR: those are made here from the communicator.
"""

import os
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
from common.nesting import check_mpirun
from common.ports import PortReservation
from common.rank import Rank
from common.reachability import Probe, reached, reached_by_all
from common.training import train

try:
    import mpi4py

    mpi4py.rc(initialize=False, finalize=True)  # its import would join the MPI world, also with another MPI's mpirun
    from mpi4py import MPI
except (ImportError, RuntimeError) as missing:
    sys.exit(f"error: mpi4py cannot be used ({missing}); pip install mpi4py mpich, and use that environment's mpirun")

T = TypeVar("T")


def rank_from_mpi(comm: MPI.Intracomm, config: TrainConfig) -> tuple[Rank, PortReservation | None]:
    """The rank that ``comm`` says this process is, and on rank 0 its hold on the port."""
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)  # the ranks that share this node's memory
    leaders = comm.Split(0 if local.rank == 0 else 1)  # a node's index is its first rank's place among the nodes' first ranks
    node_rank = local.bcast(leaders.rank)
    port = together(comm, lambda: PortReservation(config.master_port) if comm.rank == 0 else None)
    address = "127.0.0.1"
    if local.size < comm.size or config.master_addr:
        with Probe(config.master_addr) if comm.rank == 0 else nullcontext() as probe:
            told = comm.bcast(probe and probe.told)
            address = reached_by_all(told, comm.allgather((socket.gethostname(), reached(told))))
    number = comm.bcast(port.port if port else 0)
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


def join() -> None:
    """MPI_Init, once it is clear that this mpirun is of the MPI that mpi4py loads."""
    vendor = MPI.get_vendor()[0]
    check_mpirun(vendor, None, os.environ)
    MPI.Init_thread()
    check_mpirun(vendor, MPI.COMM_WORLD.size, os.environ)


def main() -> None:
    """This process is one rank."""
    comm = MPI.COMM_WORLD
    config = together(comm, lambda: parse_config("mpi.py", __doc__ or "", MASTER_FLAGS))
    rank, port = rank_from_mpi(comm, config)
    with port or nullcontext():
        train(config, rank)


if __name__ == "__main__":
    status = exit_status(join) or exit_status(main, speaks=MPI.COMM_WORLD.rank == 0)
    if status not in (0, 2) and MPI.Is_initialized():
        MPI.COMM_WORLD.Abort(status)  # leaving with an exception would wait in MPI_Finalize for the others
    sys.exit(status)
