"""Runs several commands at the same time, one for each host of a virtual cluster, and ends as the worst of them.

The benchmarks run it as ``python benchmarks/on_hosts.py COMMANDS``, COMMANDS being a list of command lines as JSON
(``common.virtual_cluster.VirtualCluster.command`` gives them). If one fails, the others are ended.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.children import wait_for_all
from common.errors import UsageError, exit_status


def main() -> int:
    """Starts all, and waits for them."""
    if len(sys.argv) != 2:
        raise UsageError("on_hosts.py takes COMMANDS: benchmarks/compare.py --nodes gives them; run that")
    commands: list[list[str]] = json.loads(sys.argv[1])
    children = {host: subprocess.Popen(words, stdin=subprocess.DEVNULL) for host, words in enumerate(commands)}
    return wait_for_all(children, "on_hosts.py", what="host")


if __name__ == "__main__":
    sys.exit(exit_status(main))
