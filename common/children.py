"""Waiting for the child processes that make up one run."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Protocol

from common.errors import complain

PATIENCE_S = 3.5  # the ranks' own watcher needs at most 3 s from the first failure
SERVER_GONE = 255  # multiprocessing.popen_forkserver's, for each rank that runs on without the server


class Child(Protocol):
    """What ``subprocess.Popen`` offers, as far as it is needed here."""

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        ...

    def send_signal(self, sig: int) -> None:
        """Sends a signal."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end; subprocess.TimeoutExpired."""
        ...


class Process:
    """A process of multiprocessing's as a ``Child``. It may be the fork server's child rather than this process's own."""

    def __init__(self, process: BaseProcess) -> None:
        """``process`` has been started."""
        self.process = process

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self.process.exitcode

    def send_signal(self, sig: int) -> None:
        """Sends a signal."""
        if self.process.pid and self.poll() is None:
            os.kill(self.process.pid, sig)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end; subprocess.TimeoutExpired."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0.0)
        return self.process.exitcode


def in_words(status: int) -> str:
    """An exit status as ``Popen.returncode`` has it: negative for a signal."""
    if status == SERVER_GONE:
        return f"exit status {status} (what multiprocessing says, too, once its fork server is gone)"
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


def to_blame(ended: Sequence[tuple[int, int]], what: str = "rank") -> str:
    """Which of (rank, status), in the order of ending, failed first without having told of it; "" if nobody did.

    Status 1 is how a rank leaves that has told of its failure, and SIGTERM how the watcher asks the others to.
    """
    failed = [(rank, status) for rank, status in ended if status]
    if untold := [each for each in failed if each[1] not in (1, -signal.SIGTERM)]:
        rank, status = untold[0]
        return f"{what} {rank} ended first, with {in_words(status)}."
    if all(status == -signal.SIGTERM for _, status in failed):
        return f"{f'all {what}s' if len(failed) > 1 else f'the {what}'} here ended with SIGTERM."
    return ""


def wait_for_all(children: Mapping[int, Child], name: str, sentinels: Iterable[int] = (), what: str = "rank") -> int:
    """Waits until all children have ended, ends the rest soon after the first failure, and tells of it.

    Args:
        children: by rank.
        name: the launcher, for its message.
        sentinels: file descriptors that become readable when a child ends, if there are any: it is noticed at once then.
        what: a child is, for its message.

    Returns:
        The run's exit status (see ``overall``).
    """
    ended: dict[int, int] = {}
    deadline = float("inf")
    running = list(sentinels)
    try:
        while len(ended) < len(children):
            ended |= {rank: status for rank, c in children.items() if rank not in ended and (status := c.poll()) is not None}
            if any(ended.values()):
                deadline = min(deadline, time.monotonic() + PATIENCE_S)
            if time.monotonic() > deadline:
                end(children)
            elif len(ended) < len(children):
                if running:
                    running = [s for s in running if s not in select.select(running, [], [], 0.2)[0]]
                else:
                    time.sleep(0.01)
    except KeyboardInterrupt:
        until = time.monotonic() + 0.5  # who shares the terminal has heard it too
        while any(child.poll() is None for child in children.values()) and time.monotonic() < until:
            time.sleep(0.01)
        end(children, signal.SIGINT)
        return 130
    status = overall(list(ended.values()))
    if status == 1 and (blame := to_blame(list(ended.items()), what)):
        complain(f"{name}: {blame}")
    return status


def end(children: Mapping[int, Child], number: int = signal.SIGTERM) -> None:
    """Sends a signal to all children that run, and SIGKILL to those that have not left a second later."""
    for child in children.values():
        if child.poll() is None:
            child.send_signal(number)
    until = time.monotonic() + 1
    for child in children.values():
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
