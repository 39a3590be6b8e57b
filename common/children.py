"""Waiting for ordinary child processes that make up one run."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from common.errors import complain

PATIENCE_S = 3.5  # the ranks' own watcher needs at most 3 s from the first failure


def in_words(status: int) -> str:
    """An exit status as ``Popen.returncode`` has it: negative for a signal."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def overall(statuses: Sequence[int]) -> int:
    """One exit status for a run: 0, 2 for bad input, 130 after Ctrl-C, 1 for any other failure."""
    bad = {status for status in statuses if status}
    if not bad:
        return 0
    for only in (2, 130):
        if bad <= {only, -signal.SIGTERM, -signal.SIGINT} and only in bad:
            return only
    return 1


def wait_for_all(children: Mapping[int, subprocess.Popen[bytes]], name: str) -> int:
    """Waits until all children have ended, ends the rest soon after the first failure, and tells of it.

    Args:
        children: by rank.
        name: the launcher, for its message.

    Returns:
        The run's exit status (see ``overall``).
    """
    first: tuple[int, int] | None = None
    deadline = float("inf")
    try:
        while any(child.poll() is None for child in children.values()):
            if first is None:
                first = next(((rank, c.returncode) for rank, c in children.items() if c.poll()), None)
                deadline = time.monotonic() + PATIENCE_S if first else deadline
            if time.monotonic() > deadline:
                end(children)
            time.sleep(0.02)
    except KeyboardInterrupt:
        end(children, signal.SIGINT)
        return 130
    status = overall([child.returncode for child in children.values()])
    if status == 1:
        rank, code = first or next((rank, c.returncode) for rank, c in children.items() if c.returncode)
        complain(f"{name}: rank {rank} ended first, with {in_words(code)}.")
    return status


def end(children: Mapping[int, subprocess.Popen[bytes]], number: int = signal.SIGTERM) -> None:
    """Sends a signal to all children that run, and SIGKILL to those that have not left a second later."""
    for child in children.values():
        if child.poll() is None:
            child.send_signal(number)
    until = time.monotonic() + 1
    for child in children.values():
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
