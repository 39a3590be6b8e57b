"""One machine's ranks make one of their tensors through a buffer that all of them map: ``--sync shared_memory``.

Every rank writes its part into a slot of its own, waits at a barrier for the others, and reads theirs: two copies through the
caches, where a backend made for networks sends every byte through a socket. Slots come in pairs used in turn: who writes slot A
again has passed the barrier of slot B, which all others reached after they had read slot A.

Memory ordering: a counter must not be seen before the data that was written before it. x86-64 keeps stores in order, and loads
(Intel's manual, volume 3, "Memory Ordering"; AMD's, volume 2, 7.2), and an aligned word is written whole; so is what a string store
wrote, as memmove uses them, for who sees a later store (Intel, ibid., "Fast-String Operation"). Other architectures would need
fences that Python does not have, so they are refused. Nothing has a name in /dev/shm: the buffer is a memfd (memfd_create(2)),
which is gone with the last process that maps it, however that ends.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import RunError, UsageError
from common.process_group import Group
from common.rank import Rank
from common.sampling import part_of

LINE = 128  # bytes between counters: two cache lines, because processors fetch them in pairs
SLOT = 1 << 20  # bytes of a slot at the most: larger tensors go through in pieces, which stay in the caches
DIRECT = 1 << 14  # bytes up to which every rank adds up everything, whatever the number of ranks: one barrier less
# Of what memmove stores as a string, without first fetching what it overwrites. Where the neighbour's core, which has read that
# before, shares no cache with this one, 4 MiB are reduced in 250 µs instead of 610; where it does, in 210 instead of 230.
_BLOCK = 1 << 18
_ALIGN = 4096
# Of waiting without letting go of the core. A nap takes 130 µs whatever it was meant to, and finds the caches cold: a rank that
# naps comes late, the others nap in turn, and so on for ever (a step of 134 µs took 190 to 270). So ranks spin for longer than it;
# but where waits are longer still, because another process has the core, spinning only takes time from who is waited for (beside
# one busy process a step takes up to 1.4 times as long). Each wait tells the next. sched_yield gains nothing on free cores, and
# loses milliseconds on busy ones.
_SPIN_S = 0.0003
_SPIN_AFTER_LONG_S = 0.00005
_CROWDED_SPIN_S = 0.00001  # where ranks share cores
_NAP_S = 0.00005
_made = count()


def obstacle(rank: Rank, device: torch.device) -> str:
    """Why ``rank`` cannot share memory with the others; empty if it can."""
    if not hasattr(os, "memfd_create") or not os.path.isdir("/proc/self/fd"):
        return f"{sys.platform} has no memory to share that ends with its processes (memfd, /proc)"
    if platform.machine() not in ("x86_64", "AMD64"):
        return (
            f"{platform.machine()} processors may show other ranks two writes in the wrong order; only x86-64 keeps them in order"
        )
    if device.type != "cpu":
        return f"gradients on {device.type} are not in the machine's memory"
    if not rank.one_node:
        return f"the {rank.world_size} ranks are on several machines, which share no memory"
    return ""


def map_together(group: Group, name: str, size: int) -> mmap.mmap:
    """``size`` bytes, at least 16, that all ranks of ``group`` map: rank 0 makes them, the others open them through its process.

    They are zeros, but for the last 16. ``name`` is for this memory only, and the same on all ranks.

    Raises:
        UsageError: a rank cannot open the memory: it is in another container or belongs to another user.
        RunError: a rank did not come in time.
    """
    if group.meeting is None:
        return mmap.mmap(-1, size)
    rank = group.rank.rank
    token = secrets.token_hex(8)
    made = os.memfd_create("launchlab") if rank == 0 else -1
    if made >= 0:
        os.ftruncate(made, size)
    group.meeting.tell(name, {"pid": os.getpid(), "fd": made, "token": token})
    first = group.meeting.hear(name, "did not come to share memory")[0]
    failure, memory = None, None
    try:
        # In another PID namespace this is nobody, or somebody else: the token tells.
        fd = made if made >= 0 else os.open(f"/proc/{first['pid']}/fd/{first['fd']}", os.O_RDWR)
        memory = mmap.mmap(fd, size)
        if made >= 0:
            memory[-len(token) :] = token.encode()
        else:
            os.close(fd)
    except (OSError, ValueError) as error:
        failure = f"rank {rank} cannot open rank 0's memory ({error})"
    group.meeting.tell(f"{name} mapped", failure)
    failures = group.meeting.hear(f"{name} mapped", "did not map the shared memory")
    if memory is not None and memory[-len(token) :] != first["token"].encode():
        failure = f"rank {rank} found other memory in the place of rank 0's"
    group.meeting.tell(f"{name} checked", failure)
    failures += group.meeting.hear(f"{name} checked", "did not check the shared memory")
    if made >= 0:
        os.close(made)
    if reasons := [reason for reason in failures if reason]:
        raise UsageError(
            f"--sync shared_memory: {reasons[0]}; ranks must be in one container and belong to one user; give --sync ddp"
        )
    assert memory is not None
    return memory


class SharedMemory:
    """Collectives of the ranks of one machine, on CPU tensors. Every rank calls the same ones in the same order."""

    def __init__(self, group: Group, capacity: int = SLOT) -> None:
        """All ranks of ``group`` make it together.

        Args:
            group: the ranks; it knows where they meet.
            capacity: bytes of the largest tensor; a larger one goes through in pieces all the same.

        Raises:
            UsageError: a rank cannot open the memory: it is in another container or belongs to another user.
            RunError: a rank did not come in time.
        """
        self.rank, self.world_size, self.patience = group.rank.rank, group.rank.world_size, 0.0
        self.slot = min(SLOT, -(-max(capacity, 1) // _ALIGN) * _ALIGN)
        header = -(-LINE * self.world_size // _ALIGN) * _ALIGN
        rows = 2 * (self.world_size + 1)  # a row more for results
        if group.meeting:
            self.patience = group.meeting.patience
        memory = map_together(group, f"shared memory {next(_made)}", header + rows * self.slot)
        self._counters = memoryview(memory)[:header].cast("Q")
        self._own = self.rank * LINE // 8
        self._others = [r * LINE // 8 for r in range(self.world_size) if r != self.rank]
        self._slots = torch.frombuffer(memory, dtype=torch.uint8, offset=header).view(2, self.world_size + 1, self.slot)
        self._turn = 0
        self._views: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}
        cores = set().union(*group.local_cores()) if group.arrivals else set()
        quota = group.arrivals[self.rank].get("quota") if group.arrivals else None
        self._crowded = self.world_size > (len(cores) if quota is None else min(len(cores), quota))
        self._spin = _CROWDED_SPIN_S if self._crowded else _SPIN_S

    def barrier(self) -> None:
        """Returns once every rank has called it as often as this one.

        Raises:
            RunError: a rank did not come within ``--timeout``; it is named.
        """
        self._turn += 1
        turn, counters = self._turn, self._counters
        counters[self._own] = turn
        for other in self._others:
            if counters[other] < turn:
                self._await(other, turn)

    def _await(self, other: int, turn: int) -> None:
        """Spins, then sleeps, until the counter at ``other`` has reached ``turn``."""
        counters, clock = self._counters, time.perf_counter
        began = clock()
        while clock() - began < self._spin:
            for _ in range(20):
                if counters[other] >= turn:
                    self._note_wait(clock() - began)
                    return
        nap = _NAP_S
        while counters[other] < turn:
            time.sleep(nap)
            waited = clock() - began
            nap = min(0.001, waited / 20)
            if waited > self.patience:
                silent = [str(r) for r in range(self.world_size) if counters[r * LINE // 8] < turn]
                raise RunError(
                    f"rank{'s' * (len(silent) > 1)} {', '.join(silent)} of {self.world_size} did not come to the all-reduce within "
                    f"{self.patience:g} s (--timeout)"
                )
        self._note_wait(clock() - began)

    def _note_wait(self, seconds: float) -> None:
        if not self._crowded:
            self._spin = _SPIN_S if seconds < _SPIN_S else _SPIN_AFTER_LONG_S

    def _rows(self, numel: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``numel`` elements of the slots whose turn it is, shape (world size, numel), and as many for a result."""
        key = (self._turn & 1, numel, dtype)
        found = self._views.get(key)
        if found is None:
            rows = self._slots[self._turn & 1, :, : numel * dtype.itemsize].view(dtype)
            found = self._views[key] = (rows[: self.world_size], rows[self.world_size])
        return found

    def _share(self, elements: int, itemsize: int, rows: int = 1) -> list[slice]:
        """``elements`` cut into parts of which ``rows`` fit into a slot."""
        most = max(1, self.slot // (itemsize * rows))
        return [slice(first, min(first + most, elements)) for first in range(0, elements, most)]

    def all_reduce(self, tensor: Tensor, mean: bool = False) -> None:
        """``tensor`` (any shape) becomes the sum over the ranks, or their mean: the same bits on all of them.

        For the mean each rank multiplies its own by 1 / world size first, as DDP does.
        """
        flat = tensor.reshape(-1)  # a copy where the tensor is not contiguous
        if flat.nbytes <= self.slot:
            self._reduce(flat, mean)
        else:
            for part in self._share(flat.numel(), flat.itemsize):
                self._reduce(flat[part], mean)
        if not tensor.is_contiguous():
            tensor.copy_(flat.view(tensor.shape))

    def _reduce(self, piece: Tensor, mean: bool) -> None:
        rows, result = self._rows(piece.numel(), piece.dtype)
        if mean:
            piece.mul_(1 / self.world_size)
        _write(rows[self.rank], piece)
        self.barrier()
        if self.world_size == 2:
            piece.add_(rows[1 - self.rank])  # a + b is b + a, in bits too
        elif piece.nbytes <= DIRECT:
            torch.sum(rows, 0, out=piece)
        else:  # everyone adds up one part, then takes all parts
            mine = part_of(piece.numel(), self.world_size, self.rank)
            torch.sum(rows[:, mine], 0, out=result[mine])
            self.barrier()
            piece.copy_(result)

    def all_gather(self, output: Tensor, own: Tensor) -> None:
        """Each rank's ``own`` (n elements) one after the other in ``output`` (contiguous, world size × n elements)."""
        flat, table = own.reshape(-1), output.view(self.world_size, -1)
        for part in self._share(flat.numel(), flat.itemsize):
            piece = flat[part]
            rows, _ = self._rows(piece.numel(), piece.dtype)
            _write(rows[self.rank], piece)
            self.barrier()
            table[:, part].copy_(rows)

    def reduce_scatter(self, output: Tensor, own: Tensor) -> None:
        """The sum of this rank's part of everyone's ``own`` (world size × n elements) in ``output`` (contiguous, n elements)."""
        table, flat = own.reshape(self.world_size, -1), output.view(-1)
        for part in self._share(flat.numel(), flat.itemsize, self.world_size):
            piece = table[:, part]
            rows, _ = self._rows(piece.numel(), piece.dtype)
            rows[self.rank].view_as(piece).copy_(piece)
            self.barrier()
            torch.sum(rows.view(self.world_size, *piece.shape)[:, self.rank], 0, out=flat[part])

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """``tensor`` (contiguous) becomes rank ``src``'s."""
        flat = tensor.view(-1)
        for part in self._share(flat.numel(), flat.itemsize):
            piece = flat[part]
            rows, _ = self._rows(piece.numel(), piece.dtype)
            if self.rank == src:
                _write(rows[src], piece)
            self.barrier()
            if self.rank != src:
                piece.copy_(rows[src])

    def close(self) -> None:
        """Lets go of the memory."""
        self._views.clear()
        del self._slots, self._counters


def _write(row: Tensor, piece: Tensor) -> None:
    """Copies ``piece`` into ``row``, both contiguous and of one size."""
    size = piece.nbytes
    if size <= DIRECT:
        row.copy_(piece)
        return
    to, source = row.data_ptr(), piece.data_ptr()
    for at in range(0, size, _BLOCK):
        ctypes.memmove(to + at, source + at, min(_BLOCK, size - at))


def average(memory: SharedMemory, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the bucket's mean over the ranks."""
    gradients = bucket.buffer()
    memory.all_reduce(gradients, mean=True)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradients)
    return done


def hook(group: Group, model: nn.Module) -> tuple[Callable[..., Any], SharedMemory]:
    """(hook, state) for DDP."""
    return average, SharedMemory(group, sum(p.nbytes for p in model.parameters() if p.requires_grad))
