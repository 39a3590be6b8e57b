"""The measuring loop of one rank, the same for all ways.

For each collective and size: the ranks write their input anew (as a backward pass has just written the gradients), meet at a
barrier that spins in shared memory and that they leave within a microsecond or so of each other, read the clock, call, and read the
clock again. The call is what training would make, Python included. The results of the first call and of the last are checked
against what they must be, in whole numbers that float32 adds up exactly.

The machine's memory-copy ceiling is measured alike, as a way of its own, ``memory_copy``:

    own         every rank at once copies n bytes within its own memory
    neighbour   every rank at once copies n bytes that the next rank has just written into memory that both map
    hand_over   the same, with the writing counted, through two pieces of that memory in turn, which the neighbour has read before

For two ranks an all-reduce of n bytes cannot be faster than the second: each rank must read at least n bytes that the other wrote
(all of the other's values, or half of them and half of the sums) and write n bytes of results. For N ranks it is 2(N-1)/N × n: the
N-1 parts of a sum that come from elsewhere, and the N-1 sums made elsewhere, of n/N bytes each. What is copied between ranks was
written in pieces of at most ``PIECE`` bytes just before (each piece is timed by itself): an all-reduce that works in pieces finds
them in the caches, so the ceiling does too. The hand-over bounds an all-reduce of tensors in a rank's own memory, which
must be written where others can read them (unless the kernel lets it read other processes' memory). It takes far longer than the
copy where the two cores share no cache: each line must first be taken back from the core that has read it.
"""

from __future__ import annotations

import gc
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import collective_ways
from benchmarks.collective_ways import Way
from benchmarks.harness.bandwidth import ITEM, size_text, whole_bytes
from benchmarks.harness.collective_runs import MEMORY_COPY, Plan
from common.command_line import parse_config
from common.device import choose_device, wait_for
from common.errors import RunError
from common.files import write_json
from common.process_group import Group, announce, carry_out, process_group
from common.rank import Rank
from common.shared_memory import map_together

WARM_UPS = 5
MOST, FEWEST = 200, 10  # timed calls of a size
BYTES = 2**28  # that the timed calls of a size move together, within these limits
LINK_S = 1.0  # seconds that the timed calls of a size take on a link of a known rate, within these limits too
LINE = 128  # bytes between the barrier's counters: two cache lines, because processors fetch them in pairs
PIECE = 2**20  # bytes; smaller ones are no faster, whole large messages leave the caches


def iterations(size: int, bytes_per_s: float | None = None) -> int:
    """Timed calls of ``size`` bytes: the same on all ranks and for all ways; over a link of a known rate fewer."""
    most = MOST if bytes_per_s is None else min(MOST, int(bytes_per_s * LINK_S / size))
    return max(FEWEST, min(most, BYTES // size))


def values(rank: int, count: int, device: torch.device) -> Tensor:
    """What ``rank`` puts in: small whole numbers, so that sums are exact, and other ones on each rank; shape (count,)."""
    return ((torch.arange(count, dtype=torch.int32, device=device) * 3 + 7 * rank) % 31).float()


@dataclass
class Call:
    """One collective with its tensors."""

    n_bytes: int
    """As nccl-tests counts them."""
    prepare: Callable[[], object]
    run: Callable[[], object]
    tensors: list[Tensor]
    result: Tensor
    expected: Tensor
    seconds: Callable[[], float] | None = None
    """Instead of timing ``run``: does it and tells how long it took."""

    def check(self, what: str) -> None:
        """Raises RunError if the result is not what it must be."""
        if not torch.equal(self.result, self.expected):
            at = int((self.result != self.expected).nonzero()[0])
            raise RunError(
                f"got a wrong result from {what}: element {at} of {len(self.expected)} is {self.result[at].item():g}, "
                f"must be {self.expected[at].item():g}"
            )


def collective(kind: str, way: Way, size: int, group: Group) -> Call:
    """``kind`` on ``size`` bytes as this rank calls it."""
    me, n, device = group.rank.rank, group.rank.world_size, group.device
    n_bytes = whole_bytes(kind, size, n)
    count = n_bytes // ITEM
    if kind in ("all_reduce", "broadcast"):
        if kind == "all_reduce":
            expected = values(0, count, device)
            for r in range(1, n):
                expected += values(r, count, device)
        else:
            expected = values(0, count, device)
        source = values(me, count, device)
        tensor = torch.empty_like(source)
        calls = {"all_reduce": lambda: way.all_reduce(tensor), "broadcast": lambda: way.broadcast(tensor, 0)}
        return Call(n_bytes, lambda: tensor.copy_(source), calls[kind], [tensor], tensor, expected)
    if kind == "all_gather":
        source, expected = values(me, count // n, device), torch.cat([values(r, count // n, device) for r in range(n)])
        own, output = torch.empty_like(source), torch.zeros(count, device=device)
        return Call(n_bytes, lambda: own.copy_(source), lambda: way.all_gather(output, own), [own, output], output, expected)
    source = values(me, count, device)
    mine = slice(me * count // n, (me + 1) * count // n)
    expected = torch.zeros(count // n, device=device)
    for r in range(n):
        expected += values(r, count, device)[mine]
    own, output = torch.empty_like(source), torch.zeros(count // n, device=device)
    return Call(n_bytes, lambda: own.copy_(source), lambda: way.reduce_scatter(output, own), [own, output], output, expected)


def shared(group: Group, name: str, n_bytes: int, folder: Path) -> mmap.mmap:
    """Memory that all ranks map, zeros but for the last 16 bytes. Nothing of it is left when they end.

    That of --sync shared_memory; a file in ``folder`` where the system has no memfd, or where the ranks are on hosts of a virtual
    cluster, which cannot open each other's memory but share this machine's files.
    """
    if hasattr(os, "memfd_create") and group.rank.one_node:
        return map_together(group, name, n_bytes)
    meeting, path = group.meeting, folder / "shared"
    assert meeting
    if group.rank.rank == 0:
        with open(path, "wb") as file:
            file.truncate(n_bytes)
    meeting.tell(name, None)
    meeting.hear(name, "did not come to share memory")
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), n_bytes)
    meeting.tell(f"{name} mapped", None)
    meeting.hear(f"{name} mapped", "did not map the shared memory")
    if group.rank.rank == 0:
        path.unlink()
    return memory


class Barrier:
    """The ranks of one machine leave it within a microsecond or so of each other: nobody who waits sleeps.

    A rank that slept would wake up some 100 µs late, and the others would wait for it in the call that is timed. Only where ranks
    share cores, or one takes longer than any call, is there sleep.
    """

    def __init__(self, group: Group, folder: Path) -> None:
        """All ranks of ``group`` make it together."""
        n, me = group.rank.world_size, group.rank.rank
        self._counters = memoryview(shared(group, "barrier", n * LINE, folder)).cast("q")
        self._own, self._others = me * LINE // 8, [r * LINE // 8 for r in range(n) if r != me]
        cores = set().union(*group.local_cores())
        self._spin_s, self._patience = 0.05 if n <= len(cores) else 0.00002, group.meeting.patience if group.meeting else 0.0
        self._turn = 0

    def __call__(self) -> None:
        """Returns once every rank has called it as often.

        Raises:
            RunError: a rank did not come in time.
        """
        self._turn += 1
        turn, counters, clock = self._turn, self._counters, time.perf_counter
        counters[self._own] = turn
        began = clock()
        for other in self._others:
            while counters[other] < turn:
                waited = clock() - began
                if waited > self._patience:
                    raise RunError(f"waited {self._patience:g} s at a barrier for another rank; is it stuck?")
                if waited > self._spin_s:
                    time.sleep(0.00002)


def memory_copy(kind: str, rows: Tensor, size: int, group: Group, barrier: Callable[[], None]) -> Call:
    """A copy of ``size`` bytes within this rank's memory, or of what the next rank has just written into shared memory (or both).

    ``rows`` is that memory: float32, shape (world size, values of the largest size).
    """
    me, n, count = group.rank.rank, group.rank.world_size, max(1, size // ITEM)
    source, tensor = values(me, count, group.device), torch.zeros(count)
    if kind == "own":
        written = torch.empty_like(source)
        return Call(count * ITEM, lambda: written.copy_(source), lambda: tensor.copy_(written), [tensor, written], tensor, source)
    whose = (me + 1) % n
    expected = values(whose, count, group.device)
    step = PIECE // ITEM
    parts = []
    for number, first in enumerate(range(0, count, step)):
        at = slice(first, min(first + step, count))
        begin = number % 2 * step if kind == "hand_over" else first
        there = slice(begin, begin + at.stop - at.start)
        parts.append((source[at], rows[me, there], rows[whose, there], tensor[at]))

    def seconds() -> float:
        clock, writing, reading = time.perf_counter, 0.0, 0.0
        for ours, mine, theirs, into in parts:
            began = clock()
            mine.copy_(ours)
            writing += clock() - began
            barrier()
            began = clock()
            into.copy_(theirs)
            reading += clock() - began
        return reading if kind == "neighbour" else writing + reading

    return Call(count * ITEM, lambda: None, seconds, [tensor], tensor, expected, seconds)


def measure(call: Call, what: str, group: Group, barrier: Callable[[], None], times: int) -> list[float]:
    """Seconds that each of ``times`` calls took on this rank, after a few that are not counted.

    Raises:
        RunError: a result is wrong.
    """
    device, clock, taken = group.device, time.perf_counter, []
    for number in range(-WARM_UPS, times):
        call.prepare()
        barrier()
        if call.seconds:
            seconds = call.seconds()
        else:
            began = clock()
            call.run()
            wait_for(device)
            seconds = clock() - began
        if number >= 0:
            taken.append(seconds)
        if number in (-WARM_UPS, times - 1):
            call.check(what)
            if number < 0:
                barrier()  # nobody starts the second call while another still compares
    call.prepare()
    if call.seconds is None:  # once more, until gloo's thread has let go of the tensors
        carry_out(call.run, call.tensors, wait=group.backend == "gloo")
    return taken


def calls(plan: Plan, group: Group, barrier: Callable[[], None], folder: Path) -> Callable[[str, int], Call]:
    """What makes the call of a collective and size in ``plan``'s way."""
    if plan.way == MEMORY_COPY:
        n, count = group.rank.world_size, max(plan.sizes) // ITEM
        rows = torch.frombuffer(shared(group, "rows", n * count * ITEM, folder), dtype=torch.float32).view(n, count)
        return lambda kind, size: memory_copy(kind, rows, size, group, barrier)
    way = collective_ways.make(plan.way, group, max(plan.sizes))
    return lambda kind, size: collective(kind, way, size, group)


def run(plan: Plan, rank: Rank, folder: Path) -> None:
    """Measures all that ``plan`` asks for as ``rank``; writes it into ``folder``/rank-R.json.

    Raises:
        RunError: a result is wrong, or a rank did not come.
        UsageError: the way does not fit this machine.
    """
    torch.set_num_threads(1)
    nccl = plan.way == "nccl"
    backend = ["--backend", "nccl", "--device", "cuda"] if nccl else ["--backend", "gloo", "--device", "cpu"]
    config = parse_config("collective_ranks.py", argv=[*backend, "--threads", "1", "--timeout", f"{plan.limit_s:g}"])
    arrival = announce(rank, config)
    device = choose_device(config, rank)
    measured: list[dict[str, Any]] = []
    with process_group(arrival, device) as group:
        barrier = Barrier(group, folder)
        call_of = calls(plan, group, barrier, folder)
        gc.disable()  # a collection would be timed as communication
        for kind in plan.collectives:
            for size in plan.sizes:
                call = call_of(kind, size)
                what = f"{kind} of {size_text(call.n_bytes)} ({plan.way})"
                seconds = measure(call, what, group, barrier, iterations(size, plan.bytes_per_s))
                measured.append({"collective": kind, "size": size, "bytes": call.n_bytes, "seconds": seconds})
                del call
                gc.collect()
        gc.enable()
        barrier()
    write_json(folder / f"rank-{rank.rank}.json", {"device": _name(device), "measured": measured})


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
