"""What a restart is made of: the marks of the ranks that went and of those that came, on one clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.cases import Case
from benchmarks.harness.plots import both
from benchmarks.harness.report import cell, table
from benchmarks.harness.session import Sample, Session
from benchmarks.harness.statistics import Spread, paired_ratio, spread
from benchmarks.harness.summary import by_repeat
from common import events
from common.plots import TEN_COLOURS, figure

# What a restart does up to each mark, as people read it; the first is of the ranks that go, the others of those that come.
PARTS = {
    "process_ended": "old ranks end",
    "interpreter_up": "launcher starts new ones",
    "torch_imported": "import torch",
    "group_joined": "data, model, join",
    "first_step_done": "DDP, first step",
}
SLOWER = "torchrun"  # the one that the others are measured against


def ranks_of(folder: Path, restart: int, world_size: int, phase: str) -> list[dict[str, Any]]:
    """The ranks of one start (``common.events.read``), once all have come to ``phase``; [] before."""
    ranks = events.read(folder) if folder.is_dir() else []
    there = [rank for rank in ranks if rank["restart"] == restart and phase in rank["phases"]]
    return there if len(there) == world_size else []


def split(fault: float, old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What each part of a restart took.

    Args:
        fault: when a rank was killed, in the seconds of ``common.now``.
        old: the ranks of the start that it ended.
        new: those of the next.

    Returns:
        {part: seconds}: until the last old rank was gone, then on the way of the new rank that was last to finish its first
        step; they add up to that step's end.
    """
    last = max(new, key=lambda rank: float(rank["phases"]["first_step_done"]))["phases"]
    marks = {"process_ended": max(float(rank["phases"].get("process_ended", fault)) for rank in old)}
    marks |= {name: float(last[name]) for name in PARTS if name != "process_ended"}
    # The watcher may hear of an old rank's end a moment after the launcher has.
    marks["process_ended"] = min(marks["process_ended"], marks["interpreter_up"])
    found, before = {}, fault
    for name, at in marks.items():
        found[name], before = at - before, at
    return found


@dataclass
class Row:
    """One launcher with so many ranks."""

    case: Case
    seconds: Spread | None
    """From the fault to the slowest rank's next step."""
    parts: dict[str, Spread | None]
    ratio: Spread | None
    """Of the medians: how many times as long torchrun takes. low and high: of the pairs within a repeat."""
    paired: Spread | None
    """The same within each repeat."""

    def sentence(self) -> str:
        """How it compares."""
        if not (self.ratio and self.paired):
            return f"{self.case.name}: not measured beside {SLOWER}."
        return (
            f"{self.case.name}: from SIGKILL of a rank to the next step {self.ratio.median:.1f} times as fast as {SLOWER} "
            f"--max_restarts (ratio of medians; within a repeat {self.paired.text(1)})."
        )

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        return {
            "launcher": self.case.launcher,
            "world_size": self.case.world_size,
            "threads": self.case.threads,
            "restart_seconds": self.seconds and self.seconds.as_json(),
            "part_seconds": {name: s and s.as_json() for name, s in self.parts.items()},
            f"ratio_of_medians_to_{SLOWER}": self.ratio and self.ratio.median,
            f"paired_ratio_to_{SLOWER}": self.paired and self.paired.as_json(),
        }


def _parts(sample: Sample) -> dict[str, float]:
    return sample.result["part_seconds"] if sample.result else {}


def summarise(session: Session, cases: Sequence[Case]) -> list[Row]:
    """A row a case."""
    rows = []
    for case in cases:
        samples = session.of("restart", case)
        seconds = spread([sample.value("restart_seconds") for sample in samples])
        base = session.of("restart", Case(SLOWER, case.world_size, case.threads)) if case.launcher != SLOWER else []
        slower = spread([sample.value("restart_seconds") for sample in base])
        paired = paired_ratio(by_repeat(base, "restart_seconds"), by_repeat(samples, "restart_seconds"))
        ratio = None
        if slower and seconds and paired:
            ratio = Spread(slower.median / seconds.median, paired.low, paired.high, paired.samples)
        parts = {name: spread([_parts(sample).get(name) for sample in samples]) for name in PARTS}
        rows.append(Row(case, seconds, parts, ratio, paired))
    return rows


def tables(rows: Sequence[Row], repeats: int) -> Any:
    """The table for the screen."""
    threads = rows[0].case.threads
    each = f"{threads} thread{'s' * (threads > 1)} per rank"
    title = f"From SIGKILL of one rank to the next step: median (range) of {repeats}, seconds, {each}"
    made = table(title, "launcher", "ranks", "in all", *PARTS.values())
    for row in rows:
        made.add_row(row.case.title, str(row.case.world_size), cell(row.seconds, 3), *(cell(row.parts[name], 3) for name in PARTS))
    return made


def draw(rows: Sequence[Row], folder: Path, caption: str) -> list[Path]:
    """A bar a launcher and number of ranks, cut into the parts of a restart; medians."""
    shown = [row for row in rows if row.seconds]
    drawn = figure(9.5, 1.9 + 0.42 * len(shown))
    axes = drawn.add_subplot()
    labels = [f"{row.case.title} · {row.case.world_size}" for row in shown]
    left = [0.0] * len(shown)
    for number, (name, label) in enumerate(PARTS.items()):
        widths = [s.median if (s := row.parts[name]) else 0.0 for row in shown]
        axes.barh(labels, widths, left=left, color=TEN_COLOURS[number], label=label, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, row in enumerate(shown):
        s = row.seconds
        assert s
        axes.errorbar(s.median, y, xerr=[[s.median - s.low], [s.high - s.median]], color="black", capsize=3, linewidth=1)
        text = f"{s.median:.2f} s" + (f", {row.ratio.median:.1f} times as fast" if row.ratio else "")
        axes.annotate(text, (max(s.high, left[y]), y), xytext=(5, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.14)
    axes.set(xlabel="seconds since the fault (median of each part; whisker: range of the whole)", ylabel="launcher · ranks")
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(PARTS), fontsize=8)
    return both(drawn, folder, "restarts", caption)
