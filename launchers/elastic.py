"""torch-elastic: torchrun's own engine, called from Python, on a fork server that has imported torch.

python launchers/elastic.py --nproc_per_node 2
python launchers/elastic.py --nnodes 1:2 --nproc_per_node 2 --master_addr HOST    (the same on every node; HOST is one of them)

python elastic.py (the agent: it watches, forms the group anew after a failure, and serves the store)
  `-- the fork server, which imports torch once
        |-- a fork of it    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... --.
        `-- a fork of it    RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... --+-- one process group
After a rank has died, all are forked again, up to --max_restarts times: nothing is imported again.
"""

import math
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import names
from common.agent import meeting_place, run_agent
from common.checks import check_master, check_world
from common.command_line import parse_config
from common.config import ELASTIC_FLAGS, TrainConfig
from common.errors import UsageError, exit_status
from common.interfaces import way_in
from common.nesting import check_nesting
from common.ports import PortReservation
from common.rank import Rank
from common.training import train
from common.warm import check_start, default_start_method, start_server


def rank_from_elastic(environment: Mapping[str, str], method: str) -> Rank:
    """The rank that the agent's variables describe: torchrun's, set in each process that it starts."""
    restart = int(environment["TORCHELASTIC_RESTART_COUNT"])
    served = environment["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    return Rank(
        "elastic",
        int(environment["RANK"]),
        int(environment["WORLD_SIZE"]),
        int(environment["LOCAL_RANK"]),
        int(environment["LOCAL_WORLD_SIZE"]),
        int(environment["GROUP_RANK"]),
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        store_is_served=served,
        # The agent's store outlives a restart; in one of the group's own nodes meet that may have counted differently.
        store_prefix=f"{environment['TORCHELASTIC_RUN_ID']}/{restart if served else ''}",
        start_method=method,
        restart=restart,
    )


def worker(config: TrainConfig, method: str) -> int:
    """What runs in each process. Bad input is a result, not a failure: starting again would not mend it."""
    rank = rank_from_elastic(os.environ, method)
    status = exit_status(lambda: train(config, rank))
    return status if status in (0, 2) else sys.exit(status)


def main() -> int:
    """This node's agent."""
    check_start("elastic.py")
    config = parse_config("elastic.py", __doc__ or "", ELASTIC_FLAGS)
    method = config.start_method or default_start_method()
    check_start("elastic.py", method)
    per_node, nodes = config.nproc_per_node or 1, config.nnodes
    check_world(config, per_node * nodes)
    check_nesting("elastic", os.environ, nodes)
    if nodes > 1 and not config.master_addr:
        raise UsageError(f"--nnodes {nodes} without --master_addr: name the host where the nodes meet")
    check_master(config)
    if method == "forkserver":
        start_server(config, "torch.distributed.elastic.multiprocessing")  # it imports while this process does
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or the agent's store prints C++ frames when its node is gone
    from torch.distributed.launcher.api import LaunchConfig

    with PortReservation(config.master_port if nodes == 1 else None) as free_port:
        launch = LaunchConfig(nodes.least, nodes, per_node, start_method=method, max_restarts=config.max_restarts)
        launch.monitor_interval = 0.02  # seconds; 0.1 by default, which each restart and each end would wait for
        if nodes == 1:
            names.from_files_only()
            launch.rdzv_backend, launch.rdzv_endpoint, launch.run_id = "static", f"127.0.0.1:{free_port}", uuid.uuid4().hex
            launch.rdzv_configs |= {"rank": 0}
        else:  # the same group forms anew after a node has come or gone, which a store of its own each time survives
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
            launch.rdzv_backend, launch.run_id = "c10d", "launchlab"
            launch.local_addr = way_in(config.master_addr)  # else its name, which others may not know
            launch.rdzv_endpoint = meeting_place(config.master_addr, config.master_port or 29500)
            launch.rdzv_configs |= {"last_call_timeout": 2, "keep_alive_interval": 2, "keep_alive_max_attempt": 3}
            launch.rdzv_configs["join_timeout"] = math.ceil(config.patience(one_node=False))
        return run_agent(launch, worker, config, method, where=f"{config.master_addr}:{config.master_port or 29500}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
