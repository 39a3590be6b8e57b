"""Where launch time goes: how long each phase of a run took, from the marks that its ranks wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.cases import Case
from benchmarks.harness.session import Sample, Session
from benchmarks.harness.statistics import Spread, spread

COMMAND_ENDED = "command_ended"
# What a rank does up to each mark (common.events.PHASES), as people read it.
LABELS = {
    "interpreter_up": "launcher starts rank",
    "torch_imported": "import torch",
    "ranks_known": "launcher's set-up",
    "group_joined": "data, model, join",
    "model_built": "DDP, optimizer",
    "first_step_done": "first step",
    "training_done": "training",
    "group_left": "results, leave group",
    "process_ended": "process ends",
    COMMAND_ENDED: "launcher ends",
}
LAUNCHING = tuple(LABELS)[:6]
AFTER = tuple(LABELS)[6:]
TIMES = ("launch_seconds", "train_seconds", "leave_seconds", "wall_seconds")


def durations(seconds: Mapping[str, float], command_ended: float | None = None) -> dict[str, float]:
    """What each phase of a rank took: the time from the mark before it, in order of time.

    Args:
        seconds: {phase: seconds since the command's start} of one rank; a rank's own ``command_started`` does not count, for
            it is rank 0's command that is measured.
        command_ended: seconds since the command's start, as who waited for it saw it.

    Returns:
        {phase: seconds}, in order of time; they add up to the last mark.
    """
    marks = {name: at for name, at in seconds.items() if name in LABELS}
    if command_ended is not None:
        marks[COMMAND_ENDED] = command_ended
        if "process_ended" in marks:  # the watcher hears of it a moment after the one who waits for the command
            marks["process_ended"] = min(marks["process_ended"], command_ended)
    order = list(LABELS)
    found, before = {}, 0.0
    for name, at in sorted(marks.items(), key=lambda mark: (mark[1], order.index(mark[0]))):
        found[name] = at - before
        before = at
    return found


def slowest(timelines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The rank that was last to finish the first step, and so determines the launch time."""
    return max(timelines, key=lambda rank: rank["seconds"].get("first_step_done", 0.0))


def timelines(sample: Sample) -> list[dict[str, Any]]:
    """A run's ranks as ``common.events.read`` gives them."""
    return (sample.result or {}).get("timelines") or []


def of_the_slowest(sample: Sample) -> dict[str, float]:
    """What each phase took on the slowest rank's way."""
    ranks = timelines(sample)
    return durations(slowest(ranks)["seconds"], sample.wall_seconds) if ranks else {}


def median_sample(samples: Sequence[Sample]) -> Sample | None:
    """The run in the middle by launch time (of two, the quicker); None if there is none."""
    there = sorted((s for s in samples if timelines(s)), key=lambda s: s.value("launch_seconds") or 0.0)
    return there[(len(there) - 1) // 2] if there else None


@dataclass
class PhaseRow:
    """One launcher: medians over its repeats."""

    case: Case
    phases: dict[str, Spread | None]
    times: dict[str, Spread | None]
    shown: Sample | None = field(default=None, repr=False)
    """The run that is drawn."""

    @property
    def noisy(self) -> bool:
        """Whether the repeats differ too much to tell small differences."""
        return any((s := self.times[name]) is not None and s.noisy for name in ("launch_seconds", "wall_seconds"))

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        return {
            "launcher": self.case.title,
            "world_size": self.case.world_size,
            "threads": self.case.threads,
            "phase_seconds_of_the_slowest_rank": {name: s and s.as_json() for name, s in self.phases.items()},
            **{name: s and s.as_json() for name, s in self.times.items()},
        }


def summarise(session: Session, cases: Sequence[Case]) -> list[PhaseRow]:
    """A row a case."""
    rows = []
    for case in cases:
        samples = session.of("timed", case)
        taken = [of_the_slowest(sample) for sample in samples]
        rows.append(
            PhaseRow(
                case,
                {name: spread([each.get(name) for each in taken]) for name in LABELS},
                {name: spread([sample.value(name) for sample in samples]) for name in TIMES},
                median_sample(samples),
            )
        )
    return rows
