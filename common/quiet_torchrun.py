"""torchrun as it is, without its report of a failure: ``python common/quiet_torchrun.py [torchrun's flags] SCRIPT …``.

The ranks' own watcher tells who failed and why, in one sentence; torchrun's traceback and report after it are thirty lines, on each
node. The status is 2 where the ranks refused their flags, which torchrun turns into 1.
"""

import logging
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.children import to_blame
from common.errors import complain, exit_status


def main() -> int:
    """One node's agent."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or its store prints C++ frames when the other side is gone
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as failed:
        ends = [(rank, f.exitcode) for rank, f in sorted(failed.failures.items(), key=lambda item: item[1].timestamp)]
        if 2 in dict(ends).values():
            return 2
        if blame := to_blame(ends):
            complain(f"torchrun: {blame}")
        return 1
    except (RendezvousError, DistError, TimeoutError) as error:
        complain(f"torchrun: the nodes did not meet: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return 1
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
