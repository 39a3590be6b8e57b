"""torch.multiprocessing: one parent starts a Python process per rank and waits for all of them.

python launchers/spawn.py --world_size 2
python launchers/spawn.py --nnodes 2 --node_rank 0 --nproc_per_node 2 --master_addr HOST    (node_rank 1 on the other)

python spawn.py --world_size 2
  |-- python -c "from multiprocessing.spawn ..."    local rank 0: the function's first argument --.
  `-- python -c "from multiprocessing.spawn ..."    local rank 1: the function's first argument --+-- one process group
No variables are set: the parent hands everything over as arguments, pickled.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.children import in_words, overall, to_blame
from common.config import RANK_FLAGS, TrainConfig, check_world, parse_config, ranks_to_start, settings
from common.errors import UsageError, complain, exit_status
from common.ports import PortReservation
from common.rank import Rank


def rank_from_spawn(local_rank: int, per_node: int, world_size: int, config: TrainConfig, port: int) -> Rank:
    """The rank that local rank ``local_rank`` of this node is."""
    return Rank(
        "spawn",
        rank=config.node_rank * per_node + local_rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=per_node,
        node_rank=config.node_rank,
        master_addr=config.master_addr or "127.0.0.1",
        master_port=port,
    )


def worker(local_rank: int, per_node: int, world_size: int, config: TrainConfig, port: int) -> None:
    """What runs in each process."""
    rank = rank_from_spawn(local_rank, per_node, world_size, config, port)
    from common.training import train

    sys.exit(exit_status(lambda: train(config, rank)))


def main() -> int:
    """Starts this node's ranks and waits for them."""
    environment = settings()
    config = parse_config("spawn.py", __doc__ or "", RANK_FLAGS, environment=environment)
    if nested := [f"{name}={environment[name]}" for name in ("RANK", "WORLD_SIZE") if environment.get(name)]:
        raise UsageError(f"{' '.join(nested)} in the environment: spawn.py numbers its ranks itself; unset it, or use plain.py")
    if config.world_size and config.nnodes == 1:
        per_node, world_size = ranks_to_start(config, default_per_node=config.world_size)
    else:
        from common.device import visible_gpus

        per_node, world_size = ranks_to_start(config, default_per_node=visible_gpus() or 4)
    check_world(config, world_size)

    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    several = config.nnodes > 1
    with PortReservation(None if several else config.master_port) as free_port:
        port = (config.master_port or 29500) if several else free_port
        context = start_processes(worker, (per_node, world_size, config, port), per_node, join=False, start_method="spawn")
        try:
            while not context.join(grace_period=2.4):  # torch's own: 0 s to SIGTERM, then 30 s to SIGKILL
                pass
        except (ProcessExitedException, ProcessRaisedException) as failed:
            codes = {rank: process.exitcode or 0 for rank, process in enumerate(context.processes)}
            first = {failed.error_index: codes[failed.error_index]}
            if (status := overall(list(codes.values()))) == 1:
                rank, code = to_blame(list((first | codes).items()))
                complain(f"spawn.py: rank {config.node_rank * per_node + rank} ended first, with {in_words(code)}.")
            return status
        except KeyboardInterrupt:
            until = time.monotonic() + 2  # Ctrl-C has reached the ranks too
            for process in context.processes:
                process.join(max(0.0, until - time.monotonic()))
                process.terminate()
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
