"""What carries the bytes: gloo, NCCL, MPI, one machine's shared memory, or a class of yours.

A way has four methods, whose tensors are contiguous float32:

    all_reduce(tensor)                  the sum over the ranks, in place
    all_gather(output, own)             every rank's ``own``, one after the other
    reduce_scatter(output, own)         this rank's part of the sum of everyone's ``own``
    broadcast(tensor, src)              ``tensor`` becomes rank src's

Each returns when the result is there for this rank to read (on CUDA: when that has been asked of the device).
``--ways module:Class`` measures your own, from the folder you are in: it is made with ``group`` (common.process_group.Group), if
it has a parameter of that name. A subclass of ``Backend`` need only have the methods that differ.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from common import parts, shared_memory
from common.device import visible_gpus
from common.errors import UsageError
from common.ports import PortReservation
from common.process_group import Group
from common.rank import Rank


class Way(Protocol):
    """Four collectives."""

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over the ranks, in place."""

    def all_gather(self, output: Tensor, own: Tensor) -> None:
        """Every rank's ``own`` (n elements) in ``output`` (world size × n)."""

    def reduce_scatter(self, output: Tensor, own: Tensor) -> None:
        """This rank's part (n elements) of the sum of everyone's ``own`` (world size × n)."""

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """``tensor`` becomes rank ``src``'s."""


class Backend:
    """A backend of torch.distributed: gloo or NCCL, whichever the process group has."""

    # torch 2.13 has new names for both and warns of the old ones.
    _gather = staticmethod(getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)
    _scatter = staticmethod(getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)

    def all_reduce(self, tensor: Tensor) -> None:
        """torch.distributed's."""
        dist.all_reduce(tensor)

    def all_gather(self, output: Tensor, own: Tensor) -> None:
        """torch.distributed's, into one tensor."""
        self._gather(output, own)

    def reduce_scatter(self, output: Tensor, own: Tensor) -> None:
        """torch.distributed's, from one tensor."""
        self._scatter(output, own)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """torch.distributed's."""
        dist.broadcast(tensor, src)


class Mpi:
    """MPI through mpi4py, straight from and into the tensors' memory (CPU)."""

    def __init__(self) -> None:
        """Joins the MPI world."""
        from mpi4py import MPI

        self.comm, self.in_place = MPI.COMM_WORLD, MPI.IN_PLACE

    def all_reduce(self, tensor: Tensor) -> None:
        """MPI_Allreduce with MPI_IN_PLACE."""
        self.comm.Allreduce(self.in_place, tensor.numpy())

    def all_gather(self, output: Tensor, own: Tensor) -> None:
        """MPI_Allgather."""
        self.comm.Allgather(own.numpy(), output.numpy())

    def reduce_scatter(self, output: Tensor, own: Tensor) -> None:
        """MPI_Reduce_scatter_block."""
        self.comm.Reduce_scatter_block(own.numpy(), output.numpy())

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """MPI_Bcast."""
        self.comm.Bcast(tensor.numpy(), root=src)


def make(name: str, group: Group, largest: int) -> Way:
    """The way called ``name``.

    Args:
        name: gloo, nccl, mpi, shared_memory, or module:Class.
        group: the ranks.
        largest: bytes of the largest message.

    Raises:
        UsageError: it cannot be made.
    """
    if name in ("gloo", "nccl"):
        return Backend()
    if name == "mpi":
        return Mpi()
    if name == "shared_memory":
        if reason := shared_memory.obstacle(group.rank, group.device):
            raise UsageError(f"--ways shared_memory: {reason}; leave it out")
        return shared_memory.SharedMemory(group, largest)
    made: Way = parts.build("--ways", name, parts.load_class("--ways", name), {"group": group})
    return made


def rank_from_mpi() -> tuple[Rank, PortReservation | None]:
    """The rank that mpirun made this process, on one machine; and on rank 0 its hold on the port."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    port = PortReservation(0) if comm.rank == 0 else None
    number = comm.bcast(port.port if port else 0)
    return Rank("mpi", comm.rank, comm.size, comm.rank, comm.size, 0, "127.0.0.1", number), port


def abort(status: int) -> None:
    """Ends all of the MPI's ranks: leaving with an exception would wait in MPI_Finalize for the others."""
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(status)


def tell(own: str) -> None:
    """Prints as JSON what is here: gpus, why shared memory cannot be used, and why each of ``own`` (a JSON list) cannot."""
    ranks = Rank("collectives", 0, 2, 0, 2, 0, "127.0.0.1", 1)
    told: dict[str, Any] = {"gpus": visible_gpus(), "shared_memory": shared_memory.obstacle(ranks, torch.device("cpu"))}
    for name in json.loads(own):
        try:
            parts.load_class("--ways", name)
            told[name] = ""
        except UsageError as reason:
            told[name] = str(reason)
    print(json.dumps(told))
