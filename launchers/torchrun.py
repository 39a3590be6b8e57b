"""torchrun: an agent per node starts the ranks and sets the variables.

torchrun --nproc_per_node=2 launchers/torchrun.py
torchrun --nnodes=2 --node_rank=0 --nproc_per_node=2 --master_addr=HOST launchers/torchrun.py    (node_rank 1 on the other)

torchrun (the agent; it also serves the store)
  |-- python torchrun.py    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... --.
  `-- python torchrun.py    RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... --+-- one process group
Any launcher that sets these variables runs this file too.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import parse_config
from common.errors import UsageError, exit_status
from common.nesting import check_nesting
from common.rank import Rank, rank_number
from common.training import train


def rank_from_torchrun(environment: Mapping[str, str]) -> Rank:
    """The rank that torchrun's variables describe: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables."""
    if not environment.get("RANK") and not environment.get("WORLD_SIZE"):
        raise UsageError(
            "RANK and WORLD_SIZE are not set: torchrun sets them; type torchrun --nproc_per_node=2 launchers/torchrun.py"
        )
    world_size = rank_number(environment, "WORLD_SIZE")
    served = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restart = rank_number(environment, "TORCHELASTIC_RESTART_COUNT", 0)
    return Rank(
        "torchrun",
        rank=rank_number(environment, "RANK"),
        world_size=world_size,
        local_rank=rank_number(environment, "LOCAL_RANK"),
        local_world_size=rank_number(environment, "LOCAL_WORLD_SIZE", world_size),
        node_rank=rank_number(environment, "GROUP_RANK", 0),
        master_addr=environment.get("MASTER_ADDR"),
        master_port=rank_number(environment, "MASTER_PORT"),
        store_is_served=served,
        # The agent's store outlives a restart; in one of the group's own nodes meet that may have counted differently.
        store_prefix=f"{environment.get('TORCHELASTIC_RUN_ID', '')}/{restart if served else ''}",
        restart=restart,
    )


def main() -> None:
    """This process is one rank."""
    config = parse_config("torchrun.py", __doc__ or "")
    check_nesting("torchrun", os.environ)
    rank = rank_from_torchrun(os.environ)
    train(config, rank)


if __name__ == "__main__":
    sys.exit(exit_status(main, speaks=os.environ.get("LOCAL_RANK", "0") == "0"))
