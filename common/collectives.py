"""Each collective on small tensors, its result checked on every rank against what it must be."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from common.device import wait_for
from common.process_group import Group, carry_out

ROUNDS = 2  # the first opens connections and brings the ranks together; the last is timed
STAGGER_S = 0.03  # between the first and the last rank that enter the barrier


@dataclass(frozen=True)
class Collective:
    """One collective, from or to a root if it has one."""

    kind: str
    root: int | None = None

    def __str__(self) -> str:
        """Its name for people."""
        if self.root is None:
            return self.kind
        return f"{self.kind} {'to' if self.kind == 'reduce' else 'from'} rank {self.root}"

    def gives(self, rank: int, world_size: int) -> list[int]:
        """What ``rank`` puts in: rank r is known by r + 1, because 0 may also be a number that never came."""
        if self.kind in ("all_reduce", "reduce"):  # a place for each rank: a lost or doubled one shows in its own
            return [rank + 1 if place == rank else 0 for place in range(world_size)]
        return [rank + 1 if self.root in (None, rank) else 0]

    def expected(self, rank: int, world_size: int) -> list[int] | None:
        """What ``rank`` must get out; None where the collective promises nothing."""
        if self.kind == "reduce" and rank != self.root:
            return None
        if self.kind == "barrier":  # which ranks had entered before this one left: all
            return [1] * world_size
        if self.kind == "broadcast":
            assert self.root is not None
            return [self.root + 1]
        if self.kind == "scatter":
            return [rank + 1]
        return [r + 1 for r in range(world_size)]


def collectives(world_size: int) -> list[Collective]:
    """All that is checked: those with a root from the first rank and, if there are several, from the last."""
    roots = sorted({0, world_size - 1})
    rooted = [Collective(kind, root) for kind in ("broadcast", "reduce", "scatter") for root in roots]
    return [Collective("all_reduce"), Collective("all_gather"), *rooted, Collective("barrier")]


@dataclass(frozen=True)
class Check:
    """What came of one collective."""

    collective: Collective
    right: tuple[int, ...]
    """The ranks whose result was what it must be."""
    wrong: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)
    """By rank: what it got, and what that must be."""
    seconds: float = 0.0

    @classmethod
    def of_all(cls, told: Sequence[dict[str, Any]]) -> Check:
        """From what every rank told (``check_collectives``), in rank order."""
        collective = Collective(told[0]["kind"], told[0]["root"])
        pairs = {rank: (t["got"], t["expected"]) for rank, t in enumerate(told) if t["expected"] is not None}
        wrong = {rank: pair for rank, pair in pairs.items() if pair[0] != pair[1]}
        # A barrier's own time is that of the rank that entered last; the others also waited for it.
        slowest = (min if collective.kind == "barrier" else max)(t["seconds"] for t in told)
        return cls(collective, tuple(rank for rank in pairs if rank not in wrong), wrong, slowest)

    def line(self, world_size: int) -> str:
        """One line for the screen."""
        if self.wrong:
            return self.sentence()
        where = f"all {world_size} ranks" if len(self.right) == world_size > 1 else f"rank {self.right[0]}"
        return f"{self.collective}: right on {where} ({1000 * self.seconds:.1f} ms)"

    def sentence(self) -> str:
        """What is wrong, on which ranks."""
        if self.collective.kind == "barrier":
            found = [
                f"rank {rank} left before rank{'s' * (got.count(0) > 1)} "
                f"{', '.join(str(r) for r, entered in enumerate(got) if not entered)} entered"
                for rank, (got, _) in self.wrong.items()
            ]
        else:
            found = [f"rank {rank} got {_some(got)}, must be {_some(must)}" for rank, (got, must) in self.wrong.items()]
        return f"{self.collective}: wrong, {', '.join(found[:8])}{f', and {len(found) - 8} more' if len(found) > 8 else ''}"

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "collective": self.collective.kind,
            "root": self.collective.root,
            "right_on": self.right,
            "wrong_on": [{"rank": rank, "got": got, "expected": must} for rank, (got, must) in self.wrong.items()],
            "seconds": self.seconds,
        }


def _some(numbers: Sequence[int], limit: int = 16) -> str:
    """A list as text, long ones cut."""
    return f"[{', '.join(map(str, numbers[:limit]))}{', …' if len(numbers) > limit else ''}]"


def check_collectives(group: Group) -> list[dict[str, Any]]:
    """Runs all collectives on every rank of ``group``; returns what this rank got, fit for JSON.

    Raises:
        RunError: a rank did not come to one of them; it is named.
    """
    assert group.meeting
    told = []
    for collective in collectives(group.rank.world_size):
        must = collective.expected(group.rank.rank, group.rank.world_size)
        rounds = [_run_together(collective, group, number) for number in range(ROUNDS)]
        got = next((got for got, _ in rounds if got != must), must)  # of all rounds, the first that went wrong
        told.append(
            {
                "kind": collective.kind,
                "root": collective.root,
                "got": None if must is None else got,
                "expected": must,
                "seconds": rounds[-1][1],
            }
        )
    return told


def _run_together(collective: Collective, group: Group, number: int) -> tuple[list[int], float]:
    """As ``run_once``; a rank that is stuck elsewhere is named, where the backend would only say that time is up."""
    assert group.meeting
    step, absent = f"inspect/{collective}, round {number}", f"did not come to {collective}"
    group.meeting.tell(step, None)
    if number == 0:  # not before the round that is timed: they would enter it when each next looks into the store
        group.meeting.hear(step, absent)
    try:
        return run_once(collective, group, number)
    except RuntimeError:
        group.meeting.hear(step, absent, until=time.monotonic())
        raise


def run_once(collective: Collective, group: Group, number: int) -> tuple[list[int], float]:
    """(what this rank got, seconds that it took here) of the ``number``-th round of ``collective``."""
    me, world_size, root = group.rank.rank, group.rank.world_size, collective.root
    if collective.kind == "barrier":
        return _barrier(group, number)
    device = group.device if group.backend == "nccl" else torch.device("cpu")  # what the backend takes

    def tensor(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    own = tensor(*collective.gives(me, world_size))
    outputs = [tensor(0) for _ in range({"all_gather": world_size, "scatter": 1}.get(collective.kind, 0))]
    pieces = [tensor(r + 1) for r in range(world_size)] if collective.kind == "scatter" and me == root else None
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(own),
        "all_gather": lambda: dist.all_gather(outputs, own),
        "broadcast": lambda: dist.broadcast(own, src=root),
        "reduce": lambda: dist.reduce(own, dst=root),
        "scatter": lambda: dist.scatter(outputs[0], pieces, src=root),
    }
    marks: list[float] = []

    def timed() -> None:
        marks.append(time.perf_counter())
        calls[collective.kind]()
        wait_for(device)
        marks.append(time.perf_counter())

    carry_out(timed, [own, *outputs, *(pieces or [])], wait=group.backend == "gloo")
    return torch.cat(outputs or [own]).tolist(), marks[1] - marks[0]


def _barrier(group: Group, number: int) -> tuple[list[int], float]:
    """Enters one after the other, then leaves; got: 1 for each rank that had entered when this one left.

    No clock is compared, so that it holds between machines too. In the next round the order is the other way round: a rank
    that waits for nobody is then early.
    """
    assert group.meeting
    me, world_size, store = group.rank.rank, group.rank.world_size, group.meeting.store
    turn = me if number % 2 == 0 else world_size - 1 - me
    time.sleep(STAGGER_S * turn / max(1, world_size - 1))
    entered = f"inspect/barrier {number} entered"
    store.add(f"{entered}/{me}", 1)  # not set(), which does not wait until the store has it
    began = time.perf_counter()
    dist.barrier()
    seconds = time.perf_counter() - began
    return [int(store.check([f"{entered}/{r}"])) for r in range(world_size)], seconds
