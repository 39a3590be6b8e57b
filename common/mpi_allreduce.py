"""DDP through MPI's Allreduce: a communication hook that sums a bucket of gradients in place, in CPU memory.

The blocking Allreduce, because it is the quickest over all sizes: a persistent one (``Allreduce_init``, MPI 4) saves 1 µs of
2.5 under MPICH and doubles the time from 12 KB up under Open MPI 5, whose non-blocking collectives it runs on; Open MPI 4 has none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn

from common import endings
from common.errors import UsageError
from common.meeting import Meeting
from common.process_group import Group

_TYPES = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE}
T = TypeVar("T")
Hook = Callable[["Allreduce", dist.GradBucket], torch.futures.Future[Tensor]]
TELL_S = 2.0  # a rank that waits longer says so, for the others to know who does not


def hook(group: Group, model: nn.Module) -> tuple[Hook, Allreduce]:
    """(hook, state) for DDP; all ranks call it together.

    Raises:
        UsageError: the ranks are in no MPI world of their number, or ``model`` has gradients that are not float32 or float64.
    """
    if group.rank.launcher != "mpi" or MPI.COMM_WORLD.size != group.rank.world_size:
        raise UsageError(
            f"--sync mpi under {group.rank.launcher}, with {group.rank.world_size} ranks, of which {MPI.COMM_WORLD.size} are in "
            "this one's MPI world: all must be; start launchers/mpi.py with mpirun, or give --sync ddp"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in _TYPES:
            raise UsageError(f"--sync mpi: {name} is {parameter.dtype}; it sums torch.float32 and torch.float64: give --sync ddp")
    return average, Allreduce(group)


class Allreduce:
    """The ranks' own communicator, each bucket as MPI takes it, and a watchdog."""

    def __init__(self, group: Group) -> None:
        """All ranks call it together."""
        self.comm = MPI.COMM_WORLD.Split(0, group.rank.rank)  # the group's order, and apart from the launcher's messages
        self.world_size = group.rank.world_size
        self.buckets: dict[int, tuple[int, Any, Any, Any]] = {}
        """By bucket: its address, its memory, that as MPI takes it, and a future that is done and holds it.

        The future keeps the tensor, so no other one can come to its address. DDP makes new buckets after the first step.
        """
        self.calls = 0
        self.inside = False  # an Allreduce
        self._left = threading.Event()
        if group.meeting:
            threading.Thread(target=self._watch, args=(group.meeting,), daemon=True).start()

    def prepare(self, bucket: dist.GradBucket, buffer: Tensor) -> tuple[int, Any, Any, Any]:
        """Notes a bucket that is new."""
        memory = buffer.numpy()
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(buffer)
        entry = (buffer.data_ptr(), memory, [memory, buffer.numel(), _TYPES[buffer.dtype]], done)
        self.buckets[bucket.index()] = entry
        return entry

    def close(self) -> None:
        """After the last step, on all ranks."""
        self._left.set()
        self.comm.Free()

    def _watch(self, meeting: Meeting) -> None:
        """Ends this rank if an Allreduce lasts longer than ``--timeout``: MPI itself would wait for ever, deaf to signals.

        It calls no MPI. It looks from time to time at what the training thread notes, which costs that one two assignments.
        """
        period = min(0.5, meeting.patience / 8)
        number, periods, told = 0, 0, False
        while not self._left.wait(period):
            if not self.inside or self.calls != number:
                number, periods, told = self.calls, 0, False
                continue
            periods += 1
            if not told and periods * period >= min(TELL_S, meeting.patience / 4):
                told = True
                _ask(lambda store, n=number: store.set(f"allreduce/{n}/{meeting.rank.rank}", ""), meeting)  # type: ignore[misc]
            if periods * period >= meeting.patience:
                whom = _silent(meeting, number)
                if self.inside and self.calls == number:
                    endings.end_now(f"waited {meeting.patience:g} s (--timeout) in MPI's Allreduce for {whom}")


def _silent(meeting: Meeting, number: int) -> str:
    """Which ranks have not told that they wait in Allreduce ``number``, in words."""
    everyone = range(meeting.rank.world_size)
    waiting = _ask(lambda store: [r for r in everyone if store.check([f"allreduce/{number}/{r}"])], meeting)
    if waiting is None:  # it serves the store
        return "rank 0, which does not answer"
    silent = [str(r) for r in everyone if r not in waiting]
    asked = _ask(lambda store: store.add(f"allreduce/{number}/asked", 1), meeting)
    until = time.monotonic() + 1.0
    while meeting.rank.rank == 0 and asked and asked < len(waiting) and time.monotonic() < until:
        time.sleep(0.02)  # with it the store goes, which complains at length in those that it leaves
        asked = _ask(lambda store: store.add(f"allreduce/{number}/asked", 0), meeting)
    if not silent:
        return "its end, as all ranks do"
    return f"rank{'s' * (len(silent) > 1)} {', '.join(silent)}, which {'are' if len(silent) > 1 else 'is'} silent"


def _ask(question: Callable[[dist.Store], T], meeting: Meeting, limit: float = 2.0) -> T | None:
    """The store's answer; None after ``limit`` seconds without one: a client waits without end for a server that is stopped."""
    answers: list[T] = []

    def ask() -> None:
        with suppress(RuntimeError):  # the server has left
            answers.append(question(meeting.store))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(limit)
    return answers[0] if answers else None


def average(state: Allreduce, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's hook: the mean of ``bucket`` over the ranks, in place.

    The sum is divided once, at the end, so a mean is off by the rounding of a sum and of one division (of none where the number of
    ranks is a power of two). Every rank gets the same bits: "MPI requires that all processes […] receive identical results", says
    the standard of MPI_ALLREDUCE. From three ranks on, MPIs may add in different orders, so two of them need agree up to rounding.

    DDP calls its hooks in the order of the buckets on every rank (torch/csrc/distributed/c10d/reducer.cpp, ``mark_bucket_ready``),
    and each call waits for its own result, so no two calls can meet crosswise.

    Raises:
        RuntimeError: MPI lost a rank.
    """
    buffer = bucket.buffer()
    entry = state.buckets.get(bucket.index())
    if entry is None or entry[0] != buffer.data_ptr():
        entry = state.prepare(bucket, buffer)
    _, memory, message, done = entry
    state.calls += 1
    state.inside = True
    try:
        state.comm.Allreduce(MPI.IN_PLACE, message, MPI.SUM)  # without the interpreter's lock: the watchdog can run
    except MPI.Exception as error:
        raise RuntimeError(f"MPI's Allreduce failed, its connection was likely closed: {error}") from None
    state.inside = False
    memory /= state.world_size
    return done  # type: ignore[no-any-return]
