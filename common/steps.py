"""Where a training step's time goes: a clock reading at the end of each of its parts, with ``--step_times``.

Parts follow each other without a gap, so they add up to the step. What is looked for is exposed communication, which backward does
not hide. Where it comes after backward (by hand), it is a part like any other. DistributedDataParallel communicates within
backward: there every ``PROBE_EVERY``-th step is a probe, whose forward and backward run under ``no_sync``, so that its backward is
timed without communication; the gradients are then averaged by hand, outside what is timed, so that training stays what it is (and
uncompressed, with --compress). That sends the ranks to sleep and leaves the caches cold, so the step after a probe is not counted.
The exposed communication is a rank's median backward less its median backward in probes. It holds all that averaging adds to
backward: the messages, DDP's own work (its buckets, its hooks), and waiting for a slower rank. What DDP adds to forward stays in
forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import nn

from common.config import WITH_DDP, TrainConfig
from common.device import wait_for
from common.gradients import ByHandFlat, Gradients, Way
from common.process_group import Group

PARTS = ("data", "forward", "backward", "communication", "optimizer", "rest")
"""optimizer: zero_grad too; rest: the loss's sum, and what the loop itself costs."""
PROBE_EVERY = 8
KEPT = 100  # raw steps a rank in a result file: the last ones; medians are over all

T = TypeVar("T")


class Untimed:
    """Notes nothing."""

    probing = False

    def averaging(self, gradients: Gradients) -> Gradients:
        """``gradients``, which average this step too."""
        return gradients

    def steps(self, shares: Iterable[T]) -> Iterable[T]:
        """``shares`` as they are."""
        return shares

    def mark(self, part: str) -> None:
        """Nothing."""

    def gathered(self) -> dict[str, Any] | None:
        """Nothing."""
        return None


class StepTimes(Untimed):
    """One rank's clock readings."""

    def __init__(self, group: Group, way: Way, model: nn.Module) -> None:
        """For ``group``, which averages ``model``'s gradients by ``way``; all ranks call it together."""
        self.group = group
        self.probes = way.name in WITH_DDP and group.rank.world_size > 1
        self.by_hand = ByHandFlat(model, group) if self.probes else None
        self.probing = False
        self.rows: list[list[float]] = []
        """A step a row: seconds of each of ``PARTS``, and of the whole step by a reading of its own."""
        self.unsynced: list[float] = []
        """Seconds of the backward of each probe."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._last = 0.0
        self._seen = 0

    def averaging(self, gradients: Gradients) -> Gradients:
        """What averages this step: ``gradients``, or after a probe, which kept them from it, an all-reduce by hand."""
        return self.by_hand if self.probing and self.by_hand else gradients

    def steps(self, shares: Iterable[T]) -> Iterator[T]:
        """What the sampler yields, a step each; what it takes to get it counts as data."""
        self._last = began = perf_counter()
        for each in shares:
            # The first steps are set-up (of buckets, of memory), and DDP's static graph is not known before the second.
            self.probing = self.probes and self._seen % PROBE_EVERY == PROBE_EVERY - 1
            self.mark("data")
            yield each
            self.mark("rest")
            self._end_step(began)
            began = self._last

    def mark(self, part: str) -> None:
        """The time since the last mark belongs to ``part``."""
        if self.group.device.type == "cuda":  # else only the launch of its kernels would be timed
            wait_for(self.group.device)
        at = perf_counter()
        self._seconds[part] += at - self._last
        self._last = at

    def _end_step(self, began: float) -> None:
        if self.probing:
            self.unsynced.append(self._seconds["backward"])
        elif self._seen and not (self.probes and self._seen % PROBE_EVERY == 0):  # the first step belongs to the launch
            self.rows.append([*self._seconds.values(), self._last - began])
        self._seen += 1
        self.probing = False
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def medians(self) -> list[float]:
        """Seconds of each of ``PARTS`` and of the whole step; nan where there was no step to tell by."""
        import statistics  # not above: every launch would pay for it

        if not self.rows or (self.probes and not self.unsynced):
            return [float("nan")] * (len(PARTS) + 1)
        found = [statistics.median(column) for column in zip(*self.rows, strict=True)]
        if self.probes:
            backward, communication = PARTS.index("backward"), PARTS.index("communication")
            alone = statistics.median(self.unsynced)
            found[communication] += found[backward] - alone
            found[backward] = alone
        return found

    def gathered(self) -> dict[str, Any]:
        """What all ranks measured, for a result file: seconds. Every rank must call it."""
        rows, unsynced = self.rows[-KEPT:], self.unsynced[-KEPT:]
        own = torch.tensor([*self.medians(), *(x for row in rows for x in row), *unsynced], dtype=torch.float64)
        names, width, ranks = (*PARTS, "step"), len(PARTS) + 1, []
        for line in self.group.gather(own).tolist():
            medians, raw = line[:width], line[width : width * (1 + len(rows))]
            found: dict[str, Any] = {name: _rounded(raw[number::width]) for number, name in enumerate(names)}
            if self.probes:
                found["backward_in_probes"] = _rounded(line[width * (1 + len(rows)) :])
            known = all(x == x for x in medians)
            ranks.append({"median": dict(zip(names, _rounded(medians), strict=True)) if known else None, "raw": found})
        return {
            "communication_from": "probes" if self.probes else "the part after backward",
            "steps": len(self.rows),
            "probes": len(self.unsynced),
            "raw_steps_kept": len(rows),
            "ranks": ranks,
        }


def _rounded(seconds: list[float]) -> list[float]:
    return [round(s, 8) for s in seconds]


def step_times(config: TrainConfig, group: Group, way: Way, model: nn.Module) -> Untimed:
    """The recorder that ``--step_times`` asks for; all ranks call it together."""
    return StepTimes(group, way, model) if config.step_times else Untimed()


def told(found: dict[str, Any]) -> str:
    """A line a rank: its median step in milliseconds, and the parts."""
    lines = []
    for number, rank in enumerate(found["ranks"]):
        if medians := rank["median"]:
            parts = ", ".join(f"{name} {1000 * medians[name]:.3f}" for name in PARTS)
            lines.append(f"Step of rank {number}, median: {1000 * medians['step']:.3f} ms ({parts})")
        else:
            lines.append(f"Step of rank {number}: too few steps to tell; give more data or --epochs")
    known = [rank["median"] for rank in found["ranks"] if rank["median"]]
    if len(known) > 1 and all(m["communication"] > m["forward"] + m["backward"] for m in known):
        lines.append(
            "Communication takes longer than computing, so more ranks may be slower than one process: give a larger batch, --sync "
            "auto, --compress or --accumulate; python benchmarks/compare.py --batch_sizes draws where they break even"
        )
    return "\n".join(lines)
