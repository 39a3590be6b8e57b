"""Joining and leaving the process group: who is missing, who was told something else, which interface."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from common import names, now
from common.cgroup import cpu_quota
from common.claims import check_claims, claim
from common.config import OUTPUTS, START_FLAGS, TrainConfig
from common.device import choose_backend, share_of_cores, usable_cores
from common.errors import RunError, UsageError
from common.events import clock_id
from common.interfaces import own_address, way_out
from common.meeting import Meeting, Waiting, open_store
from common.rank import Rank, on_this_machine
from common.values import AS_SHIPPED

# What may differ between nodes: files, and how each node was started.
_PER_NODE = (*OUTPUTS, *START_FLAGS, "data_dir", "cache_dir", "resume", "log_every", "log_all_ranks", "debug", "threads")
_CLOCK_TURNS = 12  # questions to rank 0's clock; the first only opens the way


@dataclass(frozen=True)
class Clock:
    """This rank's clock against rank 0's."""

    offset_seconds: float = 0.0
    """To be added to this rank's times to get rank 0's."""
    round_trip_seconds: float = 0.0
    """Of the question that told: twice the largest error. 0: the same clock."""


@dataclass(frozen=True)
class Group:
    """The ranks that train together; a process on its own is a group of one without a backend."""

    rank: Rank
    device: torch.device
    backend: str | None = None
    arrivals: list[dict[str, Any]] = field(default_factory=list)
    """What each rank wrote into the store before it joined: host, address, pid, node_rank, cores, quota, clock, …"""
    clock: Clock = field(default_factory=Clock)
    meeting: Meeting | None = None
    """Where the ranks met; None for a process on its own."""
    network: str = ""
    """Over which interface this node's ranks talk to other nodes', and why; "" where there are none."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum of ``values`` (float64 on CPU, any shape) over all ranks, on every rank."""
        if self.backend is None or self.rank.world_size == 1:
            return values
        carried = values.to(self.device if self.backend == "nccl" else "cpu", copy=True)  # the caller's stay as they are
        carry_out(lambda: dist.all_reduce(carried), [carried], wait=self.backend == "gloo")
        return carried.cpu()

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` (float64 on CPU, shape (n,)) of every rank: shape (world size, n)."""
        table = torch.zeros(self.rank.world_size, len(values), dtype=torch.float64)
        table[self.rank.rank] = values
        return self.sum(table)

    def local_cores(self) -> list[list[int]]:
        """The usable cores of each rank on this node."""
        return [a["cores"] for a in self.arrivals if a["node_rank"] == self.rank.node_rank]

    def threads(self, config: TrainConfig, found: int) -> int:
        """The CPU threads that this rank trains with: ``--threads``, else its share of the node's cores, as far as it was granted.

        Args:
            config: the run.
            found: what the launcher left.
        """
        if config.threads == AS_SHIPPED:
            return found
        mine = self.arrivals[self.rank.rank]
        # Containers and virtual hosts are nodes of their own, and on one machine share its cores all the same.
        sharing = [a["cores"] for a in self.arrivals if a["clock"] == mine["clock"]]
        quota = mine["quota"] and mine["quota"] / len(self.local_cores())
        share = share_of_cores(mine["cores"], sharing, quota)
        return config.threads or min(share, self.rank.cpus or share)


def _references(tensors: Sequence[torch.Tensor]) -> int:
    """How many hold one of ``tensors``, in C++ and in Python."""
    return sum(int(t._use_count()) + sys.getrefcount(t) for t in tensors)  # type: ignore[attr-defined,misc]


def carry_out(collective: Callable[[], object], tensors: Sequence[torch.Tensor], wait: bool, limit: float = 1.0) -> None:
    """Runs ``collective`` and waits until gloo's own thread has let go of its tensors, microseconds later.

    That thread needs the interpreter for it. If the interpreter is ending by then, the process dies with "terminate called
    without an active exception" after a run that went well (5 of 11 short runs of two to four ranks; one of 21 where only
    the count of C++ was waited for: the thread lowers that first, then waits for the interpreter to lower Python's): once DDP
    has seen the group, its threads outlive ``destroy_process_group`` (torch 2.13).

    Args:
        collective: does it.
        tensors: those that it reads or writes.
        wait: whether to wait; other backends have no such thread.
        limit: seconds to wait at the most.
    """
    before = _references(tensors)
    collective()
    until = time.monotonic() + limit
    while wait and _references(tensors) > before and time.monotonic() < until:
        time.sleep(0.0002)


@dataclass(frozen=True)
class Arrival:
    """A rank that the others can see, and that has not joined them yet."""

    rank: Rank
    config: TrainConfig
    here: dict[str, Any]
    """What it wrote into the store."""
    meeting: Meeting | None
    """Where it is seen; None for a process on its own."""
    until: float
    """When its patience ends (``time.monotonic``)."""


def announce(rank: Rank, config: TrainConfig, started: float | None = None) -> Arrival:
    """Writes ``rank`` into the store and returns at once, so that it can do what it needs nobody for.

    Args:
        rank: this process.
        config: what it was told.
        started: when its launcher's command started, on ``common.now``'s clock.

    Raises:
        RunError: nobody serves the store within ``config.patience`` seconds.
        UsageError: the master's port is taken.
    """
    told = {name: value for name, value in dataclasses.asdict(config).items() if name not in _PER_NODE}
    here = {
        "host": socket.gethostname(),
        "address": None if rank.one_node else own_address(rank.master_addr or ""),
        "pid": os.getpid(),
        "node_rank": rank.node_rank,
        "local_rank": rank.local_rank,
        "cores": sorted(usable_cores()),
        "quota": cpu_quota(),
        "clock": clock_id(),
        "command_started": started,
        "told": told | {"world size": rank.world_size},
    }
    patience = config.patience(rank.one_node)
    until = time.monotonic() + patience
    meeting = None
    if rank.forms_group:
        if on_this_machine(rank.master_addr):
            names.from_files_only()
        meeting = Meeting(open_store(rank, until, patience), rank, patience)
        claim(meeting.store, rank, here)
        meeting.link.offer()
        meeting.tell("here", here)
        meeting.link.seek()
    return Arrival(rank, config, here, meeting, until)


def _wait_for_all(meeting: Meeting, until: float) -> list[dict[str, Any]]:
    """Waits for the others, and compares what all were told.

    Raises:
        RunError: ranks are missing when the time is up; they are named.
        UsageError: ranks were given different flags (raised on all of them).
    """
    hint = ": started at all, and with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE?"
    waiting = Waiting(meeting.rank, meeting.patience)

    def meanwhile(missing: Callable[[], str]) -> None:
        meeting.link.seek()
        waiting(missing)

    arrivals: list[dict[str, Any]] = meeting.hear("here", "did not arrive", hint, until, meanwhile)
    meeting.link.seek()
    check_claims(arrivals)
    for number, other in enumerate(arrivals):
        for name, value in other["told"].items():
            first = arrivals[0]["told"][name]
            if value != first:
                raise UsageError(
                    f"rank {number} was given {name} {value} where rank 0 has {first}: ranks must agree; give all the same flags"
                )
    return arrivals


@contextmanager
def refused_together(arrival: Arrival) -> Iterator[None]:
    """What is refused within it is raised once all ranks are there, or will not come: one watcher hears of it and tells it once."""
    try:
        yield
    except UsageError:
        if meeting := arrival.meeting:
            with suppress(RunError, RuntimeError):  # who is refused needs no second reason
                meeting.hear("here", "did not arrive", until=arrival.until)
                meeting.tell("refused", None)
                if arrival.rank.serves_store:  # unless its launcher does: the store complains at length in those that it leaves
                    meeting.hear("refused", "was not refused", until=time.monotonic() + 1)
        raise


def _compare_clocks(rank: int, arrivals: list[dict[str, Any]], store: dist.Store) -> Clock:
    """How far this rank's clock is from rank 0's: asks it over the store, and takes the quickest of several answers.

    The answer was given between asking and hearing it, so the error is at most half the round trip (Cristian 1989,
    "Probabilistic clock synchronization"). Ranks that share a clock ask once; on one machine nobody asks.
    """
    clocks = {arrival["clock"]: number for number, arrival in reversed(list(enumerate(arrivals)))}  # the first rank with each
    mine = arrivals[rank]["clock"]
    if rank == 0:
        for asker in sorted(set(clocks.values()) - {0}):
            for turn in range(_CLOCK_TURNS):
                store.get(f"clock/{asker}/asked/{turn}")
                store.set(f"clock/{asker}/answer/{turn}", repr(now()))
    elif mine != arrivals[0]["clock"]:
        asker, best = clocks[mine], None
        for turn in range(_CLOCK_TURNS if asker == rank else 0):
            asked = now()
            store.set(f"clock/{rank}/asked/{turn}", "")
            answer = float(store.get(f"clock/{rank}/answer/{turn}"))
            heard = now()
            best = min(best or (heard - asked, 0.0), (heard - asked, answer - (asked + heard) / 2)) if turn else None
        if best:
            store.set(f"clock/{rank}/found", json.dumps(best))
        round_trip, offset = json.loads(store.get(f"clock/{asker}/found"))
        return Clock(offset, round_trip)
    return Clock()


def _choose_interface(rank: Rank, backend: str, arrivals: Sequence[Mapping[str, Any]]) -> str:
    """Sets the group's interface unless the user has: gloo else takes the one of the host name's address, NCCL any.

    Ranks of one node talk over the loopback interface; over several the kernel's route decides.

    Returns:
        What was chosen and why, where there are several nodes; "" for one.

    Raises:
        UsageError: GLOO_SOCKET_IFNAME names an interface that this machine does not have.
    """
    variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    if not hasattr(socket, "if_nameindex"):
        return ""
    there = [name for _, name in socket.if_nameindex()]
    given = os.environ.get(variable, "")
    for name in filter(None, given.split(",") if backend == "gloo" else ()):
        if name not in there:
            raise UsageError(f"{variable}={name}: no such interface; this machine has {', '.join(there)}: name one or unset it")
    if rank.one_node:
        loopback = next((name for name in ("lo", "lo0") if name in there), None)
        if loopback and backend == "gloo" and variable not in os.environ:
            os.environ[variable] = loopback
        return ""
    if variable in os.environ:
        return f"{backend} over {given}, as {variable} says"
    others = [a["address"] for a in arrivals if a["node_rank"] != rank.node_rank and a["address"]]
    interface, why = way_out(rank.master_addr or "", others)
    if not interface:
        return f"{backend} over an interface of its own choice: no route to {rank.master_addr} was found"
    os.environ[variable] = f"={interface.name}" if backend == "nccl" else interface.name  # NCCL takes beginnings of names too
    if backend == "nccl" and interface.family == socket.AF_INET6:
        os.environ.setdefault("NCCL_SOCKET_FAMILY", "AF_INET6")
    return f"{backend} over {interface.name} ({interface.address}): {why}"


@contextmanager
def process_group(arrival: Arrival, device: torch.device, arrived: Callable[[Group], None] = lambda group: None) -> Iterator[Group]:
    """Joins the group, and leaves it when the work is done; a process on its own gets a group of one.

    Args:
        arrival: this process.
        device: where it computes.
        arrived: called once all ranks are there, before they join: the network between them is yet untried.

    Raises:
        RunError: a rank did not arrive in time; it is named.
        UsageError: ranks disagree on their flags.
    """
    rank, meeting = arrival.rank, arrival.meeting
    if meeting is None:
        group = Group(rank, device, None, [arrival.here])
        arrived(group)
        yield group
        return
    backend = choose_backend(arrival.config, device)
    with refused_together(arrival):
        arrivals = _wait_for_all(meeting, arrival.until)
        network = _choose_interface(rank, backend, arrivals)
    group = Group(rank, device, backend, arrivals, _compare_clocks(rank.rank, arrivals, meeting.store), meeting, network)
    arrived(group)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", meeting.store),
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=meeting.patience),
        device_id=device if backend == "nccl" else None,
    )
    yield group
    # Not in a `finally`: after a failure peers may be gone and destroying can wait for them; the process is about to end.
    dist.destroy_process_group()
