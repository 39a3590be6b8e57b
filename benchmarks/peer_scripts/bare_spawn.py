"""Plain DDP under torch.multiprocessing.

python bare_spawn.py --world_size 2 --start_method forkserver
"""

import importlib
import multiprocessing

import job
import torch.distributed as dist
import torch.multiprocessing as mp

# What a rank would import: the first optimizer step imports torch._dynamo, as long again as torch.
PRELOADED = ["torch", "torch._dynamo"]


def worker(rank: int, world_size: int, port: int, threads: int, steps: int) -> None:
    """One rank."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    job.run(threads, steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    args = job.arguments()
    if args.start_method == "forkserver":
        multiprocessing.set_forkserver_preload(PRELOADED)
    elif args.start_method == "fork":
        for name in PRELOADED:
            importlib.import_module(name)
    arguments = (args.world_size, job.free_port(), args.threads, args.steps)
    mp.start_processes(worker, arguments, nprocs=args.world_size, start_method=args.start_method)
