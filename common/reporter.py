"""A rank's line to its node's watcher (``common.watch``). Standard library only: it is there before torch is imported."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPLY_S = 2.0  # how long a failed rank waits to be heard
PROGRAM = str(Path(__file__).with_name("watch.py"))
supported = hasattr(os, "pidfd_open") and hasattr(socket, "AF_UNIX") and sys.platform == "linux"


class Reporter:
    """A rank's line to its node's watcher."""

    def __init__(self, key: str, about: dict[str, Any]) -> None:
        """Connects, starting the watcher if this is the node's first rank.

        Args:
            key: names the run on this node; the same in all its ranks, and in no other run at the time.
            about: rank, host, and optionally parents (launchers' pids whose end ends the ranks), events (the rank's file),
                launcher_kills (whether a launcher answers one rank's death by SIGKILL to the others), and for several nodes
                node (this one's index), ranks_here (how many it has), world_size, and one_terminal (whether all nodes' output
                comes together).
        """
        import hashlib

        # A name may have 107 bytes (unix(7)), a host's name alone 253. Containers with one network share these names, but not
        # their processes: a watcher cannot end those of another PID namespace.
        with contextlib.suppress(OSError):
            key += os.readlink("/proc/self/ns/pid")
        address = f"\0launchlab-{os.getuid()}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.bind(address)
            except OSError:
                pass  # another rank of this node was first
            else:
                listener.listen(1024)
                subprocess.Popen(
                    [sys.executable, "-I", "-S", PROGRAM, str(listener.fileno())],
                    pass_fds=[listener.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                ).returncode = 0  # ours to start, not to wait for: it outlives us, and Popen need not warn of that
        self._socket = socket.socket(socket.AF_UNIX)
        for _ in range(200):  # bound by the other rank, not yet listening: microseconds
            try:
                self._socket.connect(address)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        self.tell(event="here", **about)

    def tell(self, **message: Any) -> None:
        """Sends one event; a watcher that is gone is no reason to fail."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def ask(self, **message: Any) -> dict[str, Any] | None:
        """Sends one event and waits until the watcher has dealt with it; its answer, None if nobody gave one."""
        answer = b""
        try:
            self.tell(**message, answer=True)
            self._socket.settimeout(REPLY_S)
            while not answer.endswith(b"\n"):
                if not (more := self._socket.recv(4096)):
                    return None
                answer += more
        except OSError:
            return None
        return dict(json.loads(answer))

    def close(self) -> None:
        """Hangs up."""
        self._socket.close()
