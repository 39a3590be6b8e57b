"""multiprocessing: one parent starts a Python process per rank and waits for all of them.

python launchers/spawn.py --world_size 2
python launchers/spawn.py --world_size 2 --start_method spawn
python launchers/spawn.py --nnodes 2 --node_rank 0 --nproc_per_node 2 --master_addr HOST    (node_rank 1 on the other)

python spawn.py --world_size 2                            with --start_method spawn:  python spawn.py
  `-- the fork server, which imports torch once                                         |-- python, imports torch
        |-- a fork of it    local rank 0: the function's first argument --.             `-- python, imports torch
        `-- a fork of it    local rank 1: the function's first argument --+-- one process group
No variables are set: the parent hands everything over as arguments, pickled.
torch.multiprocessing.spawn does what main() does, once the parent has imported torch too, for which the ranks would wait.
"""

import gc
import multiprocessing
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.checks import check_master, check_world, ranks_to_start
from common.children import Process, end, wait_for_all
from common.command_line import parse_config, settings
from common.config import SPAWN_FLAGS, TrainConfig
from common.errors import exit_status
from common.nesting import check_nesting
from common.ports import PortReservation
from common.rank import Rank
from common.training import train
from common.warm import check_start, default_start_method, start_server


def rank_from_spawn(local_rank: int, per_node: int, world_size: int, config: TrainConfig, port: int, method: str) -> Rank:
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
        start_method=method,
    )


def worker(local_rank: int, per_node: int, world_size: int, config: TrainConfig, port: int, method: str) -> None:
    """What runs in each process."""
    rank = rank_from_spawn(local_rank, per_node, world_size, config, port, method)
    sys.exit(exit_status(lambda: train(config, rank)))


def main() -> int:
    """Starts this node's ranks and waits for them."""
    check_start("spawn.py")
    environment = settings()
    config = parse_config("spawn.py", __doc__ or "", SPAWN_FLAGS, environment=environment)
    check_nesting("spawn", environment, config.nnodes)
    method = config.start_method or default_start_method()
    check_start("spawn.py", method)
    if method == "forkserver":
        start_server(config)  # it imports while this process goes on
    if config.world_size and config.nnodes == 1:
        per_node, world_size = ranks_to_start(config, default_per_node=config.world_size)
    else:
        from common.device import visible_gpus

        per_node, world_size = ranks_to_start(config, default_per_node=visible_gpus() or 4)
    check_world(config, world_size)
    check_master(config)
    if method == "fork":
        import common.loop  # noqa: F401  then its copies have it

    several = config.nnodes > 1
    with PortReservation(None if several else config.master_port) as free_port:
        port = (config.master_port or 29500) if several else free_port
        context: Any = multiprocessing.get_context(method)
        job = (per_node, world_size, config, port, method)
        children: dict[int, Process] = {}
        try:
            for local_rank in range(per_node):
                process = context.Process(target=worker, args=(local_rank, *job))
                process.start()
                children[config.node_rank * per_node + local_rank] = Process(process)
        except KeyboardInterrupt:  # multiprocessing would wait for those that run
            end(children)
            raise
        try:
            name = f"spawn.py (node {config.node_rank})" if several else "spawn.py"
            return wait_for_all(children, name, [child.process.sentinel for child in children.values()])
        finally:
            gc.freeze()  # as in a rank: where this process has imported torch, its last collections would take half a second


if __name__ == "__main__":
    sys.exit(exit_status(main))
