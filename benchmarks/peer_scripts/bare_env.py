"""Plain DDP from the variables that a launcher sets; without them, one process.

torchrun --standalone --nproc_per_node=2 bare_env.py
RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python bare_env.py    (RANK=1 in another shell)
"""

import os

import job
import torch.distributed as dist

if __name__ == "__main__":
    args = job.arguments()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    job.run(args.threads, args.steps)
    if dist.is_initialized():
        dist.destroy_process_group()
