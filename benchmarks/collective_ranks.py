"""The ranks of one run of collectives.py: started by mpirun for MPI, by itself as ordinary processes for all else.

collectives.py runs it as ``python benchmarks/collective_ranks.py PLAN FOLDER``, PLAN being a Plan as JSON; every rank leaves
FOLDER/rank-R.json with the seconds of each call. On several hosts it is run on each, with NODE_RANK, MASTER_ADDR and MASTER_PORT.
"""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness.collective_runs import Plan
from common.children import wait_for_all
from common.endings import watched
from common.errors import UsageError, exit_status
from common.ports import PortReservation
from common.rank import Rank, rank_number


def start_ranks(plan: Plan) -> int:
    """Starts this file once more for each of this host's ranks, told by variables who it is; the worst exit status."""
    here, several = plan.world_size // plan.nodes, plan.nodes > 1
    first = rank_number(os.environ, "NODE_RANK", 0) * here if several else 0
    with nullcontext() if several else PortReservation(0) as port:
        children = {}
        for rank in range(first, first + here):
            variables = {"RANK": str(rank)} | ({} if several else {"MASTER_PORT": str(port)})
            children[rank] = subprocess.Popen([sys.executable, *sys.argv], env=os.environ | variables)
        return wait_for_all(children, "collective_ranks.py")


def rank_from_environment(plan: Plan) -> Rank:
    """The rank that ``start_ranks`` made this process."""
    number, here = rank_number(os.environ, "RANK"), plan.world_size // plan.nodes
    master = os.environ.get("MASTER_ADDR") if plan.nodes > 1 else "127.0.0.1"
    port = rank_number(os.environ, "MASTER_PORT")
    return Rank("collectives", number, plan.world_size, number % here, here, number // here, master, port)


def main() -> int:
    """One rank, or the start of all."""
    if len(sys.argv) != 3:
        raise UsageError("collective_ranks.py takes PLAN FOLDER: benchmarks/collectives.py gives them; run that")
    plan, port = Plan.from_text(sys.argv[1]), None
    if plan.way == "mpi":
        from benchmarks.collective_ways import rank_from_mpi

        rank, port = rank_from_mpi()
    elif os.environ.get("RANK"):
        rank = rank_from_environment(plan)
    else:
        return start_ranks(plan)
    with port or nullcontext(), watched(rank):
        from benchmarks.collective_loop import run  # imports torch: who watches is settled before

        run(plan, rank, Path(sys.argv[2]))
    return 0


if __name__ == "__main__":
    status = exit_status(main)
    if status and "mpi4py" in sys.modules:
        from benchmarks.collective_ways import abort

        abort(status)
    sys.exit(status)
