"""Plain DDP under mpirun: MPI says who is who, and rank 0 broadcasts where it listens.

mpirun -np 2 python bare_mpi.py
"""

import job
import torch.distributed as dist
from mpi4py import MPI

if __name__ == "__main__":
    args = job.arguments()
    comm = MPI.COMM_WORLD
    port = comm.bcast(job.free_port() if comm.rank == 0 else None)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=comm.rank, world_size=comm.size)
    job.run(args.threads, args.steps)
    dist.destroy_process_group()
