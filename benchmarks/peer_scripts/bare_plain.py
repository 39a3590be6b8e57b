"""Starts bare_env.py N times as ordinary processes, with the variables set by hand.

python bare_plain.py --world_size 2
"""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--world_size", type=int, default=2)
    args, passed_on = parser.parse_known_args()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(args.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(Path(__file__).with_name("bare_env.py")), *passed_on]
    ranks = [subprocess.Popen(command, env=os.environ | group | {"RANK": str(rank)}) for rank in range(args.world_size)]
    sys.exit(max(abs(rank.wait()) for rank in ranks))
