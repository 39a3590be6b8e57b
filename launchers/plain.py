"""Plain Python: no launcher at all.

python launchers/plain.py                        one process
python launchers/plain.py --world_size 2         starts two ordinary Python processes
RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python launchers/plain.py    (RANK=1 in another shell)

python plain.py --world_size 2
  |-- python plain.py    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... --.
  `-- python plain.py    RANK=1 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... --+-- one process group
Setting these variables is what every launcher does for you.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.checks import check_master, check_world, ranks_to_start
from common.children import wait_for_all
from common.command_line import parse_config, settings
from common.config import RANK_FLAGS, TrainConfig
from common.errors import UsageError, exit_status
from common.nesting import check_nesting
from common.ports import PortReservation
from common.rank import Rank, on_this_machine, rank_number
from common.training import train


def rank_from_environment(environment: Mapping[str, str]) -> Rank:
    """The rank that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; without the first two, a process on its own."""
    if not environment.get("RANK") and not environment.get("WORLD_SIZE"):
        return Rank("plain")
    world_size, rank = rank_number(environment, "WORLD_SIZE"), rank_number(environment, "RANK")
    master_addr = environment.get("MASTER_ADDR")
    local_default = world_size if on_this_machine(master_addr) else 1
    local_world_size = rank_number(environment, "LOCAL_WORLD_SIZE", local_default)
    return Rank(
        "plain",
        rank=rank,
        world_size=world_size,
        local_rank=rank_number(environment, "LOCAL_RANK", rank % max(1, local_world_size)),
        local_world_size=local_world_size,
        node_rank=rank_number(environment, "NODE_RANK", rank // max(1, local_world_size)),
        master_addr=master_addr,
        master_port=rank_number(environment, "MASTER_PORT", 29500),
    )


def start_ranks(config: TrainConfig, per_node: int, world_size: int) -> int:
    """Starts this node's ranks as ordinary processes and waits for them; returns the exit status."""
    check_master(config)
    several = config.nnodes > 1
    with PortReservation(None if several else config.master_port) as free_port:
        group = {
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": per_node,
            "NODE_RANK": config.node_rank,
            "MASTER_ADDR": config.master_addr or "127.0.0.1",
            "MASTER_PORT": (config.master_port or 29500) if several else free_port,
        }
        children = {}
        for local_rank in range(per_node):
            rank = config.node_rank * per_node + local_rank
            variables = {name: str(value) for name, value in (group | {"RANK": rank, "LOCAL_RANK": local_rank}).items()}
            children[rank] = subprocess.Popen([sys.executable, *sys.argv], env=os.environ | variables)
        return wait_for_all(children, f"plain.py (node {config.node_rank})" if several else "plain.py")


def main() -> int:
    """One rank if the environment says so or one is all that is asked for; else the start of several."""
    environment = settings()
    config = parse_config("plain.py", __doc__ or "", RANK_FLAGS, environment=environment)
    check_nesting("plain", environment, config.nnodes)
    rank = rank_from_environment(environment)
    per_node, world_size = ranks_to_start(config, default_per_node=rank.local_world_size)
    check_world(config, world_size)
    if world_size > 1 and not rank.forms_group:
        return start_ranks(config, per_node, world_size)
    if config.world_size not in (None, rank.world_size):
        raise UsageError(
            f"--world_size {config.world_size} with WORLD_SIZE={rank.world_size} in the environment: unset one of them"
        )
    train(config, rank)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
