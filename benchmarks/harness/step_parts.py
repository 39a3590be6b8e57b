"""From runs to rows: the parts of a step per job, way and rank, from runs with --step_times; how ways compare, from runs without.

The two differ: noting costs some microseconds, every eighth step is a probe, and a median does not see what a few steps wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.cases import Case
from benchmarks.harness.session import Sample, Session
from benchmarks.harness.statistics import Spread, paired_ratio, spread

ONE, ALONE, SIDE_BY_SIDE = "one_process", "alone", "side_by_side"
REFERENCES = {
    ONE: "one process with the whole batch",
    ALONE: "one process alone with a rank's batch",
    SIDE_BY_SIDE: "as many such processes at once as there are ranks",
}
"""What a step costs in one process; with a rank's batch and the other cores idle; with them as busy as other ranks make them."""
PARTS = ("data", "forward", "backward", "communication", "optimizer", "rest")  # common.steps imports torch
FEWER_AT_LEAST, AGAINST_ALONE_AT_MOST = 4.0, 2.2  # times, what shared memory and MPI are to reach on the job random


@dataclass(frozen=True)
class Measured:
    """One way of averaging in one job, under one launcher."""

    job: str
    way: str
    """One of ``--sync``, or of ``REFERENCES``."""
    case: Case
    ranks: int
    """For how many ranks it stands; a reference's processes have a rank's share of the batch, and one rank each."""

    @property
    def role(self) -> str:
        """Of its runs whose ranks note parts."""
        return f"{self.job}/{self.way}/{self.ranks}"

    @property
    def plain_role(self) -> str:
        """Of its runs that note nothing."""
        return f"{self.role}/nothing noted"

    @property
    def title(self) -> str:
        """In a table or picture: ``ddp (spawn)``."""
        return self.way.replace("_", " ") if self.way in REFERENCES else f"{self.way} ({self.case.title})"


@dataclass
class Row:
    """What a measured way's steps were, in seconds; medians over its repeats."""

    measured: Measured
    ranks: list[dict[str, Spread | None]]
    """Per rank (or process) each part, and ``step``: medians over a run's steps."""
    step: Spread | None
    """The slowest rank's median step."""
    mean: Spread | None
    """A run's mean step, where nothing is noted."""

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        m = self.measured
        return {
            "job": m.job,
            "way": m.way,
            "launcher": m.case.launcher,
            "variant": m.case.variant,
            "world_size": m.ranks,
            "threads": m.case.threads,
            "median_step_seconds": self.step and self.step.as_json(),
            "mean_step_seconds": self.mean and self.mean.as_json(),
            "ranks": [{name: value and value.as_json() for name, value in rank.items()} for rank in self.ranks],
        }


def _medians(sample: Sample) -> list[dict[str, float]]:
    """Per rank of a run, its medians; [] if it made too few steps to tell."""
    found = ((sample.result or {}).get("step_times") or {}).get("ranks", [])
    return [rank["median"] for rank in found if rank["median"]]


def by_repeat(session: Session, measured: Measured) -> dict[int, list[dict[str, float]]]:
    """{repeat: the medians of each rank, or of each process that ran at once}."""
    found: dict[int, list[dict[str, float]]] = {}
    for sample in session.of(measured.role, measured.case):
        found.setdefault(sample.job.repeat, []).extend(_medians(sample))
    return {repeat: ranks for repeat, ranks in found.items() if ranks}


def slowest(session: Session, measured: Measured) -> dict[int, float]:
    """{repeat: the slowest rank's median step, in seconds}."""
    return {repeat: max(rank["step"] for rank in ranks) for repeat, ranks in by_repeat(session, measured).items()}


def means(session: Session, measured: Measured) -> dict[int, float]:
    """{repeat: the mean step of the runs that note nothing, in seconds; the slowest of processes that ran at once}."""
    found: dict[int, float] = {}
    for sample in session.of(measured.plain_role, measured.case):
        if sample.result and (steps := sample.result["steps_after_first"]):
            mean = sample.result["step_seconds"] / steps
            found[sample.job.repeat] = max(mean, found.get(sample.job.repeat, 0.0))
    return found


def summarise(session: Session, all_measured: Sequence[Measured]) -> list[Row]:
    """A row each."""
    rows = []
    for measured in all_measured:
        repeats = by_repeat(session, measured)
        count = max((len(ranks) for ranks in repeats.values()), default=0)
        ranks = [
            {name: spread([each[rank][name] for each in repeats.values() if rank < len(each)]) for name in (*PARTS, "step")}
            for rank in range(count)
        ]
        steps = (spread(list(of(session, measured).values())) for of in (slowest, means))
        rows.append(Row(measured, ranks, *steps))
    return rows


@dataclass(frozen=True)
class Ratio:
    """A way's mean step against others', of runs that note nothing; ratios within a repeat."""

    measured: Measured
    step: Spread
    below_ddp: Spread | None
    """How many times less than ddp's with as many ranks; None for ddp itself."""
    median_below_ddp: Spread | None
    """The same of the slowest ranks' median steps, in runs that note parts."""
    against: dict[str, Spread]
    """Times each of ``REFERENCES`` that has a rank's batch."""
    speedup: Spread | None
    """Over one process with the whole batch."""
    limit: Spread | None
    """The same of processes side by side, which average nothing."""

    def sentence(self) -> str:
        """In words."""
        words = []
        if below := self.below_ddp:
            median = f" (the median step: {_times(self.median_below_ddp, below.median >= 1)})" if self.median_below_ddp else ""
            words.append(f"{_times(below, below.median >= 1)} times {'below' if below.median >= 1 else 'above'} ddp's{median}")
        words += [f"{ratio.text()} times {name.replace('_', ' ')}" for name, ratio in self.against.items()]
        if self.speedup:
            limit = f" (side by side: {self.limit.text()})" if self.limit else ""
            words.append(f"{self.speedup.text()} times as fast as one process with the whole batch{limit}")
        ms = Spread(self.step.median * 1e3, self.step.low * 1e3, self.step.high * 1e3, self.step.samples)
        m = self.measured
        return f"{m.job}, {m.ranks} ranks, {m.title}: a step takes {ms.text(3)} ms{': ' if words else ''}{', '.join(words)}."

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        m = self.measured
        return {
            "job": m.job,
            "way": m.way,
            "launcher": m.case.title,
            "world_size": m.ranks,
            "times_below_ddp": self.below_ddp and self.below_ddp.as_json(),
            "median_step_times_below_ddp": self.median_below_ddp and self.median_below_ddp.as_json(),
            "times_reference": {name: ratio.as_json() for name, ratio in self.against.items()},
            "speedup_over_one_process": self.speedup and self.speedup.as_json(),
            "speedup_of_side_by_side": self.limit and self.limit.as_json(),
        }


def _times(below: Spread, upright: bool) -> str:
    return (below if upright else Spread(1 / below.median, 1 / below.high, 1 / below.low, below.samples)).text()


def ratios(session: Session, all_measured: Sequence[Measured]) -> list[Ratio]:
    """One a way that averages; against the first launcher's ddp where its own launcher did not run ddp."""
    found = []
    for measured in all_measured:
        step = spread(list((own := means(session, measured)).values()))
        if measured.way in REFERENCES or not step:
            continue
        peers = [m for m in all_measured if (m.job, m.ranks) == (measured.job, measured.ranks)]
        with_ddp = [m for m in peers if m.way == "ddp"]
        ddp = next((m for m in with_ddp if m.case == measured.case), next(iter(with_ddp), None))
        below = median = None
        if ddp and measured.way != "ddp":
            below, median = (paired_ratio(of(session, ddp), of(session, measured)) for of in (means, slowest))
        references = {m.way: means(session, m) for m in peers if m.way in REFERENCES}
        against = {way: r for way in (ALONE, SIDE_BY_SIDE) if (r := paired_ratio(own, references.get(way, {})))}
        speedup, limit = (paired_ratio(references.get(ONE, {}), to) for to in (own, references.get(SIDE_BY_SIDE, {})))
        found.append(Ratio(measured, step, below, median, against, speedup, limit))
    return found


def targets(found: Sequence[Ratio]) -> list[str]:
    """Whether shared memory and MPI are as fast as they are meant to be, a sentence each; said of the linear job only."""
    told = []
    for ratio in found:
        m = ratio.measured
        if m.job != "random" or m.ranks != 2 or m.way not in ("shared_memory", "mpi") or not ratio.below_ddp:
            continue
        words = [f"{FEWER_AT_LEAST:g} times below ddp's: {_reached(ratio.below_ddp.median >= FEWER_AT_LEAST, ratio.below_ddp)}"]
        for name, against in ratio.against.items():
            near = _reached(against.median <= AGAINST_ALONE_AT_MOST, against)
            words.append(f"at most {AGAINST_ALONE_AT_MOST:g} times {name.replace('_', ' ')}: {near}")
        told.append(f"Target of {m.title}: {'; '.join(words)}.")
    return told


def _reached(well: bool, ratio: Spread) -> str:
    return f"{'reached' if well else 'NOT reached'} ({ratio.median:.2f})"
